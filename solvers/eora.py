"""Prune a weight, then fit the low-rank part to the pruning error (EoRA)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from globalopt.protocols import Outputs, Solver
from globalopt.registry import at_least
from globalopt.values.budget import Target
from globalopt.values.decomposition import Decomposition, Solution
from globalopt.values.metric import Metric
from solvers._unit_diagonal import Damping, UnitDiagonal
from solvers.magnitude import Magnitude
from solvers.sparsegpt import SparseGPT
from solvers.wanda import Wanda


class Pruning(StrEnum):
    """Choose the solver that prunes the weight before `L` is fitted.

    >>> PRUNERS[Pruning.WANDA]
    Wanda(per_row=True, outputs=<Outputs.NONE: 'none'>)
    """

    MAGNITUDE = "magnitude"
    WANDA = "wanda"
    SPARSEGPT = "sparsegpt"


PRUNERS: dict[Pruning, Solver[Any]] = {
    Pruning.MAGNITUDE: Magnitude(),
    Pruning.WANDA: Wanda(),
    Pruning.SPARSEGPT: SparseGPT(),
}


@dataclass(frozen=True, eq=False)
class PrunableState:
    """Hold a layer scaled to unit diagonals, and the function that prunes it to a target without rank.

    >>> import torch
    >>> from globalopt import Gram
    >>> solver = EoRA(Pruning.MAGNITUDE)
    >>> state = solver.prepare(torch.tensor([[3.0, -1.0]]), Metric(Gram(torch.eye(2), tokens=100)))
    >>> state.prune(Target(rank=0, nnz=1)).value.S
    tensor([[3., 0.]])
    """

    unit: UnitDiagonal
    prune: Callable[[Target], Solution]


@dataclass(frozen=True)
class EoRA(Solver[PrunableState]):
    """Prune the weight to `S`, then compute the optimal `L` for that `S` (Liu et al. 2024, arXiv:2410.21271).

        L = argmin tr(A (W - S - L) G (W - S - L)ᵀ)

    As published, `S` is chosen before `L` and does not depend on it: one round of `HassleFree` begun at `L = 0`. The
    paper takes any compressed weight; here the weight is pruned first, by `Magnitude`, `Wanda` or `SparseGPT` with
    the options of their papers.

    Departures: the public code divides by the roots of G's eigenvalues, zeros included; here `G` is damped. The error
    may weight outputs by `A`; pruning uses the diagonal of `A` alone.

    Args:
        sparse_step: how the weight is pruned.
        damping: fraction of the mean of G's diagonal added to it for `L`.
        output_damping: fraction of each diagonal entry of A added to it.
        outputs: how much of A weights the error.

    >>> import torch
    >>> from globalopt import Gram
    >>> weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    >>> solver = EoRA()
    >>> state = solver.prepare(weight, Metric(Gram(torch.eye(24), tokens=100)))
    >>> pruned, compensated = solver.solve_path(state, [Target(0, 100), Target(2, 100)])
    >>> compensated.value.rank, compensated.error < pruned.error
    (2, True)
    """

    sparse_step: Pruning = Pruning.SPARSEGPT
    damping: float = 0.01
    output_damping: float = 0.1
    outputs: Outputs = Outputs.FULL

    name: ClassVar[str] = "eora"
    paper: ClassVar[str] = "arXiv:2410.21271"

    def __post_init__(self) -> None:
        at_least(0, damping=self.damping, output_damping=self.output_damping)

    def prepare(self, weight: Tensor, metric: Metric) -> PrunableState:
        unit = UnitDiagonal.read(weight, metric, Damping(self.damping, 0.0, self.output_damping), self.outputs)
        pruner = PRUNERS[self.sparse_step]
        # `live` has its rows weighted already, and zeros on dead inputs, so that none of these is kept.
        return PrunableState(unit, partial(pruner.solve, pruner.prepare(unit.layer.live, Metric(metric.inputs))))

    def solve(self, state: PrunableState, target: Target, start: Decomposition | None = None) -> Solution:
        unit = state.unit
        unit.layer.check(target, self)
        value = unit.without_search(target)
        if value is None:
            pruned = state.prune(Target(0, target.nnz, target.pattern)).value
            value = unit.best_low_rank(pruned.S * unit.columns, target.rank)[0]
        return unit.layer.solution(value, target, start, asked=self.damping, damping=unit.damping)
