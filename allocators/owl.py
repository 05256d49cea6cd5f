"""OWL: blocks with more outliers among their weights keep more."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from allocators._fractions import blocks, check_rank_share, kept_targets, read_profiles, unit_range
from globalopt.errors import UsageError
from globalopt.protocols import Objective
from globalopt.registry import at_least
from globalopt.values.problem import OUTLIER_THRESHOLDS, Allocation, Problem


@dataclass(frozen=True)
class Owl:
    """Keep more of blocks with more outliers: of block b, alike in all its layers,

        kept_b = 2 spread (D_b - min D) / (max D - min D) + shift

    where `D_b` is the share of the block's entries with `|w_ij| ||x_j||` above `threshold` times the block's mean
    (arXiv:2310.05175). The published shift makes the plain mean over blocks right; here it makes the budget
    exact, whatever the blocks' sizes (`kept_targets`).

    Args:
        threshold: M of the paper; 3, 5, 7 or 10.
        spread: lambda of the paper, half the difference between the most and the least kept fraction.
        rank_share: share of what a layer keeps that is rank.
    """

    name: ClassVar[str] = "owl"
    paper: ClassVar[str] = "arXiv:2310.05175"
    uses_objective: ClassVar[bool] = False
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
        """Return OWL's allocation; the objective is not asked.

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
