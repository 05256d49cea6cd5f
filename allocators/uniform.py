"""The same kept fraction and the same rank share for every layer: what the field does, and every search's baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from allocators._spend import spend
from globalopt.errors import UsageError
from globalopt.protocols import Objective
from globalopt.types import Allocation, ErrorSurface, Problem, Target


@dataclass(frozen=True)
class Uniform:
    """Keep the same fraction of every layer, a fixed share of it as rank.

    `rank = floor(rank_share * kept * d_out d_in / (d_out + d_in))`, the rest as nonzeros (OATS, arXiv:2409.13652;
    HASSLE-free, arXiv:2502.00899, section on unstructured sparsity). Under an N:M pattern the nonzeros are fixed and
    all the rest is rank. What rounding leaves of the budget is spent on the layers that gain most.
    """

    name: ClassVar[str] = "uniform"
    paper: ClassVar[str] = "arXiv:2409.13652"
    asks: ClassVar[bool] = False
    rank_share: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.rank_share <= 1:
            raise UsageError(f"rank_share is a share of the kept parameters, in [0, 1]; got {self.rank_share:g}.")

    def allocate(self, problem: Problem, objective: Objective | None = None) -> Allocation:
        """Return the uniform allocation; the objective is not asked."""
        targets = {surface.spec.name: self.target(problem, surface) for surface in problem.surfaces}
        return problem.finish(spend(problem, targets), by=self.name)

    def target(self, problem: Problem, surface: ErrorSurface) -> Target:
        """The uniform target of one layer, never above its share of the budget nor the ranks its surface offers."""
        budget, spec = problem.budget, surface.spec
        most_rank = max(target.rank for target in surface.targets)
        limit = budget.limit * budget.cost(Target.dense(spec), spec) // budget.total
        per_rank = spec.d_out + spec.d_in
        if budget.limit == budget.total and problem.pattern is None:
            return Target.dense(spec)
        if problem.pattern is not None:
            least = Target(0, problem.pattern.nnz(spec), problem.pattern)
            return budget.grow(least, spec, "rank", most_rank, limit)
        kept = limit / budget.cost(Target.dense(spec), spec)
        rank = min(int(self.rank_share * kept * spec.numel / per_rank), most_rank)
        return budget.grow(Target(rank, 0), spec, "nnz", spec.numel - 1, limit)
