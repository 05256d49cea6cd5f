"""Alternate between a pruning method and the closed-form low-rank fit, in the norm of the full Gram (HASSLE-free)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from torch import Tensor

from globalopt.kernels.obs import obs_prune
from globalopt.kernels.support_refit import fit_support
from globalopt.protocols import Outputs, Solver
from globalopt.registry import at_least, below_one
from globalopt.values.budget import Target
from globalopt.values.decomposition import Decomposition, Solution
from globalopt.values.metric import Metric
from solvers._admm import AdmmSearch, prune
from solvers._alternating import Alternating, TrackedSubspace
from solvers._unit_diagonal import Damping, Sweepable, UnitDiagonal

SparseFit = Callable[[Tensor, Tensor], Tensor]
"""The sparse step of a round: (W - L, S of the round before), both (d_out, d_in) -> the next S."""

WARM = 0.5  # share of the penalty's rise that is skipped where the round before gives a support


class SparseStep(StrEnum):
    """Choose the pruning method of a round: one sweep of SparseGPT, or a few steps of ALPS.

    >>> HassleFree(SparseStep("alps")).sparse_step
    <SparseStep.ALPS: 'alps'>
    """

    SPARSEGPT = "sparsegpt"
    ALPS = "alps"


@dataclass(frozen=True)
class HassleFree(Solver[Sweepable]):
    """Alternate between pruning `W - L` and the optimal low-rank part (Makni et al. 2025, arXiv:2502.00899).

        min over S, L   tr(A (W - S - L) G (W - S - L)ᵀ)

    `S` is the pruned `W - L`; `L` is optimal for that `S`, tracked from round to round and exact for the round that is
    kept. The damping is the one that the README of the public 3BASiL repository passes to this method; that README
    passes 40 rounds, and HASSLE-free's own code has 80 by default.

    Departures: `L` has momentum, with which 28 rounds reach a lower error than 40 without; the best round by damped
    error is kept; a sweep is followed by a few conjugate-gradient steps on its support; column blocks compete for the
    nonzeros unless `layer_wide` is off, which is the published sweep and has up to half again the error; and ALPS
    starts from the support of the round before instead of from magnitudes.

    Args:
        sparse_step: a SparseGPT sweep, or ALPS.
        steps: the largest number of rounds.
        sparse_steps: steps of ADMM in each round of ALPS.
        polish: conjugate-gradient steps after a sweep.
        column_block: number of columns whose weights are chosen together.
        layer_wide: let column blocks compete for the nonzeros instead of giving each the same share.
        momentum: of `L` from round to round; 0 as published.
        tolerance: relative change of the error in one round at which to stop.
        damping: fraction of the mean of G's diagonal added to it.
        diagonal_damping: fraction of each diagonal entry of G added to it.
        output_damping: fraction of each diagonal entry of A added to it.
        outputs: how much of A weights the error. The sweep itself uses the diagonal alone; its polish and `L` use all.

    >>> import torch
    >>> from globalopt import Gram
    >>> weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    >>> metric = Metric(Gram(torch.eye(24), tokens=100))
    >>> solver = HassleFree(steps=10)
    >>> found = solver.solve(solver.prepare(weight, metric), Target(rank=2, nnz=96))
    >>> found.value.rank, found.value.nnz, found.error < 0.5 * metric.error(weight)
    (2, 96, True)
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
    version: ClassVar[int] = 2

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
        """Make the sparse step that prunes by one sweep, then refits the values on its support."""

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
        """Make the sparse step that prunes by ALPS, from the support of the round before."""
        first = AdmmSearch(self.sparse_steps, rounds=1)
        later = AdmmSearch(self.sparse_steps, begun=WARM, rounds=1)

        def step(residual: Tensor, previous: Tensor) -> Tensor:
            norm = state.unit.norm
            if previous.any():
                return prune(later, residual, norm, target.nnz, target.pattern, previous)
            return prune(first, residual, norm, target.nnz, target.pattern)

        return step
