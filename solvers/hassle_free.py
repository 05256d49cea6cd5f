"""HASSLE-free: SparseGPT and the closed-form low-rank fit by turns, in the full Gram."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from globalopt.kernels.cholesky import damped_cholesky, obs_factor
from globalopt.kernels.obs import obs_prune
from globalopt.protocols import Needs
from globalopt.registry import at_least
from globalopt.types import Decomposition, Metric, Solution, Target
from solvers._alternating import Alternating, TrackedSubspace
from solvers._layer import Layer


@dataclass(frozen=True, eq=False)
class HassleFreeState:
    """A layer, its damped `G` (d_in, d_in), `F` with `F Fᵀ = G`, upper `R` with `Rᵀ R = G^-1`, and the damping."""

    layer: Layer
    G: Tensor
    F: Tensor
    R: Tensor
    damping: float


@dataclass(frozen=True)
class HassleFree:
    """`min tr((W - S - L) G (W - S - L)ᵀ)`, alternating (Makni et al. 2025, arXiv:2502.00899).

    `S` is a SparseGPT sweep of `W - L`; `L` is optimal for that `S`, tracked from round to round and exact for the
    round that is kept. Damping and rounds are what the README of the public 3BASiL repository passes for this method
    (the HASSLE-free repository's own default is 80 rounds); the best round by damped error is kept, and column blocks
    compete for the nonzeros unless `layer_wide` is off, which is the published sweep and up to half again as bad.

    Args:
        damping: fraction of the mean of G's diagonal added to it.
        diagonal_damping: fraction of each diagonal entry added to it.
        steps: most rounds.
        column_block: columns whose weights are chosen together.
        layer_wide: let column blocks compete for the nonzeros instead of giving each the same share.
        tolerance: relative change of the error in one round at which to stop.
    """

    damping: float = 0.005
    diagonal_damping: float = 0.005
    steps: int = 40
    column_block: int = 128
    layer_wide: bool = True
    tolerance: float = 1e-5

    name: ClassVar[str] = "hassle-free"
    paper: ClassVar[str] = "arXiv:2502.00899"
    needs: ClassVar[Needs] = Needs.GRAM
    low_rank: ClassVar[bool] = True
    patterns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least(0, damping=self.damping, diagonal_damping=self.diagonal_damping, tolerance=self.tolerance)
        at_least(1, steps=self.steps, column_block=self.column_block)

    def prepare(self, weight: Tensor, metric: Metric) -> HassleFreeState:
        layer = Layer.read(weight, metric)
        backwards = damped_cholesky(layer.G.flip(0, 1), self.damping, self.diagonal_damping)
        return HassleFreeState(
            layer,
            G=backwards.matrix.flip(0, 1),
            F=backwards.factor.flip(0),
            R=obs_factor(backwards.factor),
            damping=backwards.damping,
        )

    def solve(self, state: HassleFreeState, target: Target, start: Decomposition | None = None) -> Solution:
        layer = state.layer
        layer.check(target, self)

        def sweep(residual: Tensor) -> Tensor:
            return obs_prune(
                residual,
                state.R,
                target.nnz,
                target.pattern,
                column_block=self.column_block,
                layer_wide=self.layer_wide,
            )

        fit = Alternating(
            sparse_step=sweep,
            low_rank_step=TrackedSubspace(state.F, target.rank),
            G=state.G,
            steps=self.steps,
            tolerance=self.tolerance,
        ).run(layer.live)
        return layer.solution(
            Decomposition(fit.S, fit.U, fit.V),
            target,
            start,
            asked=self.damping,
            damping=state.damping,
            steps=fit.steps,
            settled=fit.settled,
        )
