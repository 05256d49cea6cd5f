"""A family of budgets, each allocation within the next larger one: the exact knapsack, again and again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from allocators.knapsack import Knapsack
from globalopt.types import Allocation, Budget, ErrorSurface, Problem, Target

NAME = "nested-knapsack"
"""What allocations of a family are signed with."""


def nested(problem: Problem, budgets: Sequence[Budget], knapsack: Knapsack) -> Iterator[Allocation]:
    """Yield an allocation per budget, from the largest to the smallest, each within the one before.

        min sum_l error_l(c_l)   s.t.   sum_l cost_l(c_l) <= limit_i,   c_l within the layer's target at limit_{i-1}

    One target is within another if it has at most its rank and at most its nonzeros, so that the parts a layer keeps
    can be nested; everything is within the dense layer. The bound of each allocation is that of the knapsack at its
    budget without the second condition: the gap to it is the price of nesting and of whole options together.

    Args:
        problem: its surfaces, pattern and seed; its own budget is not read.
        knapsack: solves every point.

    Raises:
        BudgetError: a budget is below the cheapest options, or below those within the allocation before it.
    """
    relaxed = replace(knapsack, exact=False)
    inner = problem
    for budget in sorted(budgets, key=lambda budget: budget.limit, reverse=True):
        at_budget = replace(problem, budget=budget)
        found = knapsack.allocate(replace(inner, budget=budget))
        yield at_budget.finish(found.targets, by=NAME, bound=relaxed.allocate(at_budget).bound)
        surfaces = tuple(options_within(surface, found.targets[surface.spec.name]) for surface in problem.surfaces)
        inner = replace(problem, surfaces=surfaces)


def is_within(target: Target, other: Target, dense: Target) -> bool:
    """Whether a layer that keeps `other` can give up parts to keep `target`; a `dense` layer can for every target."""
    return other == dense or (target.rank <= other.rank and target.nnz <= other.nnz)


def options_within(surface: ErrorSurface, outer: Target) -> ErrorSurface:
    """The options of a layer that are within `outer`, `outer` itself, and where ranks reach its nonzeros.

    The errors of what is added are the surface's, so that nothing between the options changes its price.
    """
    dense = Target.dense(surface.spec)
    if outer == dense:
        return surface
    error = {t: e for t, e in zip(surface.targets, surface.error, strict=True) if is_within(t, outer, dense)}
    # Only a rank with options on both sides of `outer` has a price there: beyond its ends a surface is a constant.
    below = {target.rank for target in error}
    above = {target.rank for target in surface.targets if target.nnz >= outer.nnz}
    for target in (*(replace(outer, rank=rank) for rank in sorted(below & above)), outer):
        error.setdefault(target, surface.predict(target))
    return ErrorSurface(surface.spec, tuple(error), tuple(error.values()))
