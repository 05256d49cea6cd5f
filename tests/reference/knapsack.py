"""The slow obvious twins of the knapsack: dynamic programming over every integer cost."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from globalopt.values.budget import Target
from globalopt.values.problem import Problem
from globalopt.values.surface import ErrorSurface


def best_on_grid(problem: Problem) -> float:
    """Least sum of errors over one option per layer within the budget."""
    return _best(problem, [surface.targets for surface in problem.surfaces])


def best_in_between(problem: Problem) -> float:
    """The same with every count of nonzeros between two options of one rank; of ranks, where only they are free."""
    return _best(problem, [_between(surface, problem.axis) for surface in problem.surfaces])


def _between(surface: ErrorSurface, axis: str) -> Iterable[Target]:
    rows: dict[Target, list[int]] = {}
    for target in surface.targets:
        rows.setdefault(replace(target, **{axis: 0}), []).append(getattr(target, axis))
    return [replace(row, **{axis: n}) for row, counts in rows.items() for n in range(min(counts), max(counts) + 1)]


def _best(problem: Problem, options: list[Iterable[Target]]) -> float:
    """O(layers limit²)."""
    limit = problem.budget.limit
    best = np.zeros(limit + 1)
    for surface, targets in zip(problem.surfaces, options, strict=True):
        least = np.full(limit + 1, math.inf)
        for target in targets:
            cost = problem.budget.cost(target, surface.spec)
            if cost <= limit:
                least[cost] = min(least[cost], surface.predict(target))
        best = np.array([(best[room::-1] + least[: room + 1]).min() for room in range(limit + 1)])
    return float(best[limit])
