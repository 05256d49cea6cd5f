"""OWL: keep more of the blocks that have more outliers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from allocators._fractions import blocks, check_rank_share, kept_targets, read_profiles, unit_range
from globalopt.errors import UsageError
from globalopt.protocols import Objective, Reads
from globalopt.registry import at_least
from globalopt.values.problem import OUTLIER_THRESHOLDS, Allocation, Problem


@dataclass(frozen=True)
class Owl:
    """Keep more of the blocks that have more outliers. The kept fraction of block b, the same for all its layers, is

        kept_b = 2 spread (D_b - min D) / (max D - min D) + shift

    where `D_b` is the share of the block's entries with `|w_ij| ||x_j||` above `threshold` times the block's mean
    (arXiv:2310.05175). The published shift makes the plain mean over blocks right; here it makes the budget exact,
    whatever the sizes of the blocks (`kept_targets`).

    Args:
        threshold: M of the paper; 3, 5, 7 or 10.
        spread: lambda of the paper, half the difference between the most and the least kept fraction.
        rank_share: part of the parameters of a layer that is in its rank.

    >>> from allocators.example import example_problem
    >>> found = Owl(rank_share=0.0).allocate(example_problem(kept=0.5))
    >>> [target.nnz for target in found.targets.values()]  # the second block has more outliers
    [26, 53, 39, 74]
    """

    name: ClassVar[str] = "owl"
    paper: ClassVar[str] = "arXiv:2310.05175"
    reads: ClassVar[Reads] = Reads.PROFILES
    version: ClassVar[int] = 1
    threshold: int = 5
    spread: float = 0.08
    rank_share: float = 0.1

    def __post_init__(self) -> None:
        if self.threshold not in OUTLIER_THRESHOLDS:
            known = ", ".join(map(str, OUTLIER_THRESHOLDS))
            raise UsageError(f"Outliers are counted above a threshold of {known} times the mean; got {self.threshold}.")
        at_least(0, spread=self.spread)
        check_rank_share(self.rank_share)

    def allocate(self, problem: Problem, objective: Objective | None = None) -> Allocation:
        """Return the allocation by OWL; the objective is not used.

        Raises:
            UsageError: the problem has no profiles.
        """
        shares = read_profiles(problem, lambda profile: profile.outliers[self.threshold], self.name)
        outliers = {
            block: math.fsum(shares[spec.name] * spec.numel for spec in specs) / sum(spec.numel for spec in specs)
            for block, specs in blocks(problem).items()
        }
        kept = {block: 2 * self.spread * score for block, score in unit_range(outliers).items()}
        return problem.finish(kept_targets(problem, kept, self.rank_share), by=self.name)
