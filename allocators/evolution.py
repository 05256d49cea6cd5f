"""Evolution on the true loss: EvoPress as published, and one that is guided by the surrogate and races in pairs."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

import torch
from scipy.stats import t as student
from torch import Tensor

from allocators._evopress import evopress, swaps_of_a_mutation
from allocators._feedback import Feedback
from allocators._moves import default_delta, guided
from allocators._trials import OutOfTokens, Trials, t_statistic
from allocators.knapsack import Knapsack
from allocators.uniform import Uniform
from globalopt.protocols import Objective
from globalopt.registry import at_least
from globalopt.types import Allocation, Problem, Target

Targets = dict[str, Target]

OFFSPRING = 16
STAGES = (1 / 8, 1 / 4, 1 / 2, 1.0)
"""Candidates of a generation, and the parts of the selection text they are asked on; half of them leave each stage."""

STEPS = (4.0, 2.0, 1.0, 0.5, 0.25)
"""Sizes of moves, in units of `default_delta`; each is drawn as often."""

TEMPERATURE = 0.5
"""Of the proposals, in units of the mean change of a layer's error."""

ALPHA = 0.05
"""Probability that an incumbent falls to a candidate that is not better."""

PATIENCE = 300
"""Proposals in a row that may fail: with 95 % confidence, fewer than 1 % of the proposals would pass."""


class Preset(StrEnum):
    """EvoPress as published, or the guided search."""

    EVOPRESS = "evopress"
    GUIDED = "guided"


@dataclass(frozen=True)
class Evolution:
    """Search allocations on the true loss by mutations that keep the budget.

    `evopress`: from the uniform allocation, generations of 64 that swap levels between random layers, 64 to 8 to 2 to 1
    on 2048, 16384 and 65536 tokens of random chunks, the parent in the last stage (arXiv:2410.14649). Departures: `S`
    beside a rank, if asked, and the chunks are whole and no more than there are.

    `guided`: from the knapsack or the uniform allocation. A generation is the knapsack on the surfaces as corrected by
    all measured losses so far (`Feedback`), and `OFFSPRING` chains of one to three moves, level swaps or trades of rank
    for nonzeros, drawn by predicted gain or uniformly (`guided`). They race on common chunks against the incumbent,
    window by window; those that are not better, and the worse half, leave each stage. On the whole text the k-th test
    against an incumbent accepts at the level `ALPHA / (k (k + 1))`, which sums to ALPHA. It ends after `PATIENCE`
    failures in a row.

    A search that was killed asks the same again, which is known.

    Args:
        preset: which of the two.
        generations: at most; it also ends when the tokens do.
        rank_share: of the start of `evopress`, as in `Uniform`; the published method has no low-rank part.
    """

    name: ClassVar[str] = "evolution"
    paper: ClassVar[str] = "arXiv:2410.14649"
    asks: ClassVar[bool] = True
    preset: Preset = Preset.GUIDED
    generations: int = 400
    rank_share: float = 0.0

    def __post_init__(self) -> None:
        at_least(1, generations=self.generations)
        Uniform(rank_share=self.rank_share)

    def allocate(self, problem: Problem, objective: Objective | None = None) -> Allocation:
        """Return the best of the starts and the latest incumbents on the whole selection text."""
        rng = random.Random(problem.seed)
        if self.preset is Preset.EVOPRESS:
            start = dict(Uniform(rank_share=self.rank_share).allocate(problem).targets)
            trials = Trials(problem, objective, [start])
            with contextlib.suppress(OutOfTokens):
                evopress(trials, start, self.generations, rng)
        else:
            starts = [dict(allocator.allocate(problem).targets) for allocator in (Knapsack(), Uniform())]
            trials = Trials(problem, objective, starts)
            with contextlib.suppress(OutOfTokens):
                _Race(trials, starts, rng).run(self.generations)
        return problem.finish(trials.verdict(), by=self.name)


class _Race:
    """The guided search: an incumbent with its losses, and what was learnt on the way to it."""

    def __init__(self, trials: Trials, starts: list[Targets], rng: random.Random) -> None:
        self.trials = trials
        self.rng = rng
        losses = trials.objective.losses(starts, trials.all_chunks)
        best = int(torch.argmin(losses.mean(1)))
        self.incumbent, self.losses = starts[best], losses[best]
        predicted = trials.problem.predicted(self.incumbent)
        measured = float(self.losses.mean())
        self.feedback = Feedback(trials.problem, measured / predicted if min(measured, predicted) > 0 else 1.0)
        self.tests = 0
        self.tried = {_key(start) for start in starts}

    def run(self, generations: int) -> None:
        """Race generations until nothing is lost or too many failed; `OutOfTokens` where one cannot be paid."""
        failed = 0
        for _ in range(generations):
            if float(self.losses.max()) <= 0:
                return
            # Proposals that were tried before have failed as well.
            failed = 0 if self._race(self._propose()) else failed + 1 + OFFSPRING
            if failed >= PATIENCE:
                return

    def _propose(self) -> list[Targets]:
        """New candidates: the knapsack on the corrected surfaces, and chains of moves from the incumbent."""
        corrected = self.feedback.corrected()
        proposals = [dict(Knapsack(exact=False).allocate(corrected).targets)]
        for _ in range(OFFSPRING):
            moved: Mapping[str, Target] | None = self.incumbent
            for _ in range(swaps_of_a_mutation(self.rng)):
                delta = max(1, round(self.rng.choice(STEPS) * default_delta(corrected)))
                moved = guided(corrected, moved, delta, self.rng, TEMPERATURE) or moved
            proposals.append(dict(moved))
        new: list[Targets] = []
        for targets in proposals:
            if _key(targets) not in self.tried:
                self.tried.add(_key(targets))
                new.append(targets)
        return new

    def _race(self, candidates: list[Targets]) -> bool:
        """Whether one of `candidates` took the incumbent's place."""
        total = len(self.trials.all_chunks)
        known = [torch.empty(0, dtype=torch.float64)] * len(candidates)
        running, seen = list(range(len(candidates))), 0
        for count in sorted({math.ceil(stage * total) for stage in STAGES}):
            if not running:
                return False
            asked = self.trials.losses([candidates[i] for i in running], range(seen, count))
            seen = count
            for i, losses in zip(running, asked, strict=True):
                known[i] = torch.cat((known[i], losses))
            differences = {i: known[i] - self.losses[: len(known[i])] for i in running}
            better = sorted(
                (i for i in running if differences[i].mean() < 0), key=lambda i: float(differences[i].mean())
            )
            better = better[: math.ceil(len(running) / 2)]
            for i in running:
                if seen == total or i not in better:
                    self.feedback.tell(self.incumbent, candidates[i], differences[i])
            running = better
        return any(self._accept(candidates[i], known[i]) for i in running)

    def _accept(self, targets: Targets, losses: Tensor) -> bool:
        """Test a candidate on the whole text, and make it the incumbent if it passes."""
        self.tests += 1
        level = ALPHA / (self.tests * (self.tests + 1))
        if -t_statistic(losses - self.losses) < student.isf(level, len(losses) - 1):
            return False
        self.incumbent, self.losses, self.tests = targets, losses, 0
        self.trials.nominate(targets)
        return True


def _key(targets: Targets) -> frozenset[tuple[str, Target]]:
    return frozenset(targets.items())
