"""3BASiL: sparse and low-rank parts fitted jointly by ADMM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from globalopt.kernels.cholesky import damped_cholesky
from globalopt.kernels.low_rank import leading_subspace
from globalopt.kernels.projection import keep_weights
from globalopt.kernels.ridge_admm import ridge_admm
from globalopt.protocols import Needs
from globalopt.registry import at_least
from globalopt.types import Decomposition, Metric, Solution, Target
from solvers._layer import Layer


@dataclass(frozen=True, eq=False)
class UnitDiagonalState:
    """A layer in coordinates where its damped Gram has a unit diagonal.

    `W` (d_out, d_in) is the weight times `scale` (d_in,); `G` (d_in, d_in) the damped Gram divided by it on both sides;
    `F Fᵀ = G`; `damping` what the factorisation took.
    """

    layer: Layer
    W: Tensor
    G: Tensor
    F: Tensor
    scale: Tensor
    damping: float


@dataclass(frozen=True)
class ThreeBASiL:
    """`min tr((W - S - L) G (W - S - L)ᵀ)` by `ridge_admm` (Makni et al. 2025, arXiv:2603.01376).

    Defaults are those of the public repository. In the unit-diagonal coordinates `|w|` is Wanda's score and the
    penalty has no scale.

    Args:
        damping: fraction of the mean of G's diagonal added to it.
        diagonal_damping: fraction of each diagonal entry added to it.
        penalty: ADMM's penalty at the start.
        check_every: steps between penalty updates; more is slower and better.
        steps: most steps.
    """

    damping: float = 0.005
    diagonal_damping: float = 0.005
    penalty: float = 0.1
    check_every: int = 10
    steps: int = 2000

    name: ClassVar[str] = "3basil"
    paper: ClassVar[str] = "arXiv:2603.01376"
    needs: ClassVar[Needs] = Needs.GRAM
    low_rank: ClassVar[bool] = True
    patterns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least(0, damping=self.damping, diagonal_damping=self.diagonal_damping)
        at_least(1e-6, penalty=self.penalty)
        at_least(1, check_every=self.check_every, steps=self.steps)

    def prepare(self, weight: Tensor, metric: Metric) -> UnitDiagonalState:
        layer = Layer.read(weight, metric)
        damped = damped_cholesky(layer.G, self.damping, self.diagonal_damping)
        scale = damped.matrix.diagonal().sqrt()
        return UnitDiagonalState(
            layer,
            W=layer.live * scale,
            G=damped.matrix / scale / scale[:, None],
            F=damped.factor / scale[:, None],
            scale=scale,
            damping=damped.damping,
        )

    def solve(self, state: UnitDiagonalState, target: Target, start: Decomposition | None = None) -> Solution:
        layer, W = state.layer, state.W
        layer.check(target, self)
        steps, settled = 0, True
        if target.nnz == W.numel():
            value = layer.sparse(layer.weight)
        elif target.nnz == 0:
            U = leading_subspace(W, W @ state.G, state.F, target.rank)
            value = Decomposition(W.new_zeros(W.shape), U, U.mT @ W / state.scale)
        else:
            S, U, V, steps, settled, _ = ridge_admm(
                W,
                state.G,
                state.F,
                target.rank,
                lambda magnitudes: keep_weights(magnitudes, target.nnz, target.pattern),
                penalty=self.penalty,
                check_every=self.check_every,
                max_steps=self.steps,
            )
            value = Decomposition(S / state.scale, U, V / state.scale)
        return layer.solution(
            value, target, start, asked=self.damping, damping=state.damping, steps=steps, settled=settled
        )
