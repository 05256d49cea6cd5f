"""Fit sparse plus low-rank parts by alternating thresholding in the norm of the Gram's diagonal (OATS)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from globalopt.kernels.norm import Norm
from globalopt.kernels.projection import keep_weights
from globalopt.protocols import Needs, Outputs, Solver
from globalopt.registry import at_least, below_one
from globalopt.values.budget import Target
from globalopt.values.decomposition import Decomposition, Solution
from globalopt.values.metric import Metric
from solvers._alternating import Alternating, TrackedSubspace
from solvers.layer_problem import LayerProblem, at_most_rows


@dataclass(frozen=True, eq=False)
class ScaledState:
    """Hold a layer, its scaled weight `WD` (d_out, d_in), and the `scale` (d_in,) of the columns, 1 for dead inputs.

    >>> import torch
    >>> from globalopt import Gram
    >>> metric = Metric(Gram(torch.diag(torch.tensor([9.0, 0.0])), tokens=100))
    >>> OATS().prepare(torch.ones(1, 2), metric).scale
    tensor([3., 1.])
    """

    layer: LayerProblem
    WD: Tensor
    scale: Tensor


@dataclass(frozen=True)
class OATS(Solver[ScaledState]):
    """Alternate between a truncated SVD and hard thresholding (Zhang and Papyan 2024, arXiv:2409.13652).

        min over S, L   ||(W - S - L) D||_F,   D = diag(G)^1/2

    A round fits `L` to `W - S`, then keeps the largest entries of `W - L` as `S`. Departures: `L` has momentum, which
    halves the rounds and lowers the error; its subspace is tracked from round to round instead of found by a full SVD;
    and the best round is kept instead of the last.

    Args:
        steps: the largest number of rounds; 80 as published.
        per_row: threshold within each output row, as published; otherwise within the layer.
        momentum: of `L` from round to round; 0 as published.
        tolerance: relative change of the error in one round at which to stop.
        outputs: weight rows by the output Gram, or not, as published.

    >>> import torch
    >>> from globalopt import Gram
    >>> weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    >>> metric = Metric(Gram(torch.eye(24), tokens=100))
    >>> solver = OATS()
    >>> found = solver.solve(solver.prepare(weight, metric), Target(rank=2, nnz=96))
    >>> found.value.rank, found.value.nnz, found.error < 0.5 * metric.error(weight)
    (2, 96, True)
    """

    steps: int = 80
    per_row: bool = True
    momentum: float = 0.9
    tolerance: float = 1e-5
    outputs: Outputs = Outputs.NONE

    name: ClassVar[str] = "oats"
    paper: ClassVar[str] = "arXiv:2409.13652"
    needs: ClassVar[Needs] = Needs.DIAGONAL

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps)
        at_least(0, tolerance=self.tolerance)
        below_one(momentum=self.momentum)
        at_most_rows(self)

    def prepare(self, weight: Tensor, metric: Metric) -> ScaledState:
        layer = LayerProblem.read(weight, metric, self.outputs)
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
