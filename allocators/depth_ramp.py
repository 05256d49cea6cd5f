"""ATP: the kept fraction falls with depth, by the same step from every block to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from allocators._fractions import blocks, check_rank_share, kept_targets, least_kept
from allocators._trials import Trials
from globalopt.errors import UsageError
from globalopt.protocols import Objective, Reads
from globalopt.values.budget import Target
from globalopt.values.problem import Allocation, Problem

STEEPNESSES = tuple(i / 8 for i in range(9))
"""The ramps that are compared, as shares of the steepest: from the uniform allocation up."""


def depth_ramp(problem: Problem, steepness: float, rank_share: float = 0.1) -> dict[str, Target]:
    """Compute targets that use the whole budget, with a kept fraction that falls with depth.

        kept_b = kept + beta ((B - 1) / 2 - b),   b = 0 .. B-1,   beta = steepness largest_beta(problem)

    Exact where all blocks are equally large; else shifted to the budget and clipped (`kept_targets`).

    Args:
        steepness: in [0, 1]; 0 is the uniform allocation.
        rank_share: part of the parameters of a layer that is in its rank.

    >>> from allocators.example import example_problem
    >>> [target.nnz for target in depth_ramp(example_problem(kept=0.5), steepness=0.5, rank_share=0.0).values()]
    [48, 96, 16, 32]
    """
    depths = blocks(problem)
    beta = steepness * largest_beta(problem)
    kept = {block: problem.budget.kept + beta * ((len(depths) - 1) / 2 - b) for b, block in enumerate(depths)}
    return kept_targets(problem, kept, rank_share)


def largest_beta(problem: Problem) -> float:
    """Compute the step at which the last block keeps the least it can, or the first one everything.

    It is `min(2 (kept - least), 2 (1 - kept)) / (B - 1)`, the bound of ATP (arXiv:2502.14770), where `least` is 0, or
    under an N:M pattern the fraction that its nonzeros cost; 0 for a single block.

    >>> from allocators.example import example_problem
    >>> largest_beta(example_problem(kept=0.25))
    0.5
    """
    steps = len(blocks(problem)) - 1
    kept = problem.budget.kept
    return 2 * min(kept - least_kept(problem), 1 - kept) / steps if steps else 0.0


@dataclass(frozen=True)
class DepthRamp:
    """Keep less with depth, by an arithmetic progression over the blocks (ATP, arXiv:2502.14770).

    The code of ATP tries values of its one parameter beta (nine at 70 % sparsity) and takes the one of least perplexity
    on the test text. Here the objective chooses among nine ramps from flat to the steepest (`STEEPNESSES`), on the
    selection text. Without an objective, or with `tune` off, there is one ramp of the given `steepness`.

    Args:
        tune: choose the steepness by the objective where there is one.
        steepness: otherwise; beta as a share of `largest_beta`, in [0, 1].
        rank_share: part of the parameters of a layer that is in its rank.

    >>> from allocators.example import ExampleObjective, example_problem
    >>> problem = example_problem(kept=0.5)
    >>> found = DepthRamp(rank_share=0.0).allocate(problem, ExampleObjective(problem))
    >>> [target.nnz for target in found.targets.values()]  # the flat ramp has the least loss here
    [32, 64, 32, 64]
    """

    name: ClassVar[str] = "depth-ramp"
    paper: ClassVar[str] = "arXiv:2502.14770"
    reads: ClassVar[Reads] = Reads.SURFACES | Reads.OBJECTIVE
    version: ClassVar[int] = 1
    tune: bool = True
    steepness: float = 0.5
    rank_share: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.steepness <= 1:
            raise UsageError(f"steepness is a share of the largest feasible beta, in [0, 1]; got {self.steepness:g}.")
        check_rank_share(self.rank_share)

    def allocate(self, problem: Problem, objective: Objective | None = None) -> Allocation:
        """Return the ramp of least loss on the selection text, or the given one."""
        if self.tune and objective is not None:
            ramps = [depth_ramp(problem, steepness, self.rank_share) for steepness in STEEPNESSES]
            return problem.finish(Trials(problem, objective, ramps).verdict(), by=self.name)
        return problem.finish(depth_ramp(problem, self.steepness, self.rank_share), by=self.name)
