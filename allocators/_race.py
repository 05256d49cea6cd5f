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
from allocators._moves import Moves, default_delta
from allocators._trials import Trials, t_statistic
from allocators.knapsack import relaxed_knapsack
from globalopt.values.budget import Target
from globalopt.values.option_table import OptionTable
from globalopt.values.sizes import Sizes

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
        table: its errors guide the moves; those of the problem of `trials` if not given.
    """

    def __init__(
        self, trials: Trials, starts: Sequence[Targets], rng: random.Random, table: OptionTable | None = None
    ) -> None:
        self.trials = trials
        self.rng = rng
        self.table = table or trials.problem.table
        losses = trials.judge(starts)
        best = int(torch.argmin(losses.mean(1)))
        begun = [self.table.sizes(start) for start in starts]
        self.incumbent, self.losses = begun[best], losses[best]
        predicted = self.table.predicted(self.incumbent)
        measured = float(self.losses.mean())
        self.feedback = Feedback(self.table, measured / predicted if min(measured, predicted) > 0 else 1.0)
        self.tests = 0
        self.tried = {start.key for start in begun}

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

    def _propose(self) -> list[Sizes]:
        """Make new candidates: the knapsack on the corrected surfaces, and chains of moves from the incumbent."""
        corrected = self.feedback.corrected()
        moves = Moves(corrected)
        proposals = [relaxed_knapsack(corrected)]
        for _ in range(OFFSPRING):
            moved = self.incumbent
            for _ in range(swaps_of_a_mutation(self.rng)):
                delta = max(1, round(self.rng.choice(STEPS) * default_delta(corrected)))
                moved = moves.guided(moved, delta, self.rng, TEMPERATURE) or moved
            proposals.append(moved)
        new: list[Sizes] = []
        for sizes in proposals:
            if sizes.key not in self.tried:
                self.tried.add(sizes.key)
                new.append(sizes)
        return new

    def _race(self, candidates: Sequence[Sizes]) -> bool:
        """Race `candidates` and tell whether one of them became the incumbent."""
        targets = [self.table.targets(sizes) for sizes in candidates]
        total = len(self.trials.all_chunks)
        known = [torch.empty(0, dtype=torch.float64)] * len(candidates)
        running, seen = list(range(len(candidates))), 0
        for count in sorted({math.ceil(stage * total) for stage in STAGES}):
            if not running:
                return False
            found = self.trials.losses([targets[i] for i in running], range(seen, count))
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
        return any(self._accept(candidates[i], targets[i], known[i]) for i in running)

    def _accept(self, sizes: Sizes, targets: Targets, losses: Tensor) -> bool:
        """Test a candidate on the whole text, and make it the incumbent if it passes."""
        self.tests += 1
        level = ALPHA / (self.tests * (self.tests + 1))
        if -t_statistic(losses - self.losses) < -stdtrit(len(losses) - 1, level):
            return False
        self.incumbent, self.losses, self.tests = sizes, losses, 0
        self.trials.nominate(targets)
        return True
