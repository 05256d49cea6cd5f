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
from globalopt.values.option_table import Floats, Ints, OptionTable, Sizes
from globalopt.values.problem import Problem

UNIFORM_SHARE = 0.2
"""Part of the guided moves that is drawn uniformly, because guidance alone ends on a plateau and stays there."""

ATTEMPTS = 64
"""Draws of a pair of layers before giving up: under a pattern a rank may cost more than any layer can spare."""

SIGNIFICANT = 2.0
CONFIDENCE = 0.95
"""Paired t above which a swap counts as improving, and the confidence of the bound on how many do."""


class Trades(NamedTuple):
    """Hold trades of rank for nonzeros: the layers, their ranks and nonzeros afterwards, and the predicted gains."""

    layer: Ints
    rank: Ints
    nnz: Ints
    gain: Floats


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
        """Costs that are enough for one more of the free axis: a rank, a parameter, or a 16-bit value and its index."""
        every = self.table.every
        if self.axis == "rank":
            return self.table.costs(every, np.full_like(every, self.multiple), 0 * every)
        return np.full_like(every, 1 if self.table.budget.accounting == "params" else 4)

    def spare(self, layer: Ints, rank: Ints, nnz: Ints) -> Ints:
        """Compute the most cost that targets can give up."""
        return self.table.costs(layer, rank, nnz) - self.table.costs(layer, *self._bare(layer, rank, nnz))

    def room(self, layer: Ints, rank: Ints, nnz: Ints) -> Ints:
        """Compute the most cost that targets can take."""
        grown = self.grown(layer, rank, nnz, self.dense[layer])
        return self.table.costs(layer, *grown) - self.table.costs(layer, rank, nnz)

    def shrunk(self, layer: Ints, rank: Ints, nnz: Ints, amount: Ints) -> tuple[Ints, Ints]:
        """Find the largest targets that cost an amount less, which is at most their `spare`."""
        top = rank if self.axis == "rank" else nnz
        limit = self.table.costs(layer, rank, nnz) - amount
        return self.table.grow(layer, *self._bare(layer, rank, nnz), top, limit)

    def grown(self, layer: Ints, rank: Ints, nnz: Ints, amount: Ints) -> tuple[Ints, Ints]:
        """Find the largest targets that cost at most an amount more."""
        table = self.table
        if self.axis == "rank":
            top = np.minimum(table.most_rank[layer], (table.numel[layer] - nnz) // table.per_rank[layer])
        else:
            top = table.numel[layer] - rank * table.per_rank[layer]
        limit = np.minimum(self.dense[layer], table.costs(layer, rank, nnz) + amount)
        return table.grow(layer, rank, nnz, top, limit)

    def traded(
        self, layer: Ints, rank: Ints, nnz: Ints, ranks: Ints, slack: int
    ) -> tuple[NDArray[np.bool_], Ints, Ints]:
        """Find the targets with so many ranks more, and the nonzeros that their costs and a slack pay for.

        Returns: which there are, their ranks and their nonzeros.
        """
        table = self.table
        # To the next multiple at least, or nothing would move.
        change = np.maximum(self.multiple, abs(ranks) // self.multiple * self.multiple)
        then = np.where(ranks > 0, rank + change, rank - change).clip(table.least_rank[layer], table.most_rank[layer])
        if self.axis == "rank":
            return np.zeros(len(layer), bool), rank, nnz
        least = self._bare(layer, then, table.numel[layer])
        limit = np.minimum(self.dense[layer], table.costs(layer, rank, nnz) + slack)
        cost = table.costs(layer, *least)
        fits = least[0] * table.per_rank[layer] + least[1] <= table.numel[layer]
        can = (then != rank) & (cost <= limit) & fits
        return can, *self.grown(layer, *least, limit - cost)

    def gain(self, layer: Ints, rank: Ints, nnz: Ints, then: tuple[Ints, Ints]) -> Floats:
        """Predict the falls of the errors."""
        return self.table.predict(layer, rank, nnz) - self.table.predict(layer, *then)

    def _bare(self, layer: Ints, rank: Ints, nnz: Ints) -> tuple[Ints, Ints]:
        """Return the targets at the lower end of their free axis."""
        if self.axis == "rank":
            return np.minimum(rank, self.table.least_rank[layer]), nnz
        # Below the options of the neighbouring ranks the prediction is a constant, which would look like a free gain.
        return rank, np.minimum(nnz, self.table.least_nnz(layer, rank))

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
        for amount in (min(wanted, spare), int(self.unit[taker]) - slack):
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
        every = self.table.every
        while (slack := self.table.slack(sizes)) > 0:
            rank, nnz = self.grown(every, sizes.rank, sizes.nnz, np.full_like(every, slack))
            able = np.flatnonzero((rank != sizes.rank) | (nnz != sizes.nnz))
            if not len(able):
                break
            gain = self.gain(able, sizes.rank[able], sizes.nnz[able], (rank[able], nnz[able]))
            best = int(able[gain.argmax()])
            sizes = sizes.with_layer(best, int(rank[best]), int(nnz[best]))
        return sizes

    def random_swap(self, sizes: Sizes, delta: int, rng: random.Random) -> Sizes | None:
        """Make a level swap of two layers drawn uniformly from those that can give and can take."""
        every = self.table.every
        givers = np.flatnonzero(self.spare(every, sizes.rank, sizes.nnz) > 0).tolist()
        takers = np.flatnonzero(self.room(every, sizes.rank, sizes.nnz) > 0).tolist()
        for _ in range(ATTEMPTS if givers and takers else 0):
            giver, taker = rng.choice(givers), rng.choice(takers)
            moved = self.swap(sizes, giver, taker, delta) if giver != taker else None
            if moved is not None:
                return moved
        return None

    def random_trade(self, sizes: Sizes, delta: int, rng: random.Random) -> Sizes | None:
        """Make a trade of about `delta` between rank and nonzeros of a layer drawn uniformly."""
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
        every = self.table.every
        spare = self.spare(every, sizes.rank, sizes.nnz)
        givers = np.flatnonzero(spare > 0)
        takers = np.flatnonzero(self.room(every, sizes.rank, sizes.nnz) > 0)
        now = givers, sizes.rank[givers], sizes.nnz[givers]
        give = self.gain(*now, self.shrunk(*now, np.minimum(delta, spare[givers])))
        now = takers, sizes.rank[takers], sizes.nnz[takers]
        take = self.gain(*now, self.grown(*now, np.maximum(delta, self.unit[takers])))
        trades = self._trades(sizes, delta)
        changes = abs(np.concatenate([give, take]))
        scale = temperature * float(changes.sum()) / max(1, len(changes)) or 1.0
        top_give, top_take = give.max(initial=0.0), take.max(initial=0.0)
        # Swaps and trades are normalised alike; the cap keeps a trade far better than any swap from overflowing.
        give, take = np.exp((give - top_give) / scale), np.exp((take - top_take) / scale)
        traded = np.exp(np.minimum(500.0, (trades.gain - top_give - top_take) / scale))
        given = math.fsum(give.tolist())
        own = np.zeros(len(every))
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
        """Find every trade of about `delta`, by layer and of fewer ranks before more."""
        table = self.table
        layer = np.repeat(table.every, 2)
        rank, nnz = sizes.rank[layer], sizes.nnz[layer]
        per_rank = table.costs(layer, np.ones_like(layer), np.zeros_like(layer))
        ranks = np.maximum(1, delta // per_rank) * np.tile([-1, 1], len(table.names))
        can, *then = self.traded(layer, rank, nnz, ranks, table.slack(sizes))
        layer, rank, nnz, then = layer[can], rank[can], nnz[can], (then[0][can], then[1][can])
        return Trades(layer, *then, self.gain(layer, rank, nnz, then))

    def _traded(self, sizes: Sizes, trades: Trades, chosen: int) -> Sizes:
        layer, rank, nnz = (int(part[chosen]) for part in (trades.layer, trades.rank, trades.nnz))
        return self.spend_rest(sizes.with_layer(layer, rank, nnz))


def _one(sizes: Sizes, layer: int) -> tuple[Ints, Ints, Ints]:
    """Return a layer and its target as arrays of one element."""
    return np.array([layer]), sizes.rank[[layer]], sizes.nnz[[layer]]


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
