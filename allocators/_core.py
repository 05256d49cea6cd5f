"""The core of a multiple-choice knapsack: the options that can still be in a better allocation, solved by HiGHS."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, eye_array, hstack

from globalopt.values.budget import Target
from globalopt.values.problem import ErrorSurface, Problem

log = logging.getLogger(__name__)

TOLERANCE = 1e-6
"""Of HiGHS, for variables that are integers."""


@dataclass(frozen=True)
class Piece:
    """A part of a layer's choices: one option, or all targets between two neighbours that differ in nonzeros alone.

    Args:
        layer: number of the surface.
        start, end: the neighbours; the same target for a single option.
        cost, error: of `start`.
        rise, fall: the cost of `end` less that of `start`, and the error of `start` less that of `end`.
    """

    layer: int
    start: Target
    end: Target
    cost: int
    error: float
    rise: int
    fall: float


def solve_core(
    problem: Problem, price: float, bound: float, least: float, gap: float, nodes: int
) -> tuple[dict[str, Target] | None, float]:
    """Solve for the best choice of one piece per layer; return it with a bound, or None where HiGHS found none.

    At a `price` of a unit of budget the reduced cost of an option is its `error + price cost` less the least of its
    layer. The error of a choice that contains the option is at least the Lagrangian `bound` plus the reduced cost; so
    an allocation of error `least` can only be improved by pieces whose reduced cost is at most `least - bound`, a
    handful per layer.

        min sum error y - fall t   s.t.  sum over a layer's pieces y = 1,  0 <= t <= y,  sum cost y + rise t <= limit

    with `y` binary. Between two counts of nonzeros this is exact, as surfaces are linear there. Where only rank is
    free, one rank costs too much to be taken in fractions: every rank between two options is then a piece of its own.

    Args:
        price, bound: of the relaxation.
        least: error of a known allocation.
        gap, nodes: relative gap and number of nodes at which HiGHS stops.
    Source:
        the reduction by reduced costs: Ingargiola and Korsh 1973; the core: Pisinger 1995, A minimal algorithm for the
        multiple-choice knapsack problem, doi:10.1016/0377-2217(95)00015-I.
    """
    if least - bound <= gap * least:
        return None, bound
    pieces = [
        piece
        for layer, surface in enumerate(problem.surfaces)
        for piece in _pieces(problem, layer, surface, price, least - bound)
    ]
    count, layers = len(pieces), np.array([piece.layer for piece in pieces])
    cost, rise = (np.array([[getattr(piece, name) for piece in pieces]], float) for name in ("cost", "rise"))
    error, fall = (np.array([getattr(piece, name) for piece in pieces]) for name in ("error", "fall"))
    choose = csr_array((np.ones(count), (layers, np.arange(count))), shape=(len(problem.surfaces), count))
    scale = max(least, 1e-30)
    # Costs are whole: half a unit more admits no other choice of whole pieces, and absorbs HiGHS' tolerance.
    room = 0.5 if problem.axis == "rank" else 0.0
    with _silent():
        result = milp(
            np.concatenate([error, -fall]) / scale,
            integrality=np.repeat([1, 0], count),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(hstack([choose, csr_array(choose.shape)]), 1, 1),
                LinearConstraint(hstack([-eye_array(count), eye_array(count)]), -np.inf, 0),
                LinearConstraint(np.hstack([cost, rise]), -np.inf, problem.budget.limit + room),
            ],
            options={"mip_rel_gap": gap, "node_limit": nodes},
        )
    if result.x is None:
        log.warning("HiGHS found no allocation (%s); the Lagrangian one is used.", result.message)
        return None, bound
    proved = max(bound, min(least, float(result.mip_dual_bound) * scale))
    y, t = np.split(result.x, 2)
    targets = _within(problem, [(pieces[i], t[i]) for i in _chosen(problem, pieces, y)])
    # In bytes a count between two others may cost more than the line between them says.
    return (targets if problem.used(targets) <= problem.budget.limit else None), proved


def _pieces(problem: Problem, layer: int, surface: ErrorSurface, price: float, slack: float) -> Iterator[Piece]:
    """Return the pieces of a layer whose reduced cost is at most `slack`, at one of their ends."""
    budget, spec, axis = problem.budget, surface.spec, problem.axis

    def value(target: Target) -> float:
        return surface.predict(target) + price * budget.cost(target, spec)

    most = min(value(target) for target in surface.targets) + slack
    for row in _rows(surface.targets, axis):
        points = row if axis == "nnz" else _whole_ranks(problem, row)
        ends = pairwise(points) if axis == "nnz" and len(points) > 1 else zip(points, points, strict=True)
        for start, end in ends:
            if min(value(start), value(end)) <= most:
                cost, error = budget.cost(start, spec), surface.predict(start)
                rise, fall = budget.cost(end, spec) - cost, error - surface.predict(end)
                yield Piece(layer, start, end, cost, error, rise, fall)


def _rows(targets: Iterable[Target], axis: str) -> Iterator[list[Target]]:
    """Return the targets that differ in `axis` alone, in ascending order."""
    rows: dict[Target, list[Target]] = {}
    for target in targets:
        rows.setdefault(replace(target, **{axis: 0}), []).append(target)
    for row in rows.values():
        yield sorted(row, key=lambda target: getattr(target, axis))


def _whole_ranks(problem: Problem, row: Sequence[Target]) -> list[Target]:
    """Return a row of ranks, with all ranks between them that are within the limits."""
    step = problem.limits.rank_multiple
    return [replace(row[0], rank=rank) for rank in range(row[0].rank, row[-1].rank + 1, step)]


def _chosen(problem: Problem, pieces: Sequence[Piece], y: NDArray[np.float64]) -> list[int]:
    """For every layer the number of its piece with the largest `y`."""
    best: dict[int, int] = {}
    for i, piece in enumerate(pieces):
        if piece.layer not in best or y[i] > y[best[piece.layer]]:
            best[piece.layer] = i
    return [best[layer] for layer in range(len(problem.surfaces))]


def _within(problem: Problem, chosen: Sequence[tuple[Piece, float]]) -> dict[str, Target]:
    """Return the targets of a solution: pieces at one of their ends, and one between them on the rest of the budget.

    One constraint leaves at most one piece between its ends.
    """
    found = {}
    middle = None
    for (piece, t), spec in zip(chosen, problem.specs, strict=True):
        found[spec.name] = piece.end if t > 0.5 else piece.start
        if TOLERANCE < t < 1 - TOLERANCE:
            found[spec.name], middle = piece.start, (piece, spec)
    if middle is not None:
        piece, spec = middle
        left = problem.budget.limit - problem.used(found)
        found[spec.name] = problem.grow(piece.start, spec, "nnz", piece.end.nnz, piece.cost + left)
    return found


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Drop the text that HiGHS writes past Python to the standard output whatever its options say."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
