"""The multiple-choice knapsack: the allocation of least predicted loss, with a proved bound."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from allocators._core import solve_core
from allocators._spend import spend_sizes
from globalopt.protocols import Objective, Reads
from globalopt.registry import at_least
from globalopt.values.option_table import OptionTable
from globalopt.values.problem import Allocation, Problem
from globalopt.values.sizes import Sizes


@dataclass(frozen=True)
class Knapsack:
    """Minimise the sum of predicted errors over one option per layer, within the budget.

        min sum_l sum_c error_l(c) x_lc   s.t.  sum_c x_lc = 1,  sum_lc cost_l(c) x_lc <= limit,  x binary

    First comes the Lagrangian relaxation: `c_l(price) = argmin error + price * cost` at the price that meets the
    budget (Sinha and Zoltners 1979). Its dual value `sum_l min_c (error + price cost) - price limit` bounds from below
    every choice of options, and of targets between options. Then HiGHS solves the core (`allocators._core`): all
    options that can still be in a better allocation, and the nonzeros between two of them (under a pattern the ranks).
    That mostly closes the gap from both sides, and the bound then holds for these choices. In both allocations the rest
    of the budget is spent; the better one is returned.

    Args:
        exact: solve the core after the relaxation.
        gap: relative optimality gap at which HiGHS stops.
        nodes: most branch-and-bound nodes (a limit in time would not be reproducible).

    >>> from allocators.example import example_problem
    >>> problem = example_problem(kept=0.5)
    >>> found = Knapsack().allocate(problem)
    >>> [(target.rank, target.nnz) for target in found.targets.values()]
    [(0, 16), (0, 80), (0, 64), (0, 32)]
    >>> round(found.predicted, 4), found.gap < 1e-6, found.used <= problem.budget.limit
    (0.4781, True, True)
    """

    name: ClassVar[str] = "knapsack"
    paper: ClassVar[str] = "doi:10.1287/opre.27.3.503"
    reads: ClassVar[Reads] = Reads.SURFACES
    version: ClassVar[int] = 1
    exact: bool = True
    gap: float = 1e-6
    nodes: int = 2000

    def __post_init__(self) -> None:
        at_least(0, gap=self.gap)
        at_least(1, nodes=self.nodes)

    def allocate(self, problem: Problem, objective: Objective | None = None) -> Allocation:
        """Return the optimum of the surfaces; the objective is not used."""
        table = problem.table
        relaxed, price, bound = relax(table)
        best = spend_sizes(table, relaxed)
        if self.exact:
            least = table.predicted(best)
            solved, bound = solve_core(table, price, bound, least, self.gap, self.nodes)
            if solved is not None:
                best = min(best, spend_sizes(table, solved), key=table.predicted)
        targets = table.targets(best)
        return problem.finish(targets, by=self.name, bound=min(bound, problem.predicted(targets)))


def relaxed_knapsack(table: OptionTable) -> Sizes:
    """Return the Lagrangian relaxation's allocation, with the rest of the budget spent: the knapsack, but for a gap.

    >>> from allocators.example import example_problem
    >>> problem = example_problem(kept=0.5)
    >>> table = problem.table
    >>> table.targets(relaxed_knapsack(table)) == dict(Knapsack(exact=False).allocate(problem).targets)
    True
    """
    return spend_sizes(table, relax(table)[0])


def relax(table: OptionTable) -> tuple[Sizes, float, float]:
    """Solve the Lagrangian relaxation: a feasible choice, the price of a unit of budget, and the largest dual value.

    The options that are best at some price are the corners of each layer's convex hull. At the optimal price every
    layer has taken the steps between its corners that gain more per unit; so the price is the gain of the first step
    that does not fit, all steps taken from the largest gain down. Equal gains are taken together or not at all: the
    cheaper option on ties.

    >>> from allocators.example import example_problem
    >>> table = example_problem(kept=0.5).table
    >>> sizes, price, bound = relax(table)
    >>> sizes.nnz.tolist(), round(bound, 4), table.predicted(sizes) >= bound
    ([16, 80, 64, 32], 0.4781, True)
    """
    options, slopes = table.hull
    first = np.flatnonzero(np.isinf(slopes))
    cost, error = table.cost[options], table.error[options]
    limit = table.budget.limit
    steps = np.flatnonzero(~np.isinf(slopes))
    steps = steps[np.argsort(-slopes[steps], kind="stable")]
    used = int(cost[first].sum()) + np.cumsum(cost[steps] - cost[steps - 1])
    over = int(np.searchsorted(used, limit, "right"))
    price = float(slopes[steps[over]]) if over < len(steps) else 0.0
    taken = np.bincount(table.layer[options[steps[slopes[steps] > price]]], minlength=len(first))
    at = first + taken
    spent, total = int(cost[at].sum()), math.fsum(error[at].tolist())
    return table.chosen(options[at]), price, total + price * (spent - limit)
