"""OATS: sparse plus low-rank in the norm of the Gram's diagonal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from globalopt.kernels.projection import keep_weights
from globalopt.protocols import Needs
from globalopt.registry import at_least
from globalopt.types import Decomposition, Metric, Solution, Target
from solvers._alternating import Alternating, TrackedSubspace
from solvers._layer import Layer


@dataclass(frozen=True, eq=False)
class ScaledState:
    """A layer, its weight in scaled coordinates `WD` (d_out, d_in), and `scale` (d_in,), 1 for dead inputs."""

    layer: Layer
    WD: Tensor
    scale: Tensor


@dataclass(frozen=True)
class OATS:
    """`min ||(W - S - L) D||_F`, `D = diag(G)^1/2`, by alternating thresholding (Zhang and Papyan 2024).

    `L` first, then `S` = the largest entries of what is left. The low-rank step is a tracked subspace instead of a
    full SVD per round, and the best round is kept instead of the last.

    Args:
        steps: most rounds; 80 as published.
        per_row: threshold within each output row, as published; otherwise within the layer.
        tolerance: relative change of the error in one round at which to stop.
    """

    steps: int = 80
    per_row: bool = True
    tolerance: float = 1e-5

    name: ClassVar[str] = "oats"
    paper: ClassVar[str] = "arXiv:2409.13652"
    needs: ClassVar[Needs] = Needs.DIAGONAL
    low_rank: ClassVar[bool] = True
    patterns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps)
        at_least(0, tolerance=self.tolerance)

    def prepare(self, weight: Tensor, metric: Metric) -> ScaledState:
        layer = Layer.read(weight, metric)
        scale = metric.inputs.norms
        scale = scale.masked_fill(scale == 0, 1.0)
        return ScaledState(layer, layer.live * scale, scale)

    def solve(self, state: ScaledState, target: Target, start: Decomposition | None = None) -> Solution:
        layer = state.layer
        layer.check(target, self)

        def threshold(residual: Tensor) -> Tensor:
            keep = keep_weights(residual.abs(), target.nnz, target.pattern, self.per_row)
            return residual.masked_fill(~keep, 0.0)

        fit = Alternating(
            sparse_step=threshold,
            low_rank_step=TrackedSubspace(F=None, rank=target.rank),
            G=None,
            steps=self.steps,
            tolerance=self.tolerance,
            low_rank_first=True,
        ).run(state.WD)
        value = Decomposition(fit.S / state.scale, fit.U, fit.V / state.scale)
        return layer.solution(value, target, start, steps=fit.steps, settled=fit.settled)
