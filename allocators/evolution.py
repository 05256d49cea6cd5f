"""Evolution on the true loss: EvoPress as published, and one that is guided by the surrogate and races in pairs."""

from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from allocators._evopress import evopress
from allocators._race import Race
from allocators._trials import OutOfTokens, Trials
from allocators.knapsack import Knapsack
from allocators.uniform import Uniform
from globalopt.protocols import Objective
from globalopt.registry import at_least
from globalopt.values.problem import Allocation, Problem


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

    `guided`: from the knapsack or the uniform allocation, by guided moves that race against an incumbent (`Race`).

    A search that was killed asks the same again, which is known.

    Args:
        preset: which of the two.
        generations: at most; it also ends when the tokens do.
        rank_share: of the start of `evopress`, as in `Uniform`; the published method has no low-rank part.
    """

    name: ClassVar[str] = "evolution"
    paper: ClassVar[str] = "arXiv:2410.14649"
    uses_objective: ClassVar[bool] = True
    version: ClassVar[int] = 1
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
                Race(trials, starts, rng).run(self.generations)
        return problem.finish(trials.verdict(), by=self.name)
