"""Layer solvers: fit `S + L` to one weight at one target.

Every solver reports its error in the metric it was given, `tr(A E G Eᵀ)`, undamped; its option `outputs` says how much
of `A` it minimises in.
"""

from __future__ import annotations

from collections.abc import Mapping

from globalopt import registry
from globalopt.protocols import Solver
from solvers.alps import ALPS
from solvers.eora import EoRA
from solvers.hassle_free import HassleFree
from solvers.magnitude import Magnitude
from solvers.oats import OATS
from solvers.slab import SLaB
from solvers.sparsegpt import SparseGPT
from solvers.svd import SVD
from solvers.three_basil import ThreeBASiL
from solvers.wanda import Wanda

SOLVERS: dict[str, type[Solver]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "svd": SVD,
    "eora": EoRA,
    "oats": OATS,
    "alps": ALPS,
    "hassle-free": HassleFree,
    "3basil": ThreeBASiL,
    "slab": SLaB,
}


def get_solver(name: str, options: Mapping[str, str] | None = None) -> Solver:
    """The solver `name` with `options` given as text; see `registry.build` for the errors."""
    return registry.build("solver", SOLVERS, name, options)
