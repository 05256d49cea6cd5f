"""The uniform allocation: the same kept fraction and the same rank share for every layer; the baseline of a search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from allocators._fractions import blocks, check_rank_share, kept_targets
from globalopt.protocols import Objective, Reads
from globalopt.values.problem import Allocation, Problem


@dataclass(frozen=True)
class Uniform:
    """Keep the same fraction of every layer, a fixed share of it as rank.

    `rank = floor(rank_share * kept * d_out d_in / (d_out + d_in))`, the rest as nonzeros (OATS, arXiv:2409.13652;
    HASSLE-free, arXiv:2502.00899, section on unstructured sparsity). Under an N:M pattern the nonzeros are fixed and
    all the rest is rank. The part of the budget that rounding leaves is spent on the layers that gain most.

    Args:
        rank_share: part of the parameters of a layer that is in its rank.

    >>> from allocators.example import example_problem
    >>> found = Uniform(rank_share=0.0).allocate(example_problem(kept=0.5))
    >>> [target.nnz for target in found.targets.values()]  # of 64, 128, 64 and 128 entries
    [32, 64, 32, 64]
    """

    name: ClassVar[str] = "uniform"
    paper: ClassVar[str] = "arXiv:2409.13652"
    reads: ClassVar[Reads] = Reads.NOTHING
    version: ClassVar[int] = 1
    rank_share: float = 0.1

    def __post_init__(self) -> None:
        check_rank_share(self.rank_share)

    def allocate(self, problem: Problem, objective: Objective | None = None) -> Allocation:
        """Return the uniform allocation; the objective is not used."""
        flat = dict.fromkeys(blocks(problem), problem.budget.kept)
        return problem.finish(kept_targets(problem, flat, self.rank_share), by=self.name)
