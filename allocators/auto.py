"""The default search: a portfolio, surfaces calibrated by evaluated losses, local moves; within a token limit."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from allocators._calibration import Calibration
from allocators._race import Race
from allocators._trials import OutOfTokens, Trials, present, t_statistic
from allocators.alpha import Alpha
from allocators.depth_ramp import depth_ramp
from allocators.knapsack import Knapsack, relaxed_knapsack
from allocators.owl import Owl
from allocators.uniform import Uniform
from globalopt.protocols import Objective, Reads
from globalopt.registry import at_least
from globalopt.values.budget import Target
from globalopt.values.option_table import OptionTable
from globalopt.values.problem import Allocation, Problem

Targets = Mapping[str, Target]

RANK_SHARES = (0.0, 0.1)
RAMPS = (0.25, 0.5)
"""Rank shares of the uniform allocations in the portfolio, and steepnesses of its depth ramps."""

PROBE = 4
"""One in so many chunks is used to evaluate the starts, and the disturbed knapsacks."""

DECISIVE = 4.0
"""Standard errors by which a start must be worse than the best one on these chunks to be dropped."""

GENERATIONS = 400
"""Most generations of the last stage, which ends with the tokens or when nothing improves any more."""

GAIN = 0.02
"""Relative gain in the loss below which a round of calibration is the last, and its knapsacks are not taken. A gain of
less is within what candidates differ from refined layers: on the bundled model at a half, one of .8 % ended 14 % worse.
If the first round gains less, the surfaces rank allocations as the model does, and local moves are not tried."""

STEPS = (0.5, 1.0)
"""Shares of the calibration's log multipliers that proposals are made with."""


@dataclass(frozen=True)
class Auto:
    """Minimise the loss of the model by a portfolio, calibrated knapsacks and guided local search.

    1. The one-shot allocations (uniform, OWL, AlphaPruning, depth ramps, knapsack) are evaluated on a part of the
       selection text; those that are not decisively worse than the best are starts.
    2. Rounds: knapsacks on randomly disturbed surfaces are evaluated on that part; each is a sample of all layers at
       once. A `Calibration` is fitted to all losses so far, and the knapsacks on the surfaces it corrects, at two
       lengths of the step, are evaluated on the whole text. The next round is around the corrected surfaces.
    3. A `Race` of guided moves on the corrected surfaces spends the tokens that remain, from the best so far.

    Rounds end when one gains little, and where even the first gained little the race is left out: the surfaces rank
    allocations as the model does, and more tokens find nothing.

    On the whole selection text the allocation is never worse than the best start. Its bound is that of the knapsack, on
    the surfaces before any correction.

    Args:
        rounds: of calibration.
        designs: disturbed knapsacks in each round.
        spread: standard deviation of a disturbance's log multipliers, of every kind and of every layer.
        local: whether there is a third stage.

    >>> from allocators.example import ExampleObjective, example_problem
    >>> problem = example_problem(kept=0.5)
    >>> objective = ExampleObjective(problem)
    >>> found = Auto(rounds=1, designs=4).allocate(problem, objective)
    >>> objective.true(found.targets) < 0.9 * objective.true(Knapsack().allocate(problem).targets)
    True
    """

    name: ClassVar[str] = "auto"
    paper: ClassVar[str] = ""
    reads: ClassVar[Reads] = Reads.SURFACES | Reads.OBJECTIVE
    version: ClassVar[int] = 3
    rounds: int = 3
    designs: int = 16
    spread: float = 0.3
    local: bool = True

    def __post_init__(self) -> None:
        at_least(0, rounds=self.rounds, spread=self.spread)
        at_least(1, designs=self.designs)

    def allocate(self, problem: Problem, objective: Objective | None = None) -> Allocation:
        """Return the best allocation found; `UsageError` without an objective."""
        knapsack = Knapsack().allocate(problem)
        rng = random.Random(problem.seed)
        chunks = range(present(objective).chunks)
        part = sorted(rng.sample(chunks, max(1, len(chunks) // PROBE)))
        starts = _undecided(present(objective), portfolio(problem, knapsack.targets), part)
        trials = Trials(problem, objective, starts)
        with contextlib.suppress(OutOfTokens):
            corrected, gained = self._calibrated(trials, starts, part, rng)
            if self.local and gained:
                Race(trials, [trials.verdict()], rng, corrected).run(GENERATIONS)
        return problem.finish(trials.verdict(), by=self.name, bound=knapsack.bound)

    def _calibrated(
        self, trials: Trials, starts: Sequence[Targets], part: Sequence[int], rng: random.Random
    ) -> tuple[OptionTable, bool]:
        """Calibrate the surfaces by evaluated losses, and nominate its knapsacks.

        Returns:
            the table with calibrated surfaces, and whether a knapsack on them was better than the starts.
        """
        table = corrected = trials.problem.table
        least = float(trials.losses([trials.verdict()], trials.all_chunks).mean())
        gained = False
        measured = [(table.sizes(start), start) for start in starts]
        for _ in range(self.rounds):
            designs = [relaxed_knapsack(_disturbed(corrected, self.spread, rng)) for _ in range(self.designs)]
            measured += [(sizes, table.targets(sizes)) for sizes in designs]
            losses = trials.losses([targets for _, targets in measured], part).mean(1).tolist()
            told = [(sizes, loss) for (sizes, _), loss in zip(measured, losses, strict=True)]
            calibration = Calibration.fit(table, told)
            solved = [relaxed_knapsack(calibration.apply(table, share)) for share in STEPS]
            proposals = [(sizes, table.targets(sizes)) for sizes in solved]
            found = float(trials.losses([targets for _, targets in proposals], trials.all_chunks).mean(1).min())
            measured += proposals
            corrected = calibration.apply(table)
            if found > (1 - GAIN) * least:
                break
            for _, proposal in proposals:
                trials.nominate(proposal)
            least, gained = found, True
        return corrected, gained


def portfolio(problem: Problem, knapsack: Targets) -> list[Targets]:
    """Make the one-shot allocations, the `knapsack` first; the heuristics only where the layers have profiles.

    >>> from allocators.example import example_problem
    >>> problem = example_problem()
    >>> len(portfolio(problem, Knapsack().allocate(problem).targets))
    7
    """
    made = [knapsack, *(Uniform(share).allocate(problem).targets for share in RANK_SHARES)]
    made += [depth_ramp(problem, steepness) for steepness in RAMPS]
    if problem.profiles:
        made += [heuristic.allocate(problem).targets for heuristic in (Owl(), Alpha())]
    return made


def _undecided(objective: Objective, candidates: Sequence[Targets], part: Sequence[int]) -> list[Targets]:
    """Return the candidates that the windows of `part` do not tell apart from the best of them."""
    losses = objective.losses(candidates, part)
    best = losses[int(torch.argmin(losses.mean(1)))]
    return [c for c, own in zip(candidates, losses, strict=True) if t_statistic(own - best) < DECISIVE]


def _disturbed(table: OptionTable, spread: float, rng: random.Random) -> OptionTable:
    """Return the table with the errors of every layer times `exp(spread (x_kind + x_layer))`, `x` standard normal."""
    kinds = {kind: rng.gauss(0, spread) for kind in sorted({spec.kind for spec in table.specs})}
    return table.scaled(np.exp([kinds[spec.kind] + rng.gauss(0, spread) for spec in table.specs]))
