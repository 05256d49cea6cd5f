"""The multiple-choice knapsack: the allocation of least predicted loss, with a proved bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from allocators._core import solve_core
from allocators._spend import spend
from globalopt.protocols import Objective, Reads
from globalopt.registry import at_least
from globalopt.values.budget import Target
from globalopt.values.problem import Allocation, Problem

BISECTIONS = 100


@dataclass(frozen=True)
class Knapsack:
    """Minimise the sum of predicted errors over one option per layer, within the budget.

        min sum_l sum_c error_l(c) x_lc   s.t.  sum_c x_lc = 1,  sum_lc cost_l(c) x_lc <= limit,  x binary

    First comes the Lagrangian relaxation: `c_l(price) = argmin error + price * cost`, the price bisected to the budget
    (Sinha and Zoltners 1979). Its dual value `sum_l min_c (error + price cost) - price limit` bounds from below every
    choice of options, and of targets between options. Then HiGHS solves the core (`allocators._core`): all options that
    can still be in a better allocation, and the nonzeros between two of them (under a pattern the ranks). That mostly
    closes the gap from both sides, and the bound then holds for these choices. In both allocations the rest of the
    budget is spent; the better one is returned.

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
        """Return the best allocation found on the surfaces, with the proved bound; the objective is not used."""
        table = _Table(problem)
        chosen, price, bound = table.relax()
        best = spend(problem, table.targets(chosen))
        if self.exact:
            solved, bound = solve_core(problem, price, bound, problem.predicted(best), self.gap, self.nodes)
            if solved is not None:
                best = min(best, spend(problem, solved), key=problem.predicted)
        return problem.finish(best, by=self.name, bound=min(bound, problem.predicted(best)))


class _Table:
    """Describe the undominated options of all layers, flattened: `cost`, `error`, `layer` of each, in layer order."""

    def __init__(self, problem: Problem) -> None:
        frontiers = [surface.frontier(problem.budget) for surface in problem.surfaces]
        self.names = [surface.spec.name for surface in problem.surfaces]
        self.limit = problem.budget.limit
        self.options = [target for frontier in frontiers for target, _, _ in frontier]
        self.cost = np.array([cost for frontier in frontiers for _, cost, _ in frontier], dtype=np.int64)
        self.error = np.array([error for frontier in frontiers for _, _, error in frontier])
        sizes = [len(frontier) for frontier in frontiers]
        ends = np.cumsum(sizes, dtype=np.intp)
        self.starts = ends - np.array(sizes, dtype=np.intp)

    @property
    def size(self) -> int:
        return len(self.options)

    def targets(self, chosen: NDArray[np.intp]) -> dict[str, Target]:
        return {name: self.options[i] for name, i in zip(self.names, chosen, strict=True)}

    def relax(self) -> tuple[NDArray[np.intp], float, float]:
        """Bisect the price of a unit of budget: (feasible choice, price, best dual bound)."""
        chosen = self._at(0.0)
        if self.cost[chosen].sum() <= self.limit:
            return chosen, 0.0, float(self.error[chosen].sum())
        low = 0.0
        high = float(self.error.max()) + 1e-30
        bound = 0.0
        # At this price one unit outweighs any error, so every layer takes its cheapest option, which fits.
        for _ in range(BISECTIONS):
            price = (low + high) / 2
            at = self._at(price)
            used = int(self.cost[at].sum())
            bound = max(bound, float(self.error[at].sum() + price * (used - self.limit)))
            if used <= self.limit:
                high = price
            else:
                low = price
        return self._at(high), high, bound

    def _at(self, price: float) -> NDArray[np.intp]:
        """Per layer the option with the least `error + price * cost`; the cheaper one on ties."""
        value = self.error + price * self.cost
        least = np.minimum.reduceat(value, self.starts)
        hit = np.flatnonzero(value <= np.repeat(least, np.diff([*self.starts, self.size])))
        first = np.searchsorted(hit, self.starts)
        return hit[first]
