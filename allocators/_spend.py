"""Spend the rest of the budget that a grid of options leaves, to less than one unit of the free axis."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import replace

from globalopt.values.budget import Target
from globalopt.values.problem import ErrorSurface, Problem


def spend(problem: Problem, targets: Mapping[str, Target]) -> dict[str, Target]:
    """Spend the rest of the budget in nonzeros (in rank where only that is free), where it lowers the error fastest.

    Each step goes at most to the next option of the same layer, so the predicted error stays an interpolation
    between neighbouring options; the largest gain per unit of cost is taken first. Targets that exceed the budget are
    returned as they are: `Problem.finish` refuses them.

    Args:
        problem: surfaces, budget, pattern, limits.
        targets: one per layer.
    """
    axis = problem.axis
    chosen = dict(targets)
    slack = problem.budget.limit - problem.used(chosen)
    surfaces = {surface.spec.name: surface for surface in problem.surfaces}
    queue: list[tuple[float, str, Target]] = []

    def offer(name: str) -> None:
        surface = surfaces[name]
        step = _step(surface, chosen[name], axis)
        if step is not None:
            cost = problem.budget.cost(step, surface.spec) - problem.budget.cost(chosen[name], surface.spec)
            gain = surface.predict(chosen[name]) - surface.predict(step)
            heapq.heappush(queue, (-gain / max(cost, 1), name, step))

    for name in chosen:
        offer(name)
    while slack > 0 and queue:
        _, name, step = heapq.heappop(queue)
        spec = surfaces[name].spec
        before = problem.budget.cost(chosen[name], spec)
        reached = problem.grow(chosen[name], spec, axis, getattr(step, axis), before + slack)
        slack -= problem.budget.cost(reached, spec) - before
        moved = reached != chosen[name]
        chosen[name] = reached
        if moved and reached == step:
            offer(name)
    return chosen


def _step(surface: ErrorSurface, target: Target, axis: str) -> Target | None:
    """Return the layer's next larger option along its free axis, or None at the end; a dense layer cannot grow."""
    here = getattr(target, axis)
    others = {getattr(t, axis) for t in surface.targets if axis == "rank" or t.rank == target.rank}
    if axis == "nnz" and len(others) < 2:
        # The rank is between two options: any count up to the dense layer's cost will do.
        others = {t.nnz for t in surface.targets}
    larger = [v for v in others if v > here]
    if not larger:
        return None
    step = replace(target, **{axis: min(larger)})
    return step if step.params(surface.spec) <= surface.spec.numel else None
