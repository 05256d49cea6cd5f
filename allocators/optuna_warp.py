"""Optuna over a warp of the surfaces: a dozen coefficients, and every trial the knapsack of the warped problem."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import ClassVar

from allocators._trials import OutOfTokens, Trials
from allocators._warp import Sampler
from allocators.knapsack import Knapsack
from allocators.owl import Owl
from allocators.uniform import Uniform
from globalopt.protocols import Objective, Reads
from globalopt.registry import at_least
from globalopt.values.problem import Allocation, Problem


@dataclass(frozen=True)
class OptunaWarp:
    """Minimise the loss of the model over the coefficients of a `Warp`; a trial is the knapsack on warped surfaces.

    The first trials are the knapsack itself (`theta = 0`) and the warps that come closest to the uniform allocation
    and, where there are profiles, to the allocation by OWL (`nearest`). A trial is evaluated on growing parts of the
    selection text and pruned where it is worse than the best so far, window by window. Its value is its mean loss; the
    value of a pruned trial is that of the knapsack plus their mean difference on the windows of both, so that all
    values can be compared.

    Every proposal depends on the finished trials, the seed and `worker` alone: a search that was killed and is told the
    same losses again goes on to the answer it would have had. Searches with different `worker` may share a study in a
    file, also at the same time; then the answer depends on which of them was faster.

    Args:
        sampler: proposes the coefficients.
        trials: how many the study holds in the end, those of all workers together.
        spread: the coefficients are in [-spread, spread], in log units.
        worker: makes the proposals of searches that share a study differ.
        study: file of the Optuna journal that holds the study of several workers, made if it is not there; empty for a
            study of this search alone, in memory.

    >>> from allocators.example import ExampleObjective, example_problem
    >>> problem = example_problem(kept=0.5)
    >>> objective = ExampleObjective(problem)
    >>> found = OptunaWarp(trials=10).allocate(problem, objective)
    >>> objective.true(found.targets) < objective.true(Knapsack().allocate(problem).targets)
    True
    """

    name: ClassVar[str] = "optuna"
    paper: ClassVar[str] = "arXiv:1907.10902"
    reads: ClassVar[Reads] = Reads.SURFACES | Reads.OBJECTIVE
    version: ClassVar[int] = 1
    sampler: Sampler = Sampler.TPE
    trials: int = 80
    spread: float = 1.5
    worker: int = 0
    study: str = ""

    def __post_init__(self) -> None:
        at_least(1, trials=self.trials)
        at_least(1e-3, spread=self.spread)
        at_least(0, worker=self.worker)

    def allocate(self, problem: Problem, objective: Objective | None = None) -> Allocation:
        """Return the best of the study, the knapsack, the uniform allocation and OWL on the whole selection text."""
        from allocators._warp_study import WarpStudy

        by = [Knapsack(), Uniform(), *([Owl()] if problem.profiles else [])]
        starts = [allocator.allocate(problem).targets for allocator in by]
        trials = Trials(problem, objective, starts)
        study = WarpStudy(problem, trials, starts, self.sampler, self.trials, self.spread, self.worker, self.study)
        with contextlib.suppress(OutOfTokens):
            study.run()
        for targets in study.improvements():
            trials.nominate(targets)
        return problem.finish(trials.verdict(), by=self.name)
