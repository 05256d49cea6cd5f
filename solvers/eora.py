"""EoRA: a pruned weight, and the low-rank part that makes up for most of what it lost."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

from torch import Tensor

from globalopt.protocols import Needs, Outputs, Solver
from globalopt.registry import at_least
from globalopt.values.budget import Target
from globalopt.values.decomposition import Decomposition, Solution
from globalopt.values.metric import Metric
from solvers._layer import OneByOne
from solvers._unit_diagonal import Damping, UnitDiagonal
from solvers.magnitude import Magnitude
from solvers.sparsegpt import SparseGPT
from solvers.wanda import Wanda


class Pruning(StrEnum):
    """How the weight is pruned before it is compensated."""

    MAGNITUDE = "magnitude"
    WANDA = "wanda"
    SPARSEGPT = "sparsegpt"


PRUNERS: dict[Pruning, Solver] = {
    Pruning.MAGNITUDE: Magnitude(),
    Pruning.WANDA: Wanda(),
    Pruning.SPARSEGPT: SparseGPT(),
}


@dataclass(frozen=True, eq=False)
class PrunableState:
    """A layer at unit diagonals, and the state in which its `pruner` prunes it."""

    unit: UnitDiagonal
    pruner: Solver
    prunable: Any


@dataclass(frozen=True)
class EoRA(OneByOne):
    """`S` = the pruned weight, `L` = `argmin tr(A (W - S - L) G (W - S - L)ᵀ)` (Liu et al. 2024, arXiv:2410.21271).

    As published, `L` is the optimum for an `S` that knows nothing of it: a round of `HassleFree` begun at `L = 0`. The
    paper takes whatever compressed weight it is given; here the weight is pruned first, by `Magnitude`, `Wanda` or
    `SparseGPT` as these are published.

    Departures: the public code divides by the roots of G's eigenvalues, zeros included, here `G` is damped; and the
    error may weight outputs by `A`, of which pruning knows the diagonal.

    Args:
        sparse_step: how the weight is pruned.
        damping: fraction of the mean of G's diagonal added to it for `L`.
        output_damping: fraction of each diagonal entry of A added to it.
        outputs: how much of A counts.
    """

    sparse_step: Pruning = Pruning.SPARSEGPT
    damping: float = 0.01
    output_damping: float = 0.1
    outputs: Outputs = Outputs.FULL

    name: ClassVar[str] = "eora"
    paper: ClassVar[str] = "arXiv:2410.21271"
    needs: ClassVar[Needs] = Needs.GRAM
    sparse: ClassVar[bool] = True
    low_rank: ClassVar[bool] = True
    patterns: ClassVar[bool] = True
    signs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        at_least(0, damping=self.damping, output_damping=self.output_damping)

    def prepare(self, weight: Tensor, metric: Metric) -> PrunableState:
        unit = UnitDiagonal.read(weight, metric, Damping(self.damping, 0.0, self.output_damping), self.outputs)
        pruner = PRUNERS[self.sparse_step]
        # Its rows are weighted already, and what weighs nothing is not there to be kept.
        return PrunableState(unit, pruner, pruner.prepare(unit.layer.live, Metric(metric.inputs)))

    def solve(self, state: PrunableState, target: Target, start: Decomposition | None = None) -> Solution:
        unit = state.unit
        unit.layer.check(target, self)
        value = unit.without_search(target)
        if value is None:
            pruned = state.pruner.solve(state.prunable, Target(0, target.nnz, target.pattern)).value
            value = unit.best_low_rank(pruned.S * unit.columns, target.rank)[0]
        return unit.layer.solution(value, target, start, asked=self.damping, damping=unit.damping)
