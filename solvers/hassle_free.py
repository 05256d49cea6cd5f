"""HASSLE-free: a pruning method and the closed-form low-rank fit by turns, in the full Gram."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from torch import Tensor

from globalopt.kernels.obs import obs_prune
from globalopt.kernels.support_refit import fit_support
from globalopt.protocols import Needs, Outputs
from globalopt.registry import at_least, below_one
from globalopt.values.budget import Target
from globalopt.values.decomposition import Decomposition, Solution
from globalopt.values.metric import Metric
from solvers._admm import Search, prune
from solvers._alternating import Alternating, TrackedSubspace
from solvers._layer import OneByOne
from solvers._unit_diagonal import Damping, Sweepable, UnitDiagonal

SparseFit = Callable[[Tensor, Tensor], Tensor]
WARM = 0.5  # share of the penalty's rise that a support from the round before saves


class SparseStep(StrEnum):
    """The pruning method of a round."""

    SPARSEGPT = "sparsegpt"
    ALPS = "alps"


@dataclass(frozen=True)
class HassleFree(OneByOne):
    """`min tr(A (W - S - L) G (W - S - L)ᵀ)`, alternating (Makni et al. 2025, arXiv:2502.00899).

    `S` is the pruned `W - L`; `L` is optimal for that `S`, tracked from round to round and exact for the round that is
    kept. Damping is what the README of the public 3BASiL repository passes for this method; its rounds are 40, and 80
    by default in HASSLE-free's own.

    Departures: `L` has momentum, with which 28 rounds leave less than 40 without; the best round by damped error is
    kept; a sweep is followed by a few conjugate-gradient steps on its support; column blocks compete for the nonzeros
    unless `layer_wide` is off, which is the published sweep and up to half again as bad; and ALPS starts from the
    support of the round before instead of from magnitudes.

    Args:
        sparse_step: a SparseGPT sweep, or ALPS.
        steps: most rounds.
        sparse_steps: of ADMM in each round of ALPS.
        polish: conjugate-gradient steps after a sweep.
        column_block: columns whose weights are chosen together.
        layer_wide: let column blocks compete for the nonzeros instead of giving each the same share.
        momentum: of `L` from round to round; 0 as published.
        tolerance: relative change of the error in one round at which to stop.
        damping: fraction of the mean of G's diagonal added to it.
        diagonal_damping: fraction of each diagonal entry of G added to it.
        output_damping: fraction of each diagonal entry of A added to it.
        outputs: how much of A counts. The sweep itself knows only the rows; its polish and `L` know all of it.
    """

    sparse_step: SparseStep = SparseStep.SPARSEGPT
    steps: int = 28
    sparse_steps: int = 20
    polish: int = 8
    column_block: int = 128
    layer_wide: bool = True
    momentum: float = 0.6
    tolerance: float = 1e-5
    damping: float = 0.005
    diagonal_damping: float = 0.005
    output_damping: float = 0.1
    outputs: Outputs = Outputs.FULL

    name: ClassVar[str] = "hassle-free"
    paper: ClassVar[str] = "arXiv:2502.00899"
    needs: ClassVar[Needs] = Needs.GRAM
    sparse: ClassVar[bool] = True
    low_rank: ClassVar[bool] = True
    patterns: ClassVar[bool] = True
    signs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        at_least(0, damping=self.damping, diagonal_damping=self.diagonal_damping, output_damping=self.output_damping)
        at_least(0, tolerance=self.tolerance, polish=self.polish)
        below_one(momentum=self.momentum)
        at_least(1, steps=self.steps, sparse_steps=self.sparse_steps, column_block=self.column_block)

    def prepare(self, weight: Tensor, metric: Metric) -> Sweepable:
        damping = Damping(self.damping, self.diagonal_damping, self.output_damping)
        return Sweepable.of(UnitDiagonal.read(weight, metric, damping, self.outputs))

    def solve(self, state: Sweepable, target: Target, start: Decomposition | None = None) -> Solution:
        unit = state.unit
        unit.layer.check(target, self)
        if (simple := unit.without_search(target)) is not None:
            return unit.layer.solution(simple, target, start, asked=self.damping, damping=state.damping)
        fit = Alternating(
            self._sweep(state, target) if self.sparse_step is SparseStep.SPARSEGPT else self._alps(state, target),
            TrackedSubspace(unit.norm, target.rank),
            unit.norm,
            self.steps,
            self.tolerance,
            self.momentum,
        ).run(unit.W)
        return unit.layer.solution(
            unit.restored(fit.S, fit.U, fit.V),
            target,
            start,
            asked=self.damping,
            damping=state.damping,
            steps=fit.steps,
            settled=fit.settled,
            trace=fit.trace,
        )

    def _sweep(self, state: Sweepable, target: Target) -> SparseFit:
        def sweep(residual: Tensor, previous: Tensor) -> Tensor:
            S = obs_prune(
                residual,
                state.R,
                target.nnz,
                target.pattern,
                column_block=self.column_block,
                layer_wide=self.layer_wide,
            )
            return fit_support(residual, S, state.unit.norm, self.polish)

        return sweep

    def _alps(self, state: Sweepable, target: Target) -> SparseFit:
        first = Search(self.sparse_steps, rounds=1)
        later = Search(self.sparse_steps, begun=WARM, rounds=1)

        def step(residual: Tensor, previous: Tensor) -> Tensor:
            norm = state.unit.norm
            if previous.any():
                return prune(later, residual, norm, target.nnz, target.pattern, previous)
            return prune(first, residual, norm, target.nnz, target.pattern)

        return step
