"""Moves between allocations of one cost: from one layer to another, or between the rank and nonzeros of a layer."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import NamedTuple

from scipy.special import betaincinv

from allocators._trials import t_statistic
from globalopt.protocols import Objective
from globalopt.values.budget import Target
from globalopt.values.problem import ErrorSurface, Problem, interpolate

Targets = Mapping[str, Target]

UNIFORM_SHARE = 0.2
"""Part of the guided moves that is drawn uniformly, because guidance alone ends on a plateau and stays there."""

ATTEMPTS = 64
"""Draws of a pair of layers before giving up: under a pattern a rank may cost more than any layer can spare."""

SIGNIFICANT = 2.0
CONFIDENCE = 0.95
"""Paired t above which a swap counts as improving, and the confidence of the bound on how many do."""


def level_swap(problem: Problem, targets: Targets, giver: str, taker: str, delta: int) -> dict[str, Target] | None:
    """Move `delta` of cost from the layer `giver` to `taker`, in nonzeros, or in ranks where only these are free.

    Less is moved where the giver has no more or the taker no more room; more where one rank of the taker costs more.
    The part that the taker cannot use goes back to the giver, and the part that neither can use (a rank or an index
    costs more) is spent where it gains most. In parameters and without a pattern the cost stays exactly the same.

    Args:
        targets: one per layer, within the budget.
        delta: in the budget's unit, at least 1.
    Returns: the new targets, or None where these layers cannot.
    """
    return _swap(problem, layers_of(problem), targets, giver, taker, delta)


def trade(problem: Problem, targets: Targets, name: str, ranks: int) -> dict[str, Target] | None:
    """Change one layer's rank by `ranks`, within the ranks its surface offers, and pay for it in nonzeros.

    Returns: the new targets, or None where the layer cannot; where only ranks are free, always.
    """
    layers = layers_of(problem)
    moved = layers[name].traded(targets[name], ranks, _slack(problem, targets))
    return None if moved is None else spend_rest(problem, layers, {**targets, name: moved})


def random_swap(problem: Problem, targets: Targets, delta: int, rng: random.Random) -> dict[str, Target] | None:
    """Make a level swap of two layers drawn uniformly from those that can give and can take; None if there is none."""
    layers = layers_of(problem)
    givers = [name for name, layer in layers.items() if layer.spare(targets[name]) > 0]
    takers = [name for name, layer in layers.items() if layer.room(targets[name]) > 0]
    for _ in range(ATTEMPTS if givers and takers else 0):
        giver, taker = rng.choice(givers), rng.choice(takers)
        moved = _swap(problem, layers, targets, giver, taker, delta) if giver != taker else None
        if moved is not None:
            return moved
    return None


def random_trade(problem: Problem, targets: Targets, delta: int, rng: random.Random) -> dict[str, Target] | None:
    """Make a trade of about `delta` between rank and nonzeros of a layer drawn uniformly; None if there is none."""
    layers = layers_of(problem)
    trades = _trades(problem, layers, targets, delta)
    if not trades:
        return None
    name, moved, _ = rng.choice(trades)
    return spend_rest(problem, layers, {**targets, name: moved})


def guided(
    problem: Problem, targets: Targets, delta: int, rng: random.Random, temperature: float
) -> dict[str, Target] | None:
    """Draw a level swap or a trade with probability proportional to `exp(predicted gain / temperature)`.

    The gain of a swap is the taker's gain less the giver's loss, so that one pass over the layers covers all pairs: the
    taker is drawn with `exp(gain_t) sum_{g != t} exp(-loss_g)`, then the giver. `UNIFORM_SHARE` of the moves are
    uniform over swaps or, as likely, over trades.

    Args:
        delta: in the budget's unit, at least 1.
        temperature: above 0, in units of the mean change of a layer's error that `delta` makes.
    Returns: the new targets, or None where nothing can move.
    """
    if rng.random() < UNIFORM_SHARE:
        first, second = rng.sample([random_swap, random_trade], 2)
        return first(problem, targets, delta, rng) or second(problem, targets, delta, rng)
    layers = layers_of(problem)
    give, take = {}, {}
    for name, layer in layers.items():
        now = targets[name]
        if layer.spare(now) > 0:
            give[name] = layer.gain(now, layer.shrunk(now, min(delta, layer.spare(now))))
        if layer.room(now) > 0:
            take[name] = layer.gain(now, layer.grown(now, max(delta, layer.unit)))
    trades = _trades(problem, layers, targets, delta)
    changes = [abs(gain) for gain in (*give.values(), *take.values())]
    scale = temperature * sum(changes) / max(1, len(changes)) or 1.0
    top_give, top_take = max(give.values(), default=0.0), max(take.values(), default=0.0)
    # Swaps and trades are normalised alike; the cap keeps a trade far better than any swap from overflowing.
    give = {name: math.exp((gain - top_give) / scale) for name, gain in give.items()}
    take = {name: math.exp((gain - top_take) / scale) for name, gain in take.items()}
    traded = [math.exp(min(500.0, (gain - top_give - top_take) / scale)) for _, _, gain in trades]
    given = math.fsum(give.values())
    paired = {name: weight * max(0.0, given - give.get(name, 0.0)) for name, weight in take.items()}
    swaps, all_trades = math.fsum(paired.values()), math.fsum(traded)
    if rng.random() * (swaps + all_trades) < all_trades:
        ((name, moved, _),) = rng.choices(trades, traded)
        return spend_rest(problem, layers, {**targets, name: moved})
    if swaps <= 0:
        return None
    (taker,) = rng.choices(list(paired), list(paired.values()))
    givers = [name for name in give if name != taker]
    (giver,) = rng.choices(givers, [give[name] for name in givers])
    return _swap(problem, layers, targets, giver, taker, delta)


class ImprovingShare(NamedTuple):
    """Count the `improving` among `tried` random swaps; at 95 % confidence at most `bound` of all swaps improve."""

    improving: int
    tried: int
    bound: float


def improving_share(
    problem: Problem, objective: Objective, targets: Targets, swaps: int, rng: random.Random
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
    delta = default_delta(problem)
    improving = tried = 0
    for _ in range(swaps):
        moved = random_swap(problem, targets, delta, rng)
        if moved is None or objective.tokens + 2 * len(chunks) * objective.chunk_tokens > objective.limit:
            break
        now, then = objective.losses([targets, moved], chunks)
        improving += t_statistic(now - then) > SIGNIFICANT
        tried += 1
    bound = 1.0 if improving == tried else float(betaincinv(improving + 1, tried - improving, CONFIDENCE))
    return ImprovingShare(improving, tried, bound)


def default_delta(problem: Problem) -> int:
    """Return a 64th of the mean dense layer in the budget's unit: about one step between a surface's options."""
    return max(1, problem.budget.total // (64 * len(problem.surfaces)))


class LayerMoves:
    """Describe the moves of one layer, which stay within the options of its surface and the cost of the dense layer.

    Results are kept, because a search needs the same ones of most layers again and again.

    Args:
        problem: whose budget and pattern apply.
        surface: of the layer.
    """

    spare: Callable[[Target], int]
    """The most cost a target can give up."""

    room: Callable[[Target], int]
    """The most cost it can take."""

    shrunk: Callable[[Target, int], Target]
    """The largest target that costs an amount less, which is at most its `spare`."""

    grown: Callable[[Target, int], Target]
    """The largest target that costs at most an amount more."""

    traded: Callable[[Target, int, int], Target | None]
    """The target with so many ranks more, and the nonzeros that its cost and a slack pay for; None if there is none."""

    def __init__(self, problem: Problem, surface: ErrorSurface) -> None:
        self.problem = problem
        self.budget = problem.budget
        self.spec = surface.spec
        self.axis = problem.axis
        self.multiple = problem.limits.rank_multiple
        self.dense = self.cost(Target.dense(self.spec))
        self.per_rank = self.spec.d_out + self.spec.d_in
        least: dict[int, int] = {}
        for target in surface.targets:
            least[target.rank] = min(target.nnz, least.get(target.rank, target.nnz))
        self.ranks = sorted(least)
        self.counts = [least[rank] for rank in self.ranks]
        self.error = cache(surface.predict)
        self.spare = cache(lambda target: self.cost(target) - self.cost(self._bare(target)))
        self.room = cache(lambda target: self.cost(self.grown(target, self.dense)) - self.cost(target))
        self.shrunk, self.grown, self.traded = cache(self._shrunk), cache(self._grown), cache(self._traded)

    def cost(self, target: Target) -> int:
        return self.budget.cost(target, self.spec)

    def gain(self, now: Target, then: Target) -> float:
        """Predict the fall of the error."""
        return self.error(now) - self.error(then)

    @property
    def unit(self) -> int:
        """A cost that is enough for one more of the free axis: a rank, a parameter, or a 16-bit value and its index."""
        if self.axis == "rank":
            return self.cost(Target(self.multiple, 0))
        return 1 if self.budget.accounting == "params" else 4

    def _bare(self, target: Target) -> Target:
        """Return the target at the lower end of its free axis."""
        if self.axis == "rank":
            return replace(target, rank=min(target.rank, self.ranks[0]))
        # Below the options of the neighbouring ranks the prediction is a constant, which would look like a free gain.
        least = math.ceil(interpolate(self.ranks, self.counts, target.rank))
        return replace(target, nnz=min(target.nnz, least))

    def _shrunk(self, target: Target, amount: int) -> Target:
        top = getattr(target, self.axis)
        return self.problem.grow(self._bare(target), self.spec, self.axis, top, self.cost(target) - amount)

    def _grown(self, target: Target, amount: int) -> Target:
        if self.axis == "rank":
            top = min(self.ranks[-1], (self.spec.numel - target.nnz) // self.per_rank)
        else:
            top = self.spec.numel - target.rank * self.per_rank
        if top <= getattr(target, self.axis):
            return target
        limit = min(self.dense, self.cost(target) + amount)
        return self.problem.grow(target, self.spec, self.axis, top, limit)

    def _traded(self, target: Target, ranks: int, slack: int) -> Target | None:
        # To the next multiple at least, or nothing would move.
        change = max(self.multiple, abs(ranks) // self.multiple * self.multiple)
        rank = min(max(target.rank + (change if ranks > 0 else -change), self.ranks[0]), self.ranks[-1])
        if self.axis == "rank" or rank == target.rank:
            return None
        least = self._bare(replace(target, rank=rank, nnz=self.spec.numel))
        limit = min(self.dense, self.cost(target) + slack)
        if self.cost(least) > limit or least.params(self.spec) > self.spec.numel:
            return None
        return self.grown(least, limit - self.cost(least))


def layers_of(problem: Problem) -> dict[str, LayerMoves]:
    """Make the moves of every layer, in the order of names: draws do not depend on the order of the surfaces."""
    return _layers_of(_Same(problem))


@dataclass(frozen=True, eq=False)
class _Same:
    """Describe a problem as the key of a cache: only itself is equal to it."""

    problem: Problem

    def __hash__(self) -> int:
        return id(self.problem)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.problem is other.problem


@lru_cache(maxsize=2)
def _layers_of(same: _Same) -> dict[str, LayerMoves]:
    surfaces = sorted(same.problem.surfaces, key=lambda s: s.spec.name)
    return {surface.spec.name: LayerMoves(same.problem, surface) for surface in surfaces}


def _slack(problem: Problem, targets: Targets) -> int:
    return problem.budget.limit - problem.used(targets)


def spend_rest(problem: Problem, layers: Mapping[str, LayerMoves], targets: dict[str, Target]) -> dict[str, Target]:
    """Spend the rest of the budget that a move has left on the layers that gain most by it, one after the other."""
    while (slack := _slack(problem, targets)) > 0:
        grown = {name: layer.grown(targets[name], slack) for name, layer in layers.items()}
        able = [name for name in layers if grown[name] != targets[name]]
        if not able:
            break
        best = max(able, key=lambda name: layers[name].gain(targets[name], grown[name]))
        targets = {**targets, best: grown[best]}
    return targets


def _swap(
    problem: Problem, layers: Mapping[str, LayerMoves], targets: Targets, giver: str, taker: str, delta: int
) -> dict[str, Target] | None:
    give, take = layers[giver], layers[taker]
    slack, spare = _slack(problem, targets), give.spare(targets[giver])
    wanted = min(delta, take.room(targets[taker]) - slack)
    for amount in (min(wanted, spare), take.unit - slack):
        if wanted < 1 or not 1 <= amount <= spare:
            continue
        shrunk = give.shrunk(targets[giver], amount)
        freed = give.cost(targets[giver]) - give.cost(shrunk) + slack
        grown = take.grown(targets[taker], freed)
        if grown != targets[taker]:
            left = freed + take.cost(targets[taker]) - take.cost(grown)
            moved = spend_rest(problem, layers, {**targets, giver: give.grown(shrunk, left), taker: grown})
            return None if moved == targets else moved
    return None


def _trades(
    problem: Problem, layers: Mapping[str, LayerMoves], targets: Targets, delta: int
) -> list[tuple[str, Target, float]]:
    """`(layer, target, predicted gain)` of every trade of about `delta`."""
    found = []
    slack = _slack(problem, targets)
    for name, layer in layers.items():
        ranks = max(1, delta // layer.cost(Target(1, 0)))
        for sign in (-1, 1):
            moved = layer.traded(targets[name], sign * ranks, slack)
            if moved is not None:
                found.append((name, moved, layer.gain(targets[name], moved)))
    return found
