"""AlphaPruning: keep more of the blocks whose spectra have heavier tails."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from allocators._fractions import blocks, check_rank_share, kept_targets, read_profiles, unit_range
from globalopt.errors import UsageError
from globalopt.protocols import Objective, Reads
from globalopt.values.problem import Allocation, Problem


@dataclass(frozen=True)
class Alpha:
    """Prune less where spectra have heavier tails. The sparsity of block b, the same for all its layers, is

        sparsity_b = eta (1 - epsilon + 2 epsilon (alpha_b - min alpha) / (max alpha - min alpha))

    where `alpha_b` is the mean of its layers' power-law exponents and `eta` makes the mean over parameters the
    model's sparsity (arXiv:2410.10912; per block, the default of its code). A sparsity above 1 drops the block; then a
    common shift makes the budget exact again (`kept_targets`).

    Args:
        epsilon: half the relative difference between the largest and the least sparsity.
        rank_share: part of the parameters of a layer that is in its rank.

    >>> from allocators.example import example_problem
    >>> found = Alpha(rank_share=0.0).allocate(example_problem(kept=0.5))
    >>> [target.nnz for target in found.targets.values()]  # the first block has the smaller exponents
    [41, 83, 24, 44]
    """

    name: ClassVar[str] = "alpha"
    paper: ClassVar[str] = "arXiv:2410.10912"
    reads: ClassVar[Reads] = Reads.PROFILES
    version: ClassVar[int] = 1
    epsilon: float = 0.3
    rank_share: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon <= 1:
            raise UsageError(f"epsilon is a relative difference of sparsities, in [0, 1]; got {self.epsilon:g}.")
        check_rank_share(self.rank_share)

    def allocate(self, problem: Problem, objective: Objective | None = None) -> Allocation:
        """Return the allocation by AlphaPruning; the objective is not used.

        Raises:
            UsageError: the problem has no profiles.
        """
        exponents = read_profiles(problem, lambda profile: profile.alpha, self.name)
        layers = blocks(problem)
        means = {
            block: math.fsum(exponents[spec.name] for spec in specs) / len(specs) for block, specs in layers.items()
        }
        ratios = {block: 1 + self.epsilon * (2 * score - 1) for block, score in unit_range(means).items()}
        total = sum(spec.numel for spec in problem.specs)
        eta = (1 - problem.budget.kept) * total / math.fsum(ratios[spec.block] * spec.numel for spec in problem.specs)
        kept = {block: 1 - eta * ratio for block, ratio in ratios.items()}
        return problem.finish(kept_targets(problem, kept, self.rank_share), by=self.name)
