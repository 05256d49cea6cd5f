"""Policy gradients over Bernoulli variables: CAP as published, and a form with exact budgets and control variate."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

import torch
from torch import Tensor

from allocators import cap
from allocators._groups import Groups
from allocators._policy import Control, Draws, Policy, gradient_samples, step_within
from allocators._spend import spend
from allocators._storages import in_storages_of
from allocators._trials import FINALISTS, OutOfTokens, Trials
from allocators.knapsack import Knapsack
from allocators.uniform import Uniform
from globalopt.errors import UsageError
from globalopt.protocols import Objective, Reads
from globalopt.registry import at_least
from globalopt.values.problem import Allocation, Problem

NO_LIMITS = 512
"""Samples per update of which only the predicted error is computed, for the gradient of its expectation."""

COOLING = 20
"""The trust region of update t is `trust / (1 + t / COOLING)`."""


class Preset(StrEnum):
    """Describe the form of the policy gradient; `UPDATES` and `SAMPLES` give its options where they are 0.

    >>> UPDATES[Preset("cap")]
    3
    """

    CAP = "cap"
    DEFAULT = "default"


class Baseline(StrEnum):
    """Describe the baseline of a sample's loss: the mean of the five latest before its update, or of the others in it.

    >>> Baseline("leave-one-out") is Baseline.LEAVE_ONE_OUT
    True
    """

    MOVING_AVERAGE = "moving-average"
    LEAVE_ONE_OUT = "leave-one-out"


UPDATES = {Preset.CAP: 3, Preset.DEFAULT: 200}
SAMPLES = {Preset.CAP: 1, Preset.DEFAULT: 8}


@dataclass(frozen=True)
class Bernoulli:
    """Minimise `E[loss]` over random choices of the kept parts by policy gradient, and return one choice.

    `default`: the parts are groups of equal cost, of which an exact number is kept (`Groups`); their conditional
    Bernoulli distribution (`Policy`) starts around the knapsack allocation. An update evaluates all its samples on the
    same random chunks and takes the leave-one-out gradient of `f - alpha J`, with f the loss, J the predicted error and
    alpha the slope of f on J in all earlier samples, plus alpha times the gradient of `E[J]`; the step is the natural
    gradient's, as long as the trust region allows. The best samples of the last updates and the most probable choices
    along the way are compared with the knapsack and the uniform allocation on the whole selection text. Its time and
    memory grow with groups times kept groups, and a layer has one or two groups at least: with thousands of layers it
    is slow, and another allocator should be taken.

    `cap`: arXiv:2505.03801 on the components of the spans, three iterations on the whole selection text; the result is
    rounded and not compared with any other. Choices that the paper leaves open: the projection is Euclidean; the start
    is in proportion to root energies per parameter, so that directions and entries are ranked by their energy per cost
    (`Components`); there is one mask per iteration; the baseline is the mean of five losses. Departures: the spans
    scale by the activations, unless told otherwise; a layer whose components cost as much as the layer itself stays
    dense; a solver refines the layers at these counts, where the paper keeps the components as they are.

    Args:
        preset: cap or default.
        updates: of the policy, the first of default without a step; 0 takes the preset's. Fewer where the tokens end.
        samples: per update; 0 takes the preset's.
        chunks: of the selection text per update; 0 takes the preset's: all with cap, one with default.
        learning_rate: of the probabilities; for cap alone.
        groups: the approximate number of groups; this and the following are for default alone.
        spread: standard deviation of the kept part of a layer at the start, as a fraction of the layer.
        trust: divergence KL(new || old) of the first update, in nats.
        baseline: leave-one-out or moving-average.
        control_variate: whether the predicted error is used as one.
        natural: whether the gradient is divided by the Fisher information.

    >>> from allocators.example import ExampleObjective, example_problem
    >>> problem = example_problem(kept=0.5)
    >>> objective = ExampleObjective(problem)
    >>> found = Bernoulli(groups=60, spread=0.2, updates=30).allocate(problem, objective)
    >>> objective.true(found.targets) < 0.9 * objective.true(Knapsack().allocate(problem).targets)
    True
    """

    name: ClassVar[str] = "bernoulli"
    paper: ClassVar[str] = "arXiv:2505.03801"
    reads: ClassVar[Reads] = Reads.SURFACES | Reads.OBJECTIVE | Reads.SPANS
    version: ClassVar[int] = 1
    preset: Preset = Preset.DEFAULT
    updates: int = 0
    samples: int = 0
    chunks: int = 0
    learning_rate: float = 0.05
    groups: int = 3000
    spread: float = 0.005
    trust: float = 2.0
    baseline: Baseline = Baseline.LEAVE_ONE_OUT
    control_variate: bool = True
    natural: bool = True

    def __post_init__(self) -> None:
        at_least(0, updates=self.updates, samples=self.samples, chunks=self.chunks, learning_rate=self.learning_rate)
        at_least(1, groups=self.groups)
        at_least(1e-6, spread=self.spread, trust=self.trust)
        if self.samples == 1 and self.preset is Preset.DEFAULT:
            raise UsageError("Samples of an update are compared with each other; option samples must be at least 2.")

    def allocate(self, problem: Problem, objective: Objective | None = None) -> Allocation:
        """Return the allocation of cap, or of default the best choice on the whole selection text."""
        updates, samples = self.updates or UPDATES[self.preset], self.samples or SAMPLES[self.preset]
        starts = [Uniform().allocate(problem).targets]
        if self.preset is Preset.CAP:
            problem = in_storages_of(problem, starts[0])
            trials = Trials(problem, objective, starts)
            chunks = self.chunks or len(trials.all_chunks)
            targets = cap.search(trials, updates, samples, self.learning_rate, chunks)
            return problem.finish(spend(problem, targets), by=self.name)
        starts.insert(0, Knapsack().allocate(problem).targets)
        trials = Trials(problem, objective, starts)
        self._search(trials, Groups(in_storages_of(problem, starts[0]), starts[0], self.groups), updates, samples)
        return problem.finish(trials.verdict(), by=self.name)

    def _search(self, trials: Trials, groups: Groups, updates: int, samples: int) -> None:
        """Follow the gradient, and nominate samples and most probable choices."""
        policy = Policy.around(groups, self.spread)
        if not policy.free:
            return
        generator = torch.Generator().manual_seed(trials.problem.seed)
        history = History()
        best: list[Tensor] = []
        means: list[Tensor] = []
        for update in range(updates):
            draws = policy.draw(samples + NO_LIMITS * self.control_variate, generator)
            chunks = torch.randperm(len(trials.all_chunks), generator=generator)[: self.chunks or 1].tolist()
            drawn = draws.counts[:samples]
            try:
                losses = trials.losses([groups.targets(counts) for counts in drawn], chunks).mean(1)
            except OutOfTokens:
                break
            predicted = groups.predicted(draws.counts)
            control = self._control(draws, predicted, samples, history)
            # Baselines and alpha are fitted to the first samples; a step without them would be noise.
            if update:
                baseline = history.level(control) if self.baseline is Baseline.MOVING_AVERAGE else None
                gradient = gradient_samples(draws.scores[:samples], losses, baseline, control).mean(0)
                divergence = self.trust / (1 + update / COOLING)
                policy = policy.moved(step_within(gradient, draws.variance, self.natural, divergence))
            history.add(losses, predicted[:samples])
            best.append(drawn[int(losses.argmin())])
            means.append(policy.most_probable())
        kept = FINALISTS // 2
        path = [means[-1 - len(means) * i // kept] for i in range(kept)] if means else []
        for counts in [*best[-kept:], *path[::-1]]:
            trials.nominate(spend(trials.problem, groups.targets(counts)))

    def _control(self, draws: Draws, predicted: Tensor, samples: int, history: History) -> Control | None:
        if not self.control_variate:
            return None
        free = gradient_samples(draws.scores[samples:], predicted[samples:]).mean(0)
        return Control(history.alpha, predicted[:samples], free)


class History:
    """Describe the losses f and predictions J of earlier samples, to which baselines and control variates are fitted.

    >>> history = History()
    >>> history.add(losses=torch.tensor([1.0, 2.0, 3.0]), predicted=torch.tensor([0.0, 2.0, 4.0]))
    >>> history.alpha
    0.5
    """

    WINDOW = 5

    def __init__(self) -> None:
        self._latest: deque[tuple[float, float]] = deque(maxlen=self.WINDOW)
        self._covariance = 0.0
        self._variance = 0.0

    def add(self, losses: Tensor, predicted: Tensor) -> None:
        """Add the samples of an update; only differences within it count, since the text changes between updates."""
        self._latest.extend(zip(losses.tolist(), predicted.tolist(), strict=True))
        deviation = predicted - predicted.mean()
        self._covariance += float((losses - losses.mean()) @ deviation)
        self._variance += float(deviation @ deviation)

    @property
    def alpha(self) -> float:
        """Slope of the regression of f on J; 0 before there are samples."""
        return self._covariance / self._variance if self._variance > 0 else 0.0

    def level(self, control: Control | None) -> float:
        """Mean of `f - alpha J` over the latest samples."""
        alpha = control.alpha if control else 0.0
        return sum(f - alpha * J for f, J in self._latest) / len(self._latest)
