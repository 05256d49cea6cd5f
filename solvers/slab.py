"""Fit a sparse part and a low-rank part whose entries carry a plane of signs (SLaB)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from globalopt.kernels.projection import keep_weights
from globalopt.kernels.sign_plane import SignPlane, SparseAndSigns, alternate, fit_factors, sign_sweep
from globalopt.kernels.support_refit import fit_support
from globalopt.protocols import Outputs, Solver
from globalopt.registry import at_least
from globalopt.values.budget import Target
from globalopt.values.decomposition import Decomposition, Solution
from globalopt.values.metric import Metric
from solvers._admm import AdmmSearch, prune
from solvers._unit_diagonal import Damping, Sweepable, UnitDiagonal

BEGUN = 0.5  # share of the penalty's rise that is skipped, because the rounds before give a support


@dataclass(frozen=True)
class SLaB(Solver[Sweepable]):
    """Fit a sparse part and a low-rank part with a sign plane (SLaB, arXiv:2604.04493), published for rank 1.

        min over S, U, V, B   tr(A E G Eᵀ),   E = W - S - (U V) * B,   B of +-1

    The published rounds are `kernels.sign_plane.alternate`: `S` keeps the entries of `W - L` of largest Wanda score,
    `B` and `L` are fitted to `W - S`. They are followed by `refit` rounds in the norm of the whole Gram: `sign_sweep`
    chooses `S` and `B` anew at the magnitudes `|U V|`, then the values of `S` and the factors are refitted, one after
    the other. At the end the search of ALPS, started from the support so far, fits `S` to `W - (U V) * B`. The best of
    all rounds is kept.

    Departures: the published rounds fit `L` in the norm of `diag(G)`, in which they score, instead of unweighted (on
    most layers the same error, on some a lower one; and at rank 1 no round is worse than the one before), and the best
    of them is kept instead of the last; with `refit = 0, search = 0` these are the only ones.

    Args:
        steps: number of published rounds; 20 as published.
        per_row: threshold within each output row in these, as published; otherwise within the layer.
        refit: the largest number of rounds in the whole Gram; they stop at the first that does not lower the error.
        conjugate: conjugate-gradient steps for the values of `S` in each of those.
        search: steps of ADMM for `S` at the end; 0 as published.
        damping: fraction of the mean of G's diagonal added to it.
        diagonal_damping: fraction of each diagonal entry of G added to it.
        output_damping: fraction of each diagonal entry of A added to it.
        outputs: how much of A weights the error. The published rounds and the sweep use its diagonal; the refits all.

    >>> from globalopt import Gram
    >>> weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    >>> metric = Metric(Gram(torch.eye(24), tokens=100))
    >>> solver = SLaB(search=0)
    >>> found = solver.solve(solver.prepare(weight, metric), Target(rank=1, nnz=96, signs=True))
    >>> found.value.rank, found.value.nnz, found.error < 0.3 * metric.error(weight)
    (1, 96, True)
    """

    steps: int = 20
    per_row: bool = True
    refit: int = 4
    conjugate: int = 16
    search: int = 40
    damping: float = 0.005
    diagonal_damping: float = 0.005
    output_damping: float = 0.1
    outputs: Outputs = Outputs.FULL

    name: ClassVar[str] = "slab"
    paper: ClassVar[str] = "arXiv:2604.04493"
    version: ClassVar[int] = 2
    signs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps)
        at_least(0, refit=self.refit, conjugate=self.conjugate, search=self.search)
        at_least(0, damping=self.damping, diagonal_damping=self.diagonal_damping, output_damping=self.output_damping)

    def prepare(self, weight: Tensor, metric: Metric) -> Sweepable:
        damping = Damping(self.damping, self.diagonal_damping, self.output_damping)
        return Sweepable.of(UnitDiagonal.read(weight, metric, damping, self.outputs))

    def solve(self, state: Sweepable, target: Target, start: Decomposition | None = None) -> Solution:
        unit = state.unit
        layer, W = unit.layer, unit.W
        layer.check(target, self)
        if target.nnz == W.numel():
            everything = layer.kept(torch.ones_like(W, dtype=torch.bool))
            return layer.solution(replace(everything, signs=torch.ones_like(W)), target, start)

        def squared(residual: Tensor) -> float:
            return float((unit.norm.times(residual) * residual).sum(dtype=torch.float64))

        def error(fit: SparseAndSigns) -> float:
            return squared(W - fit.S - fit.plane.dense())

        def keep(magnitudes: Tensor) -> Tensor:
            return keep_weights(magnitudes, target.nnz, target.pattern, self.per_row)

        trace = [(0, squared(W))]

        def noted(reached: float) -> float:
            trace.append((len(trace), reached))
            return reached

        best = alternate(W, keep, target.rank, self.steps, lambda residual: noted(squared(residual)))
        taken, settled = 0, self.refit == 0
        while taken < self.refit and not settled:
            taken += 1
            swept = self._swept(state, best.plane, target)
            settled = noted(error(swept)) >= error(best)
            best = best if settled else swept
        if self.search and target.nnz:
            taken += self.search
            best = min(best, self._searched(unit, best, target), key=error)
        value = replace(unit.restored(best.S, best.plane.U, best.plane.V), signs=best.plane.B)
        return layer.solution(
            value,
            target,
            start,
            asked=self.damping,
            damping=state.damping,
            steps=self.steps + taken,
            settled=settled,
            trace=tuple(trace),
        )

    def _swept(self, state: Sweepable, plane: SignPlane, target: Target) -> SparseAndSigns:
        """Choose `S` and the signs by a sweep at the magnitudes of `plane`, then refit the values, then the factors."""
        W, norm = state.unit.W, state.unit.norm
        S, plane = sign_sweep(W, state.R, plane, target.nnz, target.pattern)
        S = fit_support(W - plane.dense(), S, norm, self.conjugate)
        return SparseAndSigns(S, fit_factors(W - S, plane, norm))

    def _searched(self, unit: UnitDiagonal, fit: SparseAndSigns, target: Target) -> SparseAndSigns:
        """Search `S` by ADMM on the residual of the plane, from the support of `fit`, then refit the factors."""
        residual = unit.W - fit.plane.dense()
        S = prune(AdmmSearch(self.search, begun=BEGUN), residual, unit.norm, target.nnz, target.pattern, fit.S)
        return SparseAndSigns(S, fit_factors(unit.W - S, fit.plane, unit.norm))
