"""OATS: sparse plus low-rank in the norm of the Gram's diagonal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from globalopt.kernels.norm import Norm
from globalopt.kernels.projection import keep_weights
from globalopt.protocols import Needs, Outputs
from globalopt.registry import at_least, below_one
from globalopt.values.budget import Target
from globalopt.values.decomposition import Decomposition, Solution
from globalopt.values.metric import Metric
from solvers._alternating import Alternating, TrackedSubspace
from solvers._layer import Layer, OneByOne, at_most_rows


@dataclass(frozen=True, eq=False)
class ScaledState:
    """A layer, its weight in scaled coordinates `WD` (d_out, d_in), and `scale` (d_in,), 1 for dead inputs."""

    layer: Layer
    WD: Tensor
    scale: Tensor


@dataclass(frozen=True)
class OATS(OneByOne):
    """`min ||(W - S - L) D||_F`, `D = diag(G)^1/2`, by alternating thresholding (Zhang and Papyan 2024).

    `L` first, then `S` = the largest entries of what is left. Departures: `L` has momentum, which halves the rounds and
    lowers the error; its subspace is tracked instead of found by a full SVD per round; and the best round is kept
    instead of the last.

    Args:
        steps: most rounds; 80 as published.
        per_row: threshold within each output row, as published; otherwise within the layer.
        momentum: of `L` from round to round; 0 as published.
        tolerance: relative change of the error in one round at which to stop.
        outputs: weight rows by the output Gram, or not, as published.
    """

    steps: int = 80
    per_row: bool = True
    momentum: float = 0.9
    tolerance: float = 1e-5
    outputs: Outputs = Outputs.NONE

    name: ClassVar[str] = "oats"
    paper: ClassVar[str] = "arXiv:2409.13652"
    needs: ClassVar[Needs] = Needs.DIAGONAL
    sparse: ClassVar[bool] = True
    low_rank: ClassVar[bool] = True
    patterns: ClassVar[bool] = True
    signs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps)
        at_least(0, tolerance=self.tolerance)
        below_one(momentum=self.momentum)
        at_most_rows(self)

    def prepare(self, weight: Tensor, metric: Metric) -> ScaledState:
        layer = Layer.read(weight, metric, self.outputs)
        scale = metric.inputs.norms
        scale = scale.masked_fill(scale == 0, 1.0)
        return ScaledState(layer, layer.live * scale, scale)

    def solve(self, state: ScaledState, target: Target, start: Decomposition | None = None) -> Solution:
        layer = state.layer
        layer.check(target, self)

        def threshold(residual: Tensor, previous: Tensor) -> Tensor:
            keep = keep_weights(residual.abs(), target.nnz, target.pattern, self.per_row)
            return residual.masked_fill(~keep, 0.0)

        plain = Norm(None)
        fit = Alternating(
            sparse_step=threshold,
            low_rank_step=TrackedSubspace(plain, target.rank),
            norm=plain,
            steps=self.steps,
            tolerance=self.tolerance,
            momentum=self.momentum,
            low_rank_first=True,
        ).run(state.WD)
        value = layer.restored(fit.S, fit.U, fit.V, state.scale)
        return layer.solution(value, target, start, steps=fit.steps, settled=fit.settled, trace=fit.trace)
