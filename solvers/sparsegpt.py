"""SparseGPT: one sweep of optimal-brain-surgeon pruning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from globalopt.kernels.cholesky import damped_cholesky, obs_factor
from globalopt.kernels.obs import obs_prune
from globalopt.protocols import Needs, Outputs
from globalopt.registry import at_least
from globalopt.values.budget import Target
from globalopt.values.decomposition import Decomposition, Solution
from globalopt.values.metric import Metric
from solvers._layer import Layer, OneByOne, at_most_rows


@dataclass(frozen=True, eq=False)
class SweepState:
    """A layer, the upper factor `R` of its damped inverse Gram, and the damping that took."""

    layer: Layer
    R: Tensor
    damping: float


@dataclass(frozen=True)
class SparseGPT(OneByOne):
    """`min tr((W - S) G (W - S)ᵀ)` by `obs_prune` (Frantar and Alistarh 2023, arXiv:2301.00774).

    Args:
        damping: fraction of the mean of G's diagonal.
        column_block: columns whose weights are chosen together.
        layer_wide: let column blocks compete for the nonzeros instead of giving each the same share, as published;
            lower error wherever a few inputs carry most of the energy.
        outputs: weight rows by the output Gram, or not, as published.
    """

    damping: float = 0.01
    column_block: int = 128
    layer_wide: bool = False
    outputs: Outputs = Outputs.NONE

    name: ClassVar[str] = "sparsegpt"
    paper: ClassVar[str] = "arXiv:2301.00774"
    needs: ClassVar[Needs] = Needs.GRAM
    sparse: ClassVar[bool] = True
    low_rank: ClassVar[bool] = False
    patterns: ClassVar[bool] = True
    signs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        at_least(0, damping=self.damping)
        at_least(1, column_block=self.column_block)
        at_most_rows(self)

    def prepare(self, weight: Tensor, metric: Metric) -> SweepState:
        layer = Layer.read(weight, metric, self.outputs)
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
