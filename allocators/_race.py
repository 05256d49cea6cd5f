"""A race on the loss of the model: guided moves, each candidate compared with the incumbent, window by window."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import torch
from scipy.special import stdtrit
from torch import Tensor

from allocators._evopress import swaps_of_a_mutation
from allocators._feedback import Feedback
from allocators._moves import default_delta, guided
from allocators._trials import Trials, t_statistic
from allocators.knapsack import Knapsack
from globalopt.values.budget import Target
from globalopt.values.problem import Problem

Targets = Mapping[str, Target]

OFFSPRING = 16
STAGES = (1 / 8, 1 / 4, 1 / 2, 1.0)
"""Candidates of a generation, and the parts of the text on which they are evaluated; half of them leave each stage."""

STEPS = (4.0, 2.0, 1.0, 0.5, 0.25)
"""Sizes of moves, in units of `default_delta`, drawn uniformly."""

TEMPERATURE = 0.5
"""Of the proposals, in units of the mean change of a layer's error."""

ALPHA = 0.05
"""Probability that an incumbent is replaced by a candidate that is not better."""

PATIENCE = 300
"""Proposals in a row that may fail: with 95 % confidence, fewer than 1 % of the proposals would pass."""


class Race:
    """Describe the guided search: an incumbent with its losses, and the multipliers learnt on the way to it.

    A generation is the knapsack on the surfaces as corrected by all evaluated losses so far (`Feedback`), and chains of
    one to three moves (`OFFSPRING` of them), level swaps or trades of rank for nonzeros, drawn by predicted gain or
    uniformly (`guided`). They race on common chunks against the incumbent; those that are not better, and the worse
    half, leave each stage. On the whole text the k-th test against an incumbent accepts at the level
    `ALPHA / (k (k + 1))`, which sums to ALPHA. An accepted candidate is nominated and becomes the incumbent.

    Args:
        trials: evaluates the losses.
        starts: the incumbent is the best of them.
        problem: its surfaces guide the moves; those of `trials` if not given.
    """

    def __init__(
        self, trials: Trials, starts: Sequence[Targets], rng: random.Random, problem: Problem | None = None
    ) -> None:
        self.trials = trials
        self.rng = rng
        problem = problem or trials.problem
        losses = trials.judge(starts)
        best = int(torch.argmin(losses.mean(1)))
        self.incumbent, self.losses = starts[best], losses[best]
        predicted = problem.predicted(self.incumbent)
        measured = float(self.losses.mean())
        self.feedback = Feedback(problem, measured / predicted if min(measured, predicted) > 0 else 1.0)
        self.tests = 0
        self.tried = {_key(start) for start in starts}

    def run(self, generations: int) -> None:
        """Race until the loss is zero or too many candidates failed; `OutOfTokens` where the tokens do not suffice."""
        failed = 0
        for _ in range(generations):
            if float(self.losses.max()) <= 0:
                return
            # Proposals that were tried before have failed as well.
            failed = 0 if self._race(self._propose()) else failed + 1 + OFFSPRING
            if failed >= PATIENCE:
                return

    def _propose(self) -> list[dict[str, Target]]:
        """Make new candidates: the knapsack on the corrected surfaces, and chains of moves from the incumbent."""
        corrected = self.feedback.corrected()
        proposals = [dict(Knapsack(exact=False).allocate(corrected).targets)]
        for _ in range(OFFSPRING):
            moved: Mapping[str, Target] | None = self.incumbent
            for _ in range(swaps_of_a_mutation(self.rng)):
                delta = max(1, round(self.rng.choice(STEPS) * default_delta(corrected)))
                moved = guided(corrected, moved, delta, self.rng, TEMPERATURE) or moved
            proposals.append(dict(moved))
        new: list[dict[str, Target]] = []
        for targets in proposals:
            if _key(targets) not in self.tried:
                self.tried.add(_key(targets))
                new.append(targets)
        return new

    def _race(self, candidates: Sequence[Targets]) -> bool:
        """Race `candidates` and tell whether one of them became the incumbent."""
        total = len(self.trials.all_chunks)
        known = [torch.empty(0, dtype=torch.float64)] * len(candidates)
        running, seen = list(range(len(candidates))), 0
        for count in sorted({math.ceil(stage * total) for stage in STAGES}):
            if not running:
                return False
            found = self.trials.losses([candidates[i] for i in running], range(seen, count))
            seen = count
            for i, losses in zip(running, found, strict=True):
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
        if -t_statistic(losses - self.losses) < -stdtrit(len(losses) - 1, level):
            return False
        self.incumbent, self.losses, self.tests = targets, losses, 0
        self.trials.nominate(targets)
        return True


def _key(targets: Targets) -> frozenset[tuple[str, Target]]:
    return frozenset(targets.items())
