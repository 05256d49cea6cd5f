"""Exact global allocation on the surfaces: a multiple-choice knapsack with a certificate."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from allocators._spend import spend
from globalopt.protocols import Objective
from globalopt.registry import at_least
from globalopt.types import Allocation, Problem, Target

log = logging.getLogger(__name__)

BISECTIONS = 100


@dataclass(frozen=True)
class Knapsack:
    """Minimise the sum of predicted errors over one option per layer, within the budget.

        min sum_l sum_c error_l(c) x_lc   s.t.  sum_c x_lc = 1,  sum_lc cost_l(c) x_lc <= limit,  x binary

    First by Lagrangian relaxation: `c_l(price) = argmin error + price * cost`, the price bisected to the budget
    (Sinha and Zoltners 1979). Its dual value `sum_l min_c (error + price cost) - price limit` bounds every choice of
    options from below, and every choice between neighbouring ones, so it certifies the answer. Then HiGHS closes the
    integer gap of the grid, in integer costs. Both answers have their slack spent; the better one is returned.

    Args:
        exact: run HiGHS after the relaxation.
        gap: relative optimality gap at which HiGHS stops.
        nodes: most branch-and-bound nodes (a limit in time would not be reproducible).
    """

    name: ClassVar[str] = "knapsack"
    paper: ClassVar[str] = "doi:10.1287/opre.27.3.503"
    asks: ClassVar[bool] = False
    exact: bool = True
    gap: float = 1e-6
    nodes: int = 2000

    def __post_init__(self) -> None:
        at_least(0, gap=self.gap)
        at_least(1, nodes=self.nodes)

    def allocate(self, problem: Problem, objective: Objective | None = None) -> Allocation:
        """Return the best allocation found on the surfaces, with the proved bound; the objective is not asked."""
        table = _Table(problem)
        chosen, bound = table.relax()
        candidates = [table.targets(chosen)]
        if self.exact:
            solved = self._integer(table)
            if solved is not None:
                candidates.append(table.targets(solved))
        filled = [spend(problem, targets) for targets in candidates]
        best = min(filled, key=problem.predicted)
        return problem.finish(best, by=self.name, bound=bound)

    def _integer(self, table: _Table) -> NDArray[np.intp] | None:
        """HiGHS' choice per layer, or None where it found no better feasible one (said in the log)."""
        choose = csr_array((np.ones(table.size), (table.layer, np.arange(table.size))))
        scale = max(float(table.error.max()), 1e-30)
        with _silent():
            result = milp(
                table.error / scale,
                integrality=np.ones(table.size),
                bounds=Bounds(0, 1),
                constraints=[
                    LinearConstraint(choose, 1, 1),
                    # Costs are whole: half a unit of slack admits no other choice, and absorbs HiGHS' tolerance.
                    LinearConstraint(csr_array(table.cost[None, :].astype(float)), -np.inf, table.limit + 0.5),
                ],
                options={"mip_rel_gap": self.gap, "node_limit": self.nodes},
            )
        if result.x is None:
            log.warning("HiGHS found no allocation (%s); the Lagrangian one is used.", result.message)
            return None
        chosen = np.array([start + np.argmax(result.x[start:end]) for start, end in table.ranges], dtype=np.intp)
        if table.cost[chosen].sum() > table.limit:
            log.warning("HiGHS' allocation exceeds the budget by rounding; the Lagrangian one is used.")
            return None
        return chosen


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep what HiGHS writes past Python to the standard output, whatever its options say, out of ours."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


class _Table:
    """The undominated options of all layers, flattened: `cost`, `error`, `layer` of each, in layer order."""

    def __init__(self, problem: Problem) -> None:
        frontiers = [surface.frontier(problem.budget) for surface in problem.surfaces]
        self.names = [surface.spec.name for surface in problem.surfaces]
        self.limit = problem.budget.limit
        self.options = [target for frontier in frontiers for target, _, _ in frontier]
        self.cost = np.array([cost for frontier in frontiers for _, cost, _ in frontier], dtype=np.int64)
        self.error = np.array([error for frontier in frontiers for _, _, error in frontier])
        sizes = [len(frontier) for frontier in frontiers]
        ends = np.cumsum(sizes, dtype=np.intp)
        self.ranges = [(int(end - size), int(end)) for size, end in zip(sizes, ends, strict=True)]
        self.layer = np.repeat(np.arange(len(sizes)), sizes)
        self.starts = ends - np.array(sizes, dtype=np.intp)

    @property
    def size(self) -> int:
        return len(self.options)

    def targets(self, chosen: NDArray[np.intp]) -> dict[str, Target]:
        return {name: self.options[i] for name, i in zip(self.names, chosen, strict=True)}

    def relax(self) -> tuple[NDArray[np.intp], float]:
        """Bisect the price of a unit of budget: (feasible choice, best dual bound)."""
        chosen = self._at(0.0)
        if self.cost[chosen].sum() <= self.limit:
            return chosen, float(self.error[chosen].sum())
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
        return self._at(high), bound

    def _at(self, price: float) -> NDArray[np.intp]:
        """Per layer the option with the least `error + price * cost`; the cheaper one on ties."""
        value = self.error + price * self.cost
        least = np.minimum.reduceat(value, self.starts)
        hit = np.flatnonzero(value <= np.repeat(least, np.diff([*self.starts, self.size])))
        first = np.searchsorted(hit, self.starts)
        return hit[first]
