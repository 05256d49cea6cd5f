"""Kept fractions of the blocks, as one-shot heuristics choose them: shifted to the exact budget, made into targets."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from allocators._spend import spend
from globalopt.errors import UsageError
from globalopt.values.budget import Target
from globalopt.values.layer import LayerSpec
from globalopt.values.problem import ErrorSurface, Problem, Profile

BISECTIONS = 64
ROUNDING = 1e-13
"""Relative rounding error of a fraction; less than a unit of any budget below 1e13."""


def check_rank_share(rank_share: float) -> None:
    """Raise `UsageError` unless `rank_share` is in [0, 1]."""
    if not 0 <= rank_share <= 1:
        raise UsageError(f"rank_share is a share of the kept parameters, in [0, 1]; got {rank_share:g}.")


def blocks(problem: Problem) -> dict[int, list[LayerSpec]]:
    """Collect the layers of every block, blocks in model order."""
    found: dict[int, list[LayerSpec]] = {index: [] for index in sorted({spec.block for spec in problem.specs})}
    for spec in problem.specs:
        found[spec.block].append(spec)
    return found


def read_profiles(problem: Problem, read: Callable[[Profile], float], by: str) -> dict[str, float]:
    """Read a value of the profile of every layer, by layer name.

    Raises:
        UsageError: a layer has no profile, or its profile lacks the value.
    """
    values: dict[str, float] = {}
    for spec in problem.specs:
        try:
            values[spec.name] = read(problem.profiles[spec.name])
        except KeyError:
            raise UsageError(
                f"Allocator '{by}' reads the layers' profiles, and that of layer {spec.name} is missing or incomplete. "
                "Search in a new run folder, or give Problem the profiles that profile_block makes."
            ) from None
    return values


def unit_range(scores: Mapping[int, float]) -> dict[int, float]:
    """Map scores linearly to [0, 1]; all to 1/2 where they are equal."""
    least, most = min(scores.values()), max(scores.values())
    if most == least:
        return dict.fromkeys(scores, 0.5)
    return {block: (score - least) / (most - least) for block, score in scores.items()}


def least_kept(problem: Problem) -> float:
    """Compute the least fraction of the budget's total that can be kept: 0, or under a pattern that of its nonzeros."""
    layers = [_FractionRange.of(surface, problem) for surface in problem.surfaces]
    return math.fsum(layer.least * layer.dense for layer in layers) / problem.budget.total


def kept_targets(problem: Problem, kept: Mapping[int, float], rank_share: float) -> dict[str, Target]:
    """Compute targets that keep the fraction `kept[b] + shift` of every layer of block b and use the whole budget.

    The shift is common to all blocks and found by bisection; each layer's fraction is clipped to its range
    (`_FractionRange`). So the shape of the profile stays, and blocks of unequal sizes, clipped fractions and the least
    fraction of a pattern do not change the budget. The part of it that rounding leaves is spent on the layers that gain
    most.

    Args:
        kept: fraction of each block, of parameters or bytes as the budget counts; may leave [0, 1].
        rank_share: part of a layer's parameters that is in its rank: `rank = floor(rank_share kept d_out d_in / (d_out
            + d_in))`, at most the largest its surface offers, and within the problem's limits. Where only rank is free,
            all parameters are in the rank.
    """
    layers = [_FractionRange.of(surface, problem) for surface in problem.surfaces]
    limit = problem.budget.limit

    def used(shift: float) -> float:
        return math.fsum(layer.clip(kept[layer.spec.block] + shift) * layer.dense for layer in layers)

    low = min(layer.least - kept[layer.spec.block] for layer in layers)
    high = max(layer.most - kept[layer.spec.block] for layer in layers)
    if used(high) <= limit:
        low = high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if used(middle) <= limit else (low, middle)
    targets = {layer.spec.name: layer.target(kept[layer.spec.block] + low, problem, rank_share) for layer in layers}
    return spend(problem, targets)


@dataclass(frozen=True)
class _FractionRange:
    """Describe the range of the fraction that one layer can keep.

    Args:
        dense: cost of the untouched layer.
        least, most: the fractions of it that can be kept: 0 and 1, or under a pattern those of its nonzeros alone and
            with the largest rank the surface offers. Without sparse parts there is nothing between that rank and 1.
    """

    spec: LayerSpec
    most_rank: int
    dense: int
    least: float
    most: float

    @classmethod
    def of(cls, surface: ErrorSurface, problem: Problem) -> _FractionRange:
        spec, pattern, budget = surface.spec, problem.pattern, problem.budget
        most_rank = max(target.rank for target in surface.targets)
        dense = budget.cost(Target.dense(spec), spec)
        if pattern is None:
            return cls(spec, most_rank, dense, 0.0, 1.0)
        nnz = pattern.nnz(spec)
        least, most = (budget.cost(Target(rank, nnz, pattern), spec) / dense for rank in (0, most_rank))
        return cls(spec, most_rank, dense, least, max(least, min(most, 1.0)))

    def clip(self, fraction: float) -> float:
        return max(self.least, min(fraction, self.most))

    def target(self, fraction: float, problem: Problem, rank_share: float) -> Target:
        """Compute the target that costs at most the clipped `fraction`."""
        spec = self.spec
        kept = self.clip(fraction)
        limit = math.floor(kept * self.dense * (1 + ROUNDING))
        if problem.pattern is not None:
            nnz = Target(0, problem.pattern.nnz(spec), problem.pattern)
            return problem.grow(nnz, spec, "rank", self.most_rank, limit)
        if limit == self.dense:
            return Target.dense(spec)
        if problem.axis == "rank":
            return problem.grow(Target.zero(), spec, "rank", self.most_rank, limit)
        rank = min(int(rank_share * limit / self.dense * spec.numel / (spec.d_out + spec.d_in)), self.most_rank)
        return problem.grow(Target(problem.limits.floor(rank), 0), spec, "nnz", spec.numel - 1, limit)
