"""List the layer solvers: each fits `S + L` to one weight at one target.

Every solver reports its error in the metric it was given, `tr(A E G Eᵀ)`, undamped; its option `outputs` says how much
of `A` it minimises in. A new solver is a file here and a row in `SOLVERS`; a solver that is another one with other
defaults is only a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from globalopt import registry
from globalopt.protocols import Needs, Outputs, Rounding, Solver
from globalopt.registry import variant
from solvers.eora import EoRA
from solvers.hassle_free import HassleFree
from solvers.layer_problem import LayerProblem
from solvers.magnitude import Magnitude
from solvers.oats import OATS
from solvers.round_to_nearest import RTN
from solvers.slab import SLaB
from solvers.sparsegpt import SparseGPT
from solvers.svd import SVD
from solvers.three_basil import ThreeBASiL
from solvers.wanda import Wanda

__all__ = ["SOLVERS", "LayerProblem", "get_solver"]

SOLVERS: dict[str, type[Solver[Any]]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "svd": SVD,
    "eora": EoRA,
    "oats": OATS,
    "alps": variant(
        ThreeBASiL,
        "ALPS",
        """Prune by the ADMM search of 3BASiL, without a low-rank part (ALPS, Meng et al. 2024, arXiv:2406.07831).

            min over S   tr(A (W - S) G (W - S)ᵀ)

        Damping and metric are as published. Departures: those of `ThreeBASiL`.
        """,
        name="alps",
        paper="arXiv:2406.07831",
        low_rank=False,
        damping=0.01,
        diagonal_damping=0.0,
        outputs=Outputs.NONE,
    ),
    "hassle-free": HassleFree,
    "3basil": ThreeBASiL,
    "slab": SLaB,
    "rtn": RTN,
    "gptq": variant(
        RTN,
        "GPTQ",
        """Keep every weight, and round column by column, the rest of a row making up for it (arXiv:2210.17323).

            min over levels S   tr((W - S) G (W - S)ᵀ)

        The sweep is `grid_sweep`, once over the columns from the largest input to the smallest (the public code's
        option `act-order`), with G damped by 0.01 of its mean diagonal.
        Departures: grids are symmetric, with one scale per group of 64 weights of a row that just reaches the largest
        weight, where the public code has a zero point. Bits belong to the target, as for `rtn`. All other solvers
        choose their grids by the inputs (`fit_scales`), and add coordinate descent to this sweep.
        """,
        name="gptq",
        paper="arXiv:2210.17323",
        needs=Needs.GRAM,
        rounding=Rounding.SWEEP,
    ),
}


def get_solver(name: str, options: Mapping[str, str] | None = None) -> Solver[Any]:
    """Make the solver `name` with `options` given as text; see `registry.build` for the errors.

    >>> get_solver("sparsegpt", {"damping": "0.02"})
    SparseGPT(damping=0.02, column_block=128, layer_wide=False, outputs=<Outputs.NONE: 'none'>)
    """
    return registry.build("solver", SOLVERS, name, options)
