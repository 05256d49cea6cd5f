"""One storage for every layer, for allocators that divide a budget over ranks and nonzeros alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from globalopt.errors import BudgetError
from globalopt.values.budget import Target
from globalopt.values.problem import Problem


def in_best_storage(problem: Problem, allocate: Callable[[Problem], dict[str, Target]]) -> dict[str, Target]:
    """Allocate in every storage that all layers have, and return the targets of least predicted loss.

    A storage in which the budget does not reach for the cheapest options is left out.

    Args:
        allocate: divides the budget where every layer has options in one storage.
    Raises:
        BudgetError: the layers have no storage in common that the budget reaches for.

    >>> from allocators.example import example_problem
    >>> from allocators.knapsack import Knapsack
    >>> problem = example_problem(kept=0.5)
    >>> found = in_best_storage(problem, lambda narrow: dict(Knapsack().allocate(narrow).targets))
    >>> found == dict(Knapsack().allocate(problem).targets)
    True
    """
    if not problem.mixed:
        return allocate(problem)
    names = [spec.name for spec in problem.specs]
    found: list[dict[str, Target]] = []
    refused: BudgetError | None = None
    for storage in problem.storages:
        try:
            found.append(allocate(problem.narrowed(dict.fromkeys(names, storage))))
        except BudgetError as cause:
            refused = cause
    if not found:
        raise refused or BudgetError("The layers have no storage in common; give one by --storage.")
    return min(found, key=problem.predicted)


def in_storages_of(problem: Problem, targets: Mapping[str, Target]) -> Problem:
    """Return the problem with the options of every layer in the storage of its target alone."""
    if not problem.mixed:
        return problem
    return problem.narrowed({name: target.storage for name, target in targets.items()})
