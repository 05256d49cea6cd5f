"""Prune by one optimal-brain-surgeon sweep (SparseGPT)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from globalopt.kernels.cholesky import damped_cholesky, obs_factor
from globalopt.kernels.obs import obs_prune
from globalopt.protocols import Outputs, Solver
from globalopt.registry import at_least
from globalopt.values.budget import Target
from globalopt.values.decomposition import Decomposition, Solution
from globalopt.values.metric import Metric
from solvers.layer_problem import LayerProblem, at_most_rows


@dataclass(frozen=True, eq=False)
class SweepState:
    """Hold a layer, the upper factor `R` (d_in, d_in) of its damped inverse Gram, and the damping that was used.

    >>> import torch
    >>> from globalopt import Gram
    >>> metric = Metric(Gram(4 * torch.eye(2), tokens=100))
    >>> SparseGPT(damping=0).prepare(torch.ones(1, 2), metric).R.tolist()
    [[0.5, 0.0], [0.0, 0.5]]
    """

    layer: LayerProblem
    R: Tensor
    damping: float


@dataclass(frozen=True)
class SparseGPT(Solver[SweepState]):
    """Prune by one optimal-brain-surgeon sweep over the columns (Frantar and Alistarh 2023, arXiv:2301.00774).

        min over S   tr((W - S) G (W - S)ᵀ)

    The sweep is `obs_prune`: whenever a weight is pruned, the weights to its right are moved to make up for it.

    Args:
        damping: fraction of the mean of G's diagonal added to it.
        column_block: number of columns whose weights are chosen together.
        layer_wide: let column blocks compete for the nonzeros instead of giving each the same share, as published;
            lower error wherever a few inputs carry most of the energy.
        outputs: weight rows by the output Gram, or not, as published.

    >>> import torch
    >>> from globalopt import Gram
    >>> from solvers.magnitude import Magnitude
    >>> metric = Metric(Gram(torch.tensor([[1.0, 0.8], [0.8, 1.0]]), tokens=100))
    >>> errors = []
    >>> for solver in (Magnitude(), SparseGPT(damping=0)):
    ...     state = solver.prepare(torch.tensor([[1.0, 2.0]]), metric)
    ...     errors.append(round(solver.solve(state, Target(rank=0, nnz=1)).error, 3))
    >>> errors
    [1.0, 0.36]
    """

    damping: float = 0.01
    column_block: int = 128
    layer_wide: bool = False
    outputs: Outputs = Outputs.NONE

    name: ClassVar[str] = "sparsegpt"
    paper: ClassVar[str] = "arXiv:2301.00774"
    low_rank: ClassVar[bool] = False

    def __post_init__(self) -> None:
        at_least(0, damping=self.damping)
        at_least(1, column_block=self.column_block)
        at_most_rows(self)

    def prepare(self, weight: Tensor, metric: Metric) -> SweepState:
        layer = LayerProblem.read(weight, metric, self.outputs)
        reversed_gram = damped_cholesky(layer.G.flip(0, 1), self.damping)
        return SweepState(layer, obs_factor(reversed_gram.factor), reversed_gram.damping)

    def solve(self, state: SweepState, target: Target, start: Decomposition | None = None) -> Solution:
        layer = state.layer
        layer.check(target, self)
        S = obs_prune(
            layer.live,
            state.R,
            target.nnz,
            target.pattern,
            column_block=self.column_block,
            layer_wide=self.layer_wide,
        )
        return layer.solution(layer.sparse(S), target, start, asked=self.damping, damping=state.damping)
