"""Evolution on the loss of the model: EvoPress as published, and a search that is guided by the surfaces."""

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
from globalopt.protocols import Objective, Reads
from globalopt.registry import at_least
from globalopt.values.problem import Allocation, Problem


class Preset(StrEnum):
    """Describe the search: EvoPress as published, or guided moves.

    >>> Preset("guided")
    <Preset.GUIDED: 'guided'>
    """

    EVOPRESS = "evopress"
    GUIDED = "guided"


@dataclass(frozen=True)
class Evolution:
    """Minimise the loss of the model by mutations of an allocation that keep the budget.

    `evopress`: from the uniform allocation, generations of 64 that swap levels between random layers, 64 to 8 to 2 to 1
    on 2048, 16384 and 65536 tokens of random chunks, the parent in the last stage (arXiv:2410.14649). Departures: there
    may be a rank beside `S`, and the chunks are whole and no more than there are.

    `guided`: from the knapsack or the uniform allocation, by guided moves that race against an incumbent (`Race`).

    A search that was killed evaluates the same candidates again, whose losses are known.

    Args:
        preset: evopress or guided.
        generations: at most; the search also ends with the tokens.
        rank_share: of the start of `evopress`, as in `Uniform`; the published method has no low-rank part.

    >>> from allocators.example import ExampleObjective, example_problem
    >>> problem = example_problem(kept=0.5)
    >>> objective = ExampleObjective(problem, limit=20_000)
    >>> found = Evolution().allocate(problem, objective)
    >>> objective.true(found.targets) < 0.9 * objective.true(Knapsack().allocate(problem).targets)
    True
    """

    name: ClassVar[str] = "evolution"
    paper: ClassVar[str] = "arXiv:2410.14649"
    reads: ClassVar[Reads] = Reads.SURFACES | Reads.OBJECTIVE
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
