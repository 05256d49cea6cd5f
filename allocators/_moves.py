"""Moves between allocations of one cost: from one layer to another, or between the rank and nonzeros of a layer."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv

from allocators._trials import t_statistic
from globalopt.protocols import Objective
from globalopt.values.budget import Target
from globalopt.values.option_table import OptionTable
from globalopt.values.problem import Problem
from globalopt.values.sizes import Floats, Ints, Sizes

UNIFORM_SHARE = 0.2
"""Part of the guided moves that is drawn uniformly, because guidance alone ends on a plateau and stays there."""

ATTEMPTS = 64
"""Draws of a pair of layers before giving up: under a pattern a rank may cost more than any layer can spare."""

SIGNIFICANT = 2.0
CONFIDENCE = 0.95
"""Paired t above which a swap counts as improving, and the confidence of the bound on how many do."""


class Trades(NamedTuple):
    """Hold trades within layers: the layers, their places, ranks and nonzeros afterwards, and the predicted gains."""

    layer: Ints
    place: Ints
    rank: Ints
    nnz: Ints
    gain: Floats

    def beside(self, other: Trades) -> Trades:
        """Return these trades, and then those of `other`."""
        layer, place, rank, nnz = (
            np.concatenate([mine, theirs]) for mine, theirs in zip(self[:4], other[:4], strict=True)
        )
        return Trades(layer, place, rank, nnz, np.concatenate([self.gain, other.gain]))


class Moves:
    """Describe the moves of all layers, which stay within the options of their surfaces and the costs of dense layers.

    Every method that moves returns the new targets, or None where nothing can move. Draws do not depend on the order of
    the surfaces: layers are in the order of their names.

    Args:
        table: the options of the layers; its errors guide.
    """

    def __init__(self, table: OptionTable) -> None:
        self.table = table
        self.axis = table.axis
        self.multiple = table.limits.rank_multiple
        self.dense = table.dense

    # ------------------------------------------------------------------------------------ what layers can do

    @cached_property
    def unit(self) -> Ints:
        """Costs, by place, that are enough for one more of the free axis: a rank, a parameter, or a value and index."""
        every = np.arange(len(self.table.owner))
        if self.axis == "rank":
            return self.table.costs(every, np.full_like(every, self.multiple), 0 * every)
        return np.full_like(every, 1 if self.table.budget.accounting == "params" else 4)

    def spare(self, place: Ints, rank: Ints, nnz: Ints) -> Ints:
        """Compute the most cost that targets can give up."""
        return self.table.costs(place, rank, nnz) - self.table.costs(place, *self._bare(place, rank, nnz))

    def room(self, place: Ints, rank: Ints, nnz: Ints) -> Ints:
        """Compute the most cost that targets can take."""
        grown = self.grown(place, rank, nnz, self.dense[place])
        return self.table.costs(place, *grown) - self.table.costs(place, rank, nnz)

    def shrunk(self, place: Ints, rank: Ints, nnz: Ints, amount: Ints) -> tuple[Ints, Ints]:
        """Find the largest targets that cost an amount less, which is at most their `spare`."""
        top = rank if self.axis == "rank" else nnz
        limit = self.table.costs(place, rank, nnz) - amount
        return self.table.grow(place, *self._bare(place, rank, nnz), top, limit)

    def grown(self, place: Ints, rank: Ints, nnz: Ints, amount: Ints) -> tuple[Ints, Ints]:
        """Find the largest targets that cost at most an amount more."""
        table = self.table
        if self.axis == "rank":
            top = np.minimum(table.most_rank[place], (table.numel[place] - nnz) // table.per_rank[place])
        else:
            top = table.numel[place] - rank * table.per_rank[place]
        limit = np.minimum(self.dense[place], table.costs(place, rank, nnz) + amount)
        return table.grow(place, rank, nnz, top, limit)

    def traded(
        self, place: Ints, rank: Ints, nnz: Ints, ranks: Ints, slack: int
    ) -> tuple[NDArray[np.bool_], Ints, Ints]:
        """Find the targets with so many ranks more, and the nonzeros that their costs and a slack pay for.

        Returns: which there are, their ranks and their nonzeros.
        """
        table = self.table
        # To the next multiple at least, or nothing would move.
        change = np.maximum(self.multiple, abs(ranks) // self.multiple * self.multiple)
        then = np.where(ranks > 0, rank + change, rank - change).clip(table.least_rank[place], table.most_rank[place])
        if self.axis == "rank":
            return np.zeros(len(place), bool), rank, nnz
        least = self._bare(place, then, table.numel[place])
        limit = np.minimum(self.dense[place], table.costs(place, rank, nnz) + slack)
        cost = table.costs(place, *least)
        fits = least[0] * table.per_rank[place] + least[1] <= table.numel[place]
        can = (then != rank) & (cost <= limit) & fits
        return can, *self.grown(place, *least, limit - cost)

    def converted(self, place: Ints, rank: Ints, nnz: Ints, slack: int) -> Trades:
        """Find the targets in the other storages of layers, with the nonzeros that their costs and a slack pay for."""
        table = self.table
        which, there = table.others(place)
        limit = np.minimum(self.dense[there], table.costs(place, rank, nnz)[which] + slack)
        rank, nnz, place = rank[which], nnz[which], place[which]
        if self.axis == "nnz":
            bare = self._bare(there, rank, table.numel[there])
            top = table.numel[there] - rank * table.per_rank[there]
            then = table.grow(there, *bare, top, limit)
        else:
            then = table.grow(there, *self._bare(there, rank, nnz), rank, limit)
        fits = table.costs(there, *then) <= limit
        there, then = there[fits], (then[0][fits], then[1][fits])
        gain = table.predict(place[fits], rank[fits], nnz[fits]) - table.predict(there, *then)
        return Trades(table.owner[there], there, *then, gain)

    def gain(self, place: Ints, rank: Ints, nnz: Ints, then: tuple[Ints, Ints]) -> Floats:
        """Predict the falls of the errors."""
        return self.table.predict(place, rank, nnz) - self.table.predict(place, *then)

    def _bare(self, place: Ints, rank: Ints, nnz: Ints) -> tuple[Ints, Ints]:
        """Return the targets at the lower end of their free axis."""
        if self.axis == "rank":
            return np.minimum(rank, self.table.least_rank[place]), nnz
        # Below the options of the neighbouring ranks the prediction is a constant, which would look like a free gain.
        return rank, np.minimum(nnz, self.table.least_nnz(place, rank))

    # ------------------------------------------------------------------------------------ moves

    def swap(self, sizes: Sizes, giver: int, taker: int, delta: int) -> Sizes | None:
        """Move `delta` of cost from the layer `giver` to `taker`, in nonzeros, or in ranks where only these are free.

        Less is moved where the giver has no more or the taker no more room; more where one rank of the taker costs
        more. The part that the taker cannot use goes back to the giver, and the part that neither can use (a rank or an
        index costs more) is spent where it gains most. In parameters and without a pattern the cost stays exactly the
        same.

        Args:
            sizes: the targets, within the budget.
            giver, taker: places of the layers.
            delta: in the budget's unit, at least 1.
        """
        table = self.table
        slack = table.slack(sizes)
        give, take = (_one(sizes, layer) for layer in (giver, taker))
        spare, room = int(self.spare(*give)[0]), int(self.room(*take)[0])
        wanted = min(delta, room - slack)
        for amount in (min(wanted, spare), int(self.unit[take[0][0]]) - slack):
            if wanted < 1 or not 1 <= amount <= spare:
                continue
            shrunk = self.shrunk(*give, np.array([amount]))
            freed = int((table.costs(*give) - table.costs(give[0], *shrunk))[0]) + slack
            grown = self.grown(*take, np.array([freed]))
            paid = int((table.costs(take[0], *grown) - table.costs(*take))[0])
            if (grown[0][0], grown[1][0]) != (take[1][0], take[2][0]):
                given = self.grown(give[0], *shrunk, np.array([freed - paid]))
                moved = sizes.with_layer(giver, *_numbers(given)).with_layer(taker, *_numbers(grown))
                moved = self.spend_rest(moved)
                return None if moved == sizes else moved
        return None

    def trade(self, sizes: Sizes, layer: int, ranks: int) -> Sizes | None:
        """Change one layer's rank by `ranks`, within the ranks its surface offers, and pay for it in nonzeros."""
        can, rank, nnz = self.traded(*_one(sizes, layer), np.array([ranks]), self.table.slack(sizes))
        return self.spend_rest(sizes.with_layer(layer, int(rank[0]), int(nnz[0]))) if can[0] else None

    def spend_rest(self, sizes: Sizes) -> Sizes:
        """Spend the rest of the budget that a move has left on the layers that gain most by it, one after the other."""
        while (slack := self.table.slack(sizes)) > 0:
            rank, nnz = self.grown(*sizes.arrays, np.full_like(sizes.rank, slack))
            able = np.flatnonzero((rank != sizes.rank) | (nnz != sizes.nnz))
            if not len(able):
                break
            gain = self.gain(*_some(sizes, able), (rank[able], nnz[able]))
            best = int(able[gain.argmax()])
            sizes = sizes.with_layer(best, int(rank[best]), int(nnz[best]))
        return sizes

    def random_swap(self, sizes: Sizes, delta: int, rng: random.Random) -> Sizes | None:
        """Make a level swap of two layers drawn uniformly from those that can give and can take."""
        givers = np.flatnonzero(self.spare(*sizes.arrays) > 0).tolist()
        takers = np.flatnonzero(self.room(*sizes.arrays) > 0).tolist()
        for _ in range(ATTEMPTS if givers and takers else 0):
            giver, taker = rng.choice(givers), rng.choice(takers)
            moved = self.swap(sizes, giver, taker, delta) if giver != taker else None
            if moved is not None:
                return moved
        return None

    def random_trade(self, sizes: Sizes, delta: int, rng: random.Random) -> Sizes | None:
        """Make a trade of about `delta` between rank and nonzeros, or to another storage, drawn uniformly."""
        trades = self._trades(sizes, delta)
        if not len(trades.layer):
            return None
        return self._traded(sizes, trades, rng.randrange(len(trades.layer)))

    def guided(self, sizes: Sizes, delta: int, rng: random.Random, temperature: float) -> Sizes | None:
        """Draw a level swap or a trade with probability proportional to `exp(predicted gain / temperature)`.

        The gain of a swap is the taker's gain less the giver's loss, so that one pass over the layers covers all pairs:
        the taker is drawn with `exp(gain_t) sum_{g != t} exp(-loss_g)`, then the giver. `UNIFORM_SHARE` of the moves
        are uniform over swaps or, as likely, over trades.

        Args:
            delta: in the budget's unit, at least 1.
            temperature: above 0, in units of the mean change of a layer's error that `delta` makes.
        """
        if rng.random() < UNIFORM_SHARE:
            first, second = rng.sample([self.random_swap, self.random_trade], 2)
            return first(sizes, delta, rng) or second(sizes, delta, rng)
        spare = self.spare(*sizes.arrays)
        givers = np.flatnonzero(spare > 0)
        takers = np.flatnonzero(self.room(*sizes.arrays) > 0)
        now = _some(sizes, givers)
        give = self.gain(*now, self.shrunk(*now, np.minimum(delta, spare[givers])))
        now = _some(sizes, takers)
        take = self.gain(*now, self.grown(*now, np.maximum(delta, self.unit[now[0]])))
        trades = self._trades(sizes, delta)
        changes = abs(np.concatenate([give, take]))
        scale = temperature * float(changes.sum()) / max(1, len(changes)) or 1.0
        top_give, top_take = give.max(initial=0.0), take.max(initial=0.0)
        # Swaps and trades are normalised alike; the cap keeps a trade far better than any swap from overflowing.
        give, take = np.exp((give - top_give) / scale), np.exp((take - top_take) / scale)
        traded = np.exp(np.minimum(500.0, (trades.gain - top_give - top_take) / scale))
        given = math.fsum(give.tolist())
        own = np.zeros(len(sizes.place))
        own[givers] = give
        paired = take * np.maximum(0.0, given - own[takers])
        swaps, all_trades = math.fsum(paired.tolist()), math.fsum(traded.tolist())
        if rng.random() * (swaps + all_trades) < all_trades:
            return self._traded(sizes, trades, _draw(traded, rng))
        if swaps <= 0:
            return None
        taker = int(takers[_draw(paired, rng)])
        others = givers != taker
        giver = int(givers[others][_draw(give[others], rng)])
        return self.swap(sizes, giver, taker, delta)

    def _trades(self, sizes: Sizes, delta: int) -> Trades:
        """Find every trade of about `delta`, by layer and of fewer ranks before more; then those of storage."""
        table = self.table
        layer = np.repeat(np.arange(len(table.names)), 2)
        place, rank, nnz = _some(sizes, layer)
        per_rank = table.costs(place, np.ones_like(layer), np.zeros_like(layer))
        ranks = np.maximum(1, delta // per_rank) * np.tile([-1, 1], len(table.names))
        slack = table.slack(sizes)
        can, *then = self.traded(place, rank, nnz, ranks, slack)
        place, rank, nnz, then = place[can], rank[can], nnz[can], (then[0][can], then[1][can])
        within = Trades(layer[can], place, *then, self.gain(place, rank, nnz, then))
        between = self.converted(*sizes.arrays, slack)
        return within.beside(between)

    def _traded(self, sizes: Sizes, trades: Trades, chosen: int) -> Sizes:
        layer, rank, nnz, place = (int(part[chosen]) for part in (trades.layer, trades.rank, trades.nnz, trades.place))
        return self.spend_rest(sizes.with_layer(layer, rank, nnz, place))


def _some(sizes: Sizes, layers: Ints) -> tuple[Ints, Ints, Ints]:
    """Return the targets of some layers, as places, ranks and nonzeros."""
    return sizes.place[layers], sizes.rank[layers], sizes.nnz[layers]


def _one(sizes: Sizes, layer: int) -> tuple[Ints, Ints, Ints]:
    """Return the target of a layer as arrays of one element."""
    return _some(sizes, np.array([layer]))


def _numbers(target: tuple[Ints, Ints]) -> tuple[int, int]:
    return int(target[0][0]), int(target[1][0])


def _draw(weights: Floats, rng: random.Random) -> int:
    """Draw a place with probability in proportion to its weight."""
    summed = weights.cumsum()
    return min(int(np.searchsorted(summed, rng.random() * summed[-1], "right")), len(weights) - 1)


class ImprovingShare(NamedTuple):
    """Count the `improving` among `tried` random swaps; at 95 % confidence at most `bound` of all swaps improve."""

    improving: int
    tried: int
    bound: float


def improving_share(
    problem: Problem, objective: Objective, targets: Mapping[str, Target], swaps: int, rng: random.Random
) -> ImprovingShare:
    """Estimate the local optimality of `targets` on the loss of the model, from random swaps.

    Uniform level swaps of `default_delta`, drawn with replacement, are compared with `targets` on all chunks, window by
    window; one improves where the paired t is above `SIGNIFICANT`. The bound is that of Clopper and Pearson (1934), the
    0.95 quantile of `Beta(improving + 1, tried - improving)`: if none of 300 improves, at most 1 % of all do.

    Args:
        targets: within the budget.
        swaps: how many to try; fewer where the objective's limit comes first, none where nothing can move.
    """
    chunks = range(objective.chunks)
    moves = Moves(problem.table)
    delta, sizes = default_delta(problem.table), problem.table.sizes(targets)
    improving = tried = 0
    for _ in range(swaps):
        moved = moves.random_swap(sizes, delta, rng)
        if moved is None or objective.tokens + 2 * len(chunks) * objective.chunk_tokens > objective.limit:
            break
        now, then = objective.losses([targets, problem.table.targets(moved)], chunks)
        improving += t_statistic(now - then) > SIGNIFICANT
        tried += 1
    bound = 1.0 if improving == tried else float(betaincinv(improving + 1, tried - improving, CONFIDENCE))
    return ImprovingShare(improving, tried, bound)


def default_delta(table: OptionTable) -> int:
    """Return a 64th of the mean dense layer in the budget's unit: about one step between a surface's options."""
    return max(1, table.budget.total // (64 * len(table.names)))
