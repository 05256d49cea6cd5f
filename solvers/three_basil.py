"""3BASiL: sparse and low-rank parts fitted jointly by ADMM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

import torch
from torch import Tensor

from globalopt.kernels.ridge_admm import SparseAndSubspace
from globalopt.protocols import Needs, Outputs
from globalopt.registry import at_least
from globalopt.values.budget import Target
from globalopt.values.decomposition import Decomposition, Solution
from globalopt.values.metric import Metric
from solvers._admm import Search
from solvers._unit_diagonal import Damping, UnitDiagonal


class Preset(StrEnum):
    """How long the search for the support takes; the steps are in `STEPS`."""

    FAST = "fast"
    DEFAULT = "default"
    BEST = "best"


STEPS = {Preset.FAST: 80, Preset.DEFAULT: 200, Preset.BEST: 800}

# A target with a solved neighbour takes a share of the steps, though never so few that values are far from settled:
# where inputs are correlated, twenty steps left three times the error of forty. The more of its entries the neighbour
# has, the later it begins in the penalty's rise (by the fourth power: only a near one helps), and the longer it grows:
# the fewer new entries at a time, the better each is chosen. With none of them it would be a cold start.
PATH_STEPS = 0.22
PATH_LEAST = 40
PATH_BEGUN = 0.3
PATH_GROWS = 0.4


@dataclass(frozen=True)
class ThreeBASiL:
    """`min tr(A (W - S - L) G (W - S - L)ᵀ)` by `ridge_admm` (Makni et al. 2025, arXiv:2603.01376).

    Departures: the support starts empty and grows, where the published one starts from the largest entries at full
    count; that is most of the gain in error. `L` has momentum, most of the rest. The penalty follows a fixed rise
    fitted to the layer's spectrum instead of the support's changes. The values are refitted on the support that was
    found, and the error may weight outputs by `A`. Damping is the public repository's. The fits of `solve_path` have
    no trace: they are quick looks.

    Args:
        preset: fast, default or best: how long to search.
        steps: of the search; 0 takes the preset's.
        damping: fraction of the mean of G's diagonal added to it.
        diagonal_damping: fraction of each diagonal entry of G added to it.
        output_damping: fraction of each diagonal entry of A added to it.
        outputs: how much of A counts.
    """

    preset: Preset = Preset.DEFAULT
    steps: int = 0
    damping: float = 0.005
    diagonal_damping: float = 0.005
    output_damping: float = 0.1
    outputs: Outputs = Outputs.FULL

    name: ClassVar[str] = "3basil"
    paper: ClassVar[str] = "arXiv:2603.01376"
    needs: ClassVar[Needs] = Needs.GRAM
    sparse: ClassVar[bool] = True
    low_rank: ClassVar[bool] = True
    patterns: ClassVar[bool] = True
    signs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        at_least(0, damping=self.damping, diagonal_damping=self.diagonal_damping, output_damping=self.output_damping)
        at_least(0, steps=self.steps)

    def prepare(self, weight: Tensor, metric: Metric) -> UnitDiagonal:
        damping = Damping(self.damping, self.diagonal_damping, self.output_damping)
        return UnitDiagonal.read(weight, metric, damping, self.outputs)

    def solve(self, state: UnitDiagonal, target: Target, start: Decomposition | None = None) -> Solution:
        ((solution, _),) = self._fit([state], [target], [start], traced=True)
        return solution

    def solve_site(self, layers: Sequence[tuple[Tensor, Metric, Target]]) -> list[Solution]:
        """Stacked: one set of ridge problems, and the products with them, serves all layers."""
        damping = Damping(self.damping, self.diagonal_damping, self.output_damping)
        states: list[UnitDiagonal] = []
        for weight, metric, _ in layers:
            states.append(UnitDiagonal.read(weight, metric, damping, self.outputs, states[0] if states else None))
        fits = self._fit(states, [target for _, _, target in layers], [None] * len(layers), traced=True)
        return [solution for solution, _ in fits]

    def solve_path(self, state: UnitDiagonal, targets: Sequence[Target]) -> list[Solution]:
        """Upwards: what is there grows to the next target, at a fraction of the steps.

        Every target starts from the largest one before it, of the same pattern, that keeps no more in rank and in
        nonzeros: what an `L` has taken over, a support without it would have to learn anew.
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
        """Solutions, and the fits behind those that had a support to search; a `neighbour` is of the only state."""
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

    def _search(self, neighbour: SparseAndSubspace | None, nnz: int, traced: bool) -> Search:
        cold = Search(self.steps or STEPS[self.preset], traced=traced)
        if neighbour is None:
            return cold
        there = min(1.0, int(torch.count_nonzero(neighbour.S)) / nnz)
        return Search(
            min(cold.steps, max(PATH_LEAST, round(PATH_STEPS * cold.steps))),
            begun=PATH_BEGUN * there**4,
            full=cold.full + PATH_GROWS * there,
        )
