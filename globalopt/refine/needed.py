"""Say how much of the input Grams a refinement reads."""

from __future__ import annotations

from typing import Any

from globalopt.protocols import Needs, Rounding, Solver


def needed(solver: Solver[Any], few_bits: bool, output_grams: bool) -> Needs:
    """Return how much of the input Grams is read: by a solver, by the rounding after it, and for errors in nats.

    Where it is not all, reported errors are in the norm that is read: that of outputs with correlations from a sample
    of the tokens (`BlockVisit.grams`), or that of weights.

    >>> from solvers import get_solver
    >>> wanda = get_solver("wanda")
    >>> needed(wanda, few_bits=False, output_grams=False), needed(wanda, few_bits=True, output_grams=False)
    (<Needs.DIAGONAL: 1>, <Needs.GRAM: 2>)
    """
    if output_grams or (few_bits and solver.rounding is not Rounding.NEAREST):
        return Needs.GRAM
    return solver.needs
