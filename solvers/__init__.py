"""Layer solvers: fit `S + L` to one weight at one target.

Every solver here minimises in the input metric `tr(E G Eᵀ)` and reports that error, undamped, even where the given
`Metric` has an output side.
"""

from __future__ import annotations

from collections.abc import Mapping

from globalopt import registry
from globalopt.protocols import Solver
from solvers.hassle_free import HassleFree
from solvers.magnitude import Magnitude
from solvers.oats import OATS
from solvers.sparsegpt import SparseGPT
from solvers.three_basil import ThreeBASiL
from solvers.wanda import Wanda

SOLVERS: dict[str, type[Solver]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "oats": OATS,
    "hassle-free": HassleFree,
    "3basil": ThreeBASiL,
}


def get_solver(name: str, options: Mapping[str, str] | None = None) -> Solver:
    """The solver `name` with `options` given as text; see `registry.build` for the errors."""
    return registry.build("solver", SOLVERS, name, options)
