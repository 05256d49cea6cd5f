"""Correct error surfaces by the model: allocate, attribute the loss of the allocation to its layers, repeat.

A predicted loss knows nothing of what a layer loses beside other compressed layers, nor of a loss that grows otherwise
than the square of the error, and a knapsack finds the layers that are predicted too low. So the model is asked at the
very targets that the knapsack chooses: all layers are replaced at once, one forward and one backward pass give the
share of every layer in the loss (`attribution`), and its surface is multiplied by share over prediction, there and
nearby. Then the knapsack is solved again. The allocation of least measured loss is kept, so that the corrected surfaces
are never worse than those they began from, on the windows asked about.

A step may fall off a cliff: a layer that keeps a little less ruins the model, and then the shares of all others mean
nothing. The few layers with the largest are then replaced alone, and only these are corrected before the next step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np
from torch import Tensor

from globalopt.values.attribution import Attribution
from globalopt.values.budget import Target
from globalopt.values.corrections import NO_CORRECTIONS, Corrections
from globalopt.values.problem import Allocation, Problem

VERSION = 3
"""Raised whenever corrections change."""

ROUNDS = 8
"""Largest number of allocations that the model is asked about."""

WINDOWS = 16
"""Windows of the selection text on which an allocation is measured."""

GAIN = 0.01
"""Relative change of the least loss below which no further round is made."""

PATIENCE = 2
"""Rounds in a row without a lower loss after which no further one is made."""

CLIFF = 3.0
"""Times the least loss so far, or the predicted one, beyond which the shares in a loss say little."""

ALONE = 6
"""Layers of the largest shares that are then replaced alone."""

LEAST = 1e-12
"""Losses below are rounding."""

SPREAD = 0.5
"""Scale of the prior on a layer's log ratio, about that of all layers."""

FREEDOM = 3
"""Degrees of freedom of the prior: so heavy a tail hardly holds back a layer that is far off."""

NOISE = 0.05
"""Relative error of a share beside that of the choice of windows."""


def correct(
    problem: Problem,
    allocate: Callable[[Problem], Allocation],
    attribute: Callable[[Mapping[str, Target]], Attribution],
    alone: Callable[[Mapping[str, Target]], Mapping[str, float]],
    rounds: int = ROUNDS,
    known: Corrections = NO_CORRECTIONS,
) -> Iterator[Corrections]:
    """Correct the surfaces of a problem around the allocation that they lead to.

    Args:
        problem: with the surfaces as predicted.
        allocate: solves a problem by its surfaces alone.
        attribute: measures an allocation on the model.
        alone: measures the losses of the model with one of the layers at a time at its target.
        rounds: most allocations that are measured, at least one.
        known: corrections to begin from, of another budget.
    Yields:
        after every round the best corrections so far; the last is the result.

    >>> import torch
    >>> from allocators import Knapsack
    >>> from allocators.example import example_problem
    >>> problem = example_problem(kept=0.5)
    >>> first = problem.specs[0].name
    >>> def attribute(targets):  # the first layer costs ten times what was predicted
    ...     shares = {s.spec.name: torch.full((4,), s.predict(targets[s.spec.name])) for s in problem.surfaces}
    ...     shares[first] = 10 * shares[first]
    ...     return Attribution(sum(shares.values()), shares)
    >>> def alone(targets):
    ...     return {first: 10 * problem.surfaces[0].predict(targets[first])}
    >>> *_, found = correct(problem, Knapsack().allocate, attribute, alone)
    >>> before, after = (Knapsack().allocate(p).targets[first].nnz for p in (problem, found.apply(problem)))
    >>> before < after, found.losses[0] > min(found.losses)
    (True, True)
    """
    surfaces = {surface.spec.name: surface for surface in problem.surfaces}
    best, tried = known, known
    losses: list[float] = []
    centre, worse = 0.0, 0
    for turn in range(max(1, rounds)):
        targets = allocate(tried.apply(problem)).targets
        found = attribute(targets)
        loss = float(found.losses.mean())
        least = min(losses, default=math.inf)
        losses.append(loss)
        if loss < least:
            best = tried
        yield replace(best, losses=tuple(losses))
        ratios, usual = log_ratios(problem, targets, found.shares)
        cliff = loss > CLIFF * min(least, math.fsum(surfaces[name].predict(targets[name]) for name in targets))
        if cliff and turn + 1 < rounds:
            largest = sorted(ratios, key=ratios.__getitem__, reverse=True)[:ALONE]
            measured = alone({name: targets[name] for name in largest})
            ratios = {
                name: centre + math.log(max(one, LEAST) / max(surfaces[name].predict(targets[name]), LEAST))
                for name, one in measured.items()
            }
        elif not cliff:
            centre = usual
            worse = worse + 1 if loss >= least else 0
            if worse == PATIENCE or (turn and abs(loss - least) <= GAIN * least):
                return
        tried = tried.with_ratios(problem, targets, ratios)


def log_ratios(
    problem: Problem, targets: Mapping[str, Target], shares: Mapping[str, Tensor]
) -> tuple[dict[str, float], float]:
    """Estimate by how much the surfaces of layers are off at `targets`: the logarithms of share over prediction.

    A share is the mean over few windows, so that an estimate is the posterior mode under a prior: Student's t with
    `FREEDOM` degrees of freedom and scale `SPREAD`, about the median of all layers; the mean share over prediction is
    normal, with the standard error of the windows, part of which is in proportion to the share. A layer whose share is
    noise stays with the others, and one that is far off hardly is held back.

    Args:
        shares: by layer name, (windows,).
    Returns:
        the log ratios by layer name, and the median.

    >>> import torch
    >>> from allocators.example import example_problem
    >>> problem = example_problem()
    >>> targets = {spec.name: Target(0, spec.numel // 2) for spec in problem.specs}
    >>> shares = {s.spec.name: torch.full((4,), 2 * s.predict(targets[s.spec.name])) for s in problem.surfaces}
    >>> ratios, usual = log_ratios(problem, targets, shares)
    >>> [round(ratio, 2) for ratio in ratios.values()], round(usual, 2)
    ([0.69, 0.69, 0.69, 0.69], 0.69)
    """
    means, spreads = {}, {}
    for surface in problem.surfaces:
        name = surface.spec.name
        predicted, windows = surface.predict(targets[name]), shares[name].double()
        # A layer that no token of these windows reached stays with the others.
        if predicted > 0 and bool(windows.any()):
            means[name] = float(windows.mean()) / predicted
            spreads[name] = float(windows.std()) / len(windows) ** 0.5 / predicted if len(windows) > 1 else 0.0
    positive = [mean for mean in means.values() if mean > 0]
    centre = math.log(float(np.median(positive))) if positive else 0.0
    usual = float(np.median(list(spreads.values()))) if spreads else 0.0
    grid = np.linspace(centre - 4, centre + 10, 2801)
    prior = (FREEDOM + 1) / 2 * np.log1p(((grid - centre) / SPREAD) ** 2 / FREEDOM)
    levels = np.exp(grid)
    found = dict.fromkeys(targets, centre)
    for name, mean in means.items():
        spread = spreads[name]
        if mean > 0:
            # Most of the noise is the layer's own loss, which differs between windows and grows with it.
            errors = np.maximum(min(spread, usual), min(1.0, max(NOISE, spread / mean)) * levels) + LEAST
        else:
            errors = np.full_like(levels, math.hypot(spread, NOISE * mean) + LEAST)
        found[name] = float(grid[np.argmin(prior + np.log(errors) + ((mean - levels) / errors) ** 2 / 2)])
    return found, centre
