"""The slow obvious twin of the knapsack: dynamic programming over every integer cost."""

from __future__ import annotations

import math

from globalopt.types import Problem


def best_on_grid(problem: Problem) -> float:
    """Least sum of errors over one option per layer within the budget, exact; O(layers * options * limit)."""
    limit = problem.budget.limit
    best = [0.0] * (limit + 1)
    for surface in problem.surfaces:
        options = [
            (problem.budget.cost(t, surface.spec), e) for t, e in zip(surface.targets, surface.error, strict=True)
        ]
        best = [
            min((best[room - cost] + error for cost, error in options if cost <= room), default=math.inf)
            for room in range(limit + 1)
        ]
    return best[limit]
