"""Fit sparse and low-rank parts jointly by ADMM (3BASiL)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import ClassVar

import torch
from torch import Tensor

from globalopt.kernels.ridge_admm import SparseAndSubspace
from globalopt.protocols import Outputs, Solver
from globalopt.registry import at_least
from globalopt.values.budget import Target
from globalopt.values.decomposition import Decomposition, Solution
from globalopt.values.metric import Metric
from solvers._admm import AdmmSearch
from solvers._unit_diagonal import Damping, UnitDiagonal


class AdmmPreset(StrEnum):
    """Choose the length of the search for the support: 80, 200 or 800 steps of ADMM.

    >>> STEPS[AdmmPreset("best")]
    800
    """

    FAST = "fast"
    DEFAULT = "default"
    BEST = "best"


STEPS = {AdmmPreset.FAST: 80, AdmmPreset.DEFAULT: 200, AdmmPreset.BEST: 800}

# A target with a solved neighbour takes a share of the steps, though never so few that values are far from settled:
# where inputs are correlated, twenty steps reached three times the error of forty. The more nonzeros the neighbour
# has, the later the search begins in the penalty's rise (by the fourth power: only a near one helps), and the longer
# the support grows: the fewer new entries at a time, the better each is chosen. A neighbour without nonzeros would be
# a cold start.
PATH_STEPS = 0.22
PATH_LEAST = 40
PATH_BEGUN = 0.3
PATH_GROWS = 0.4
PATH_FROM = 0.02  # a rise that begins where a cold one does shares its penalties, and so its inverses (`Side.inverse`)


@dataclass(frozen=True)
class ThreeBASiL(Solver[UnitDiagonal]):
    """Fit the sparse and the low-rank part jointly by ADMM (3BASiL, Makni et al. 2025, arXiv:2603.01376).

        min over S, L   tr(A (W - S - L) G (W - S - L)ᵀ)

    The loop is `ridge_admm`. Departures: the support starts empty and grows, where the published one starts from the
    largest entries at full count; that is most of the gain in error. `L` has momentum, which is most of the rest. The
    penalty follows a fixed rise fitted to the layer's spectrum instead of the support's changes. The values are
    refitted on the support that was found, and the error may weight outputs by `A`. Damping is the public
    repository's. The solutions of `solve_path` serve as probes and have no trace.

    Args:
        preset: length of the search: fast (80 steps of ADMM), default (200) or best (800).
        steps: steps of the search; 0 takes the preset's.
        damping: fraction of the mean of G's diagonal added to it.
        diagonal_damping: fraction of each diagonal entry of G added to it.
        output_damping: fraction of each diagonal entry of A added to it.
        outputs: how much of A weights the error.

    >>> from globalopt import Gram
    >>> weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    >>> metric = Metric(Gram(torch.eye(24), tokens=100))
    >>> solver = ThreeBASiL(AdmmPreset.FAST)
    >>> found = solver.solve(solver.prepare(weight, metric), Target(rank=2, nnz=96))
    >>> found.value.rank, found.value.nnz, found.error < 0.5 * metric.error(weight)
    (2, 96, True)
    """

    preset: AdmmPreset = AdmmPreset.DEFAULT
    steps: int = 0
    damping: float = 0.005
    diagonal_damping: float = 0.005
    output_damping: float = 0.1
    outputs: Outputs = Outputs.FULL

    name: ClassVar[str] = "3basil"
    paper: ClassVar[str] = "arXiv:2603.01376"
    version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        at_least(0, damping=self.damping, diagonal_damping=self.diagonal_damping, output_damping=self.output_damping)
        at_least(0, steps=self.steps)

    def shorter(self) -> ThreeBASiL:
        """Take the preset before this one.

        Errors of fast are 1.00 to 1.08 of those of default without rank, and 1.07 to 1.18 with a share of .3 of rank
        (queries and values of block 15 of SmolLM2-135M, five anchors).
        """
        presets = list(STEPS)
        return self if self.steps else replace(self, preset=presets[max(0, presets.index(self.preset) - 1)])

    def prepare(self, weight: Tensor, metric: Metric) -> UnitDiagonal:
        damping = Damping(self.damping, self.diagonal_damping, self.output_damping)
        return UnitDiagonal.read(weight, metric, damping, self.outputs)

    def solve(self, state: UnitDiagonal, target: Target, start: Decomposition | None = None) -> Solution:
        ((solution, _),) = self._fit([state], [target], [start], traced=True)
        return solution

    def solve_site(self, layers: Sequence[tuple[Tensor, Metric, Target]]) -> list[Solution]:
        """Fit the layers of an input site as one stacked problem, whose ridge systems and products they share."""
        damping = Damping(self.damping, self.diagonal_damping, self.output_damping)
        states: list[UnitDiagonal] = []
        for weight, metric, _ in layers:
            states.append(UnitDiagonal.read(weight, metric, damping, self.outputs, states[0] if states else None))
        fits = self._fit(states, [target for _, _, target in layers], [None] * len(layers), traced=True)
        return [solution for solution, _ in fits]

    def solve_path(self, state: UnitDiagonal, targets: Sequence[Target]) -> list[Solution]:
        """Fit all targets, small ones first; each starts from a smaller solution, at a fraction of the steps.

        Every target starts from the largest one before it, of the same pattern, that keeps no more rank and no more
        nonzeros: from a larger rank, the support would have to take over entries that `L` reproduced.
        """
        found: dict[int, Solution] = {}
        fits: dict[Target, SparseAndSubspace] = {}
        for i in sorted(range(len(targets)), key=lambda i: (targets[i].nnz, targets[i].rank)):
            target = targets[i]
            alike = (other for other in fits if other.pattern == target.pattern)
            below = [other for other in alike if other.nnz <= target.nnz and other.rank <= target.rank]
            nearest = max(below, key=lambda other: other.nnz + other.rank * sum(state.W.shape), default=None)
            ((found[i], fit),) = self._fit([state], [target], [None], nearest and fits[nearest])
            if fit is not None:
                fits[target] = fit
        return [found[i] for i in range(len(targets))]

    def _fit(
        self,
        states: Sequence[UnitDiagonal],
        targets: Sequence[Target],
        starts: Sequence[Decomposition | None],
        neighbour: SparseAndSubspace | None = None,
        traced: bool = False,
    ) -> list[tuple[Solution, SparseAndSubspace | None]]:
        """Solve every target in its state; with each solution comes its fit, or None where no support was searched.

        Args:
            starts: feasible decompositions, or None.
            neighbour: the fit to start from, where there is only one state.
            traced: whether solutions have traces.
        """
        made: dict[int, tuple[Solution, SparseAndSubspace | None]] = {}
        searched: list[int] = []
        for i, (state, target, start) in enumerate(zip(states, targets, starts, strict=True)):
            state.layer.check(target, self)
            simple = state.without_search(target)
            if simple is None:
                searched.append(i)
            else:
                made[i] = state.layer.solution(simple, target, start, asked=self.damping, damping=state.damping), None
        if searched:
            found = self._search(neighbour, sum(targets[i].nnz for i in searched), traced).run(
                [states[i].W for i in searched],
                [states[i].norm for i in searched],
                [targets[i] for i in searched],
                None if neighbour is None else [neighbour],
            )
            for i, fit, trace in zip(searched, found.fits, found.traces, strict=True):
                state, target = states[i], targets[i]
                value, error = state.best_low_rank(fit.S, target.rank)
                solution = state.layer.solution(
                    value,
                    target,
                    starts[i],
                    asked=self.damping,
                    damping=state.damping,
                    steps=found.steps,
                    settled=found.settled,
                    trace=(*trace, (found.taken, error)) if traced else (),
                )
                made[i] = solution, fit
        return [made[i] for i in range(len(states))]

    def _search(self, neighbour: SparseAndSubspace | None, nnz: int, traced: bool) -> AdmmSearch:
        """Set the length of the search for `nnz` nonzeros, shorter where it starts from a `neighbour`."""
        cold = AdmmSearch(self.steps or STEPS[self.preset], traced=traced)
        if neighbour is None:
            return cold
        there = min(1.0, int(torch.count_nonzero(neighbour.S)) / nnz)
        begun = PATH_BEGUN * there**4
        return AdmmSearch(
            min(cold.steps, max(PATH_LEAST, round(PATH_STEPS * cold.steps))),
            begun=begun if begun >= PATH_FROM else 0.0,
            full=cold.full + PATH_GROWS * there,
        )
