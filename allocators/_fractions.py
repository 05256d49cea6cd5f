"""Kept fractions of the blocks, as one-shot heuristics choose them: shifted to the exact budget, made into targets."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from allocators._spend import spend_sizes
from allocators._storages import in_best_storage
from globalopt.errors import UsageError
from globalopt.values.budget import Target
from globalopt.values.layer import LayerSpec
from globalopt.values.option_table import OptionTable
from globalopt.values.problem import Problem, Profile
from globalopt.values.sizes import Floats, Sizes

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
    ranges = _FractionRanges(problem.table)
    return math.fsum((ranges.least * ranges.dense).tolist()) / problem.budget.total


def kept_targets(problem: Problem, kept: Mapping[int, float], rank_share: float) -> dict[str, Target]:
    """Compute targets that keep the fraction `kept[b] + shift` of every layer of block b and use the whole budget.

    The shift is common to all blocks and found by bisection; each layer's fraction is clipped to its range
    (`_FractionRanges`). So the shape of the profile stays, and blocks of unequal sizes, clipped fractions and the least
    fraction of a pattern do not change the budget. The part of it that rounding leaves is spent on the layers that gain
    most.

    Args:
        kept: fraction of each block, of parameters or bytes as the budget counts; may leave [0, 1].
        rank_share: part of a layer's parameters that is in its rank: `rank = floor(rank_share kept d_out d_in / (d_out
            + d_in))`, at most the largest its surface offers, and within the problem's limits. Where only rank is free,
            all parameters are in the rank.

    Where layers have several storages, all get the one whose targets have the least predicted loss.
    """
    if problem.mixed:
        return in_best_storage(problem, lambda narrow: kept_targets(narrow, kept, rank_share))
    table = problem.table
    ranges = _FractionRanges(table)
    wanted = np.array([kept[spec.block] for spec in table.specs])
    limit = problem.budget.limit

    def used(shift: float) -> float:
        return math.fsum((ranges.clip(wanted + shift) * ranges.dense).tolist())

    low = float((ranges.least - wanted).min())
    high = float((ranges.most - wanted).max())
    if used(high) <= limit:
        low = high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if used(middle) <= limit else (low, middle)
    return table.targets(spend_sizes(table, ranges.sizes(wanted + low, rank_share)))


class _FractionRanges:
    """Describe the ranges of the fractions that layers can keep, as arrays (layers,) in the order of the table.

    `dense` is the cost of the untouched layer. `least` and `most` are the fractions of it that can be kept: 0 and 1, or
    under a pattern those of its nonzeros alone and with the largest rank the surface offers. Without sparse parts there
    is nothing between that rank and 1.
    """

    def __init__(self, table: OptionTable) -> None:
        self._table = table
        self.dense = table.dense[table.every]
        self._bare = np.zeros(len(table.names), np.int64)
        self.least, self.most = np.zeros(len(table.names)), np.ones(len(table.names))
        if table.pattern is not None:
            self._bare = np.array([table.pattern.nnz(spec) for spec in table.specs], np.int64)
            self.least = table.costs(table.every, 0 * self._bare, self._bare) / self.dense
            most = table.costs(table.every, table.most_rank[table.every], self._bare) / self.dense
            self.most = np.maximum(self.least, np.minimum(most, 1.0))

    def clip(self, fractions: Floats) -> Floats:
        """Clip fractions to what the layers can keep."""
        return np.maximum(self.least, np.minimum(fractions, self.most))

    def sizes(self, fractions: Floats, rank_share: float) -> Sizes:
        """Compute the targets that cost at most the clipped `fractions`."""
        table = self._table
        every = table.every
        limit = np.floor(self.clip(fractions) * self.dense * (1 + ROUNDING)).astype(np.int64)
        zero, most_rank, numel = np.zeros_like(limit), table.most_rank[every], table.numel[every]
        if table.axis == "rank":
            rank, nnz = table.grow(every, zero, self._bare, most_rank, limit)
        else:
            # What a rank costs in few bits, over what it costs in 16.
            relative = table.costs(every, zero + 1, zero) / (table.per_rank[every] * (self.dense / numel))
            share = (rank_share * limit / self.dense * numel / table.per_rank[every] / relative).astype(np.int64)
            rank = table.floor(np.minimum(share, most_rank))
            rank, nnz = table.grow(every, rank, zero, numel - 1, limit)
        if table.pattern is None:
            # A whole layer needs no index: in few bits it may cost less than most of its entries.
            whole = table.costs(every, zero, numel) <= limit
            rank, nnz = np.where(whole, 0, rank), np.where(whole, numel, nnz)
        return Sizes(every, rank, nnz)
