"""Stack the options of all layers in arrays, so that a step over all of them is a few array operations."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from globalopt.errors import UsageError
from globalopt.values.budget import Budget, Limits, Target, bytes_by_part, index_bits, params_kept
from globalopt.values.sizes import Floats, Ints, Sizes
from globalopt.values.surface import no_option

if TYPE_CHECKING:
    from globalopt.values.layer import NM
    from globalopt.values.storage import Storage
    from globalopt.values.surface import ErrorSurface


class OptionTable:
    """Describe the options of all layers, flattened: ordered by the name of the layer, storage, rank and nonzeros.

    A layer has a place for every storage that it has options in, most bits first; where all have one storage, places
    are layers. Methods take arrays over some places, `(place, rank, nnz)` of equal shapes; they compute what `Target`,
    `Budget` and `ErrorSurface` compute for one layer. All targets are of the pattern of the table, and without signs.

    Of every layer: `every`, its first place. Of every place: `owner`, its layer; `storages`, `d_out`, `d_in`, `numel`,
    `per_rank`. Of every option: `place`, `layer`, `rank`, `nnz`, `error`, `cost`.

    Args:
        surfaces: one per layer, in any order.
        budget: its accounting is that of the costs.
        pattern: of every `S`, or None.
        limits: of the ranks.
    Raises:
        UsageError: an option has another pattern, or signs.

    >>> from allocators.example import example_problem
    >>> table = example_problem().table
    >>> table.names[:2], len(table.error), table.starts.tolist()
    (('blocks.0.q_proj', 'blocks.0.up_proj'), 86, [0, 21, 43, 64])
    >>> table.predict(np.array([0, 2]), np.array([0, 0]), np.array([36, 36])).round(4).tolist()
    [0.0391, 0.5859]
    """

    def __init__(self, surfaces: Sequence[ErrorSurface], budget: Budget, pattern: NM | None, limits: Limits) -> None:
        ordered = sorted(surfaces, key=lambda surface: surface.spec.name)
        for surface in ordered:
            if any(target.pattern != pattern or target.signs for target in surface.targets):
                raise UsageError(f"Layer {surface.spec.name} has options of another pattern than {pattern}, or signs.")
        self.budget, self.pattern, self.limits = budget, pattern, limits
        self.specs = tuple(surface.spec for surface in ordered)
        self.names = tuple(spec.name for spec in self.specs)
        self.storages = tuple(storage for surface in ordered for storage in surface.storages)
        menus = np.array([len(surface.storages) for surface in ordered], np.int64)
        self.owner: Ints = np.repeat(np.arange(len(ordered)), menus)
        self.every: Ints = np.cumsum(menus) - menus
        parts = [surface.arrays for surface in ordered]
        self.rank: Ints = np.concatenate([part[1] for part in parts])
        self.nnz: Ints = np.concatenate([part[2] for part in parts])
        self.error: Floats = np.concatenate([part[3] for part in parts])
        self.place: Ints = np.concatenate([part[0] + first for part, first in zip(parts, self.every, strict=True)])
        self.layer: Ints = self.owner[self.place]
        self.starts: Ints = np.searchsorted(self.layer, np.arange(len(parts)))
        places = [self.specs[layer] for layer in self.owner]
        self.d_out = np.array([spec.d_out for spec in places], np.int64)
        self.d_in = np.array([spec.d_in for spec in places], np.int64)
        self.numel = self.d_out * self.d_in
        self.per_rank = self.d_out + self.d_in
        self._value_bits = np.array([storage.values for storage in self.storages], np.int64)
        self._factor_bits = np.array([storage.factors for storage in self.storages], np.int64)
        self.cost = self.costs(self.place, self.rank, self.nnz)
        # A row holds the options of one place and rank.
        self._first = np.flatnonzero(_changes(self.place) | _changes(self.rank))
        self._last = np.append(self._first[1:], len(self.rank)) - 1
        self._row = np.repeat(np.arange(len(self._first)), self._last - self._first + 1)
        every = np.arange(len(self.owner))
        self._row_start = np.searchsorted(self.place[self._first], every, "left")
        self._row_end = np.searchsorted(self.place[self._first], every, "right") - 1
        # Keys that ascend over the whole table: a search in one row of one place is a search in all of them.
        self._ranks, self._counts = int(self.rank.max()) + 1, int(self.nnz.max()) + 1
        self._row_keys = self.place[self._first] * self._ranks + self.rank[self._first]
        self._keys = self._row * self._counts + self.nnz
        self._hull: tuple[Ints, Floats] | None = None

    # ------------------------------------------------------------------------------------ targets and costs

    def sizes(self, targets: Mapping[str, Target]) -> Sizes:
        """Return targets by layer name as arrays; `UsageError` where one is in a storage that its layer lacks."""
        found = [targets[name] for name in self.names]
        place = [self._place(layer, target) for layer, target in enumerate(found)]
        rank, nnz = [target.rank for target in found], [target.nnz for target in found]
        return Sizes(np.array(place, np.int64), np.array(rank, np.int64), np.array(nnz, np.int64))

    @cached_property
    def _menus(self) -> list[dict[Storage, int]]:
        """The places of every layer by storage."""
        menus: list[dict[Storage, int]] = [{} for _ in self.names]
        for place, (layer, storage) in enumerate(zip(self.owner.tolist(), self.storages, strict=True)):
            menus[layer][storage] = place
        return menus

    def _place(self, layer: int, target: Target) -> int:
        menu = self._menus[layer]
        if target.storage not in menu:
            raise no_option(self.specs[layer], target.storage, menu)
        return menu[target.storage]

    def others(self, place: Ints) -> tuple[Ints, Ints]:
        """List the other places of layers that are at `place` (n,): which of the n, and where they could be."""
        counts = np.bincount(self.owner, minlength=len(self.names))[self.owner[place]]
        which = np.repeat(np.arange(len(place)), counts)
        first = self.every[self.owner[place]][which]
        there = first + np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
        moved = there != place[which]
        return which[moved], there[moved]

    def chosen(self, options: Ints) -> Sizes:
        """Return the targets of one option per layer, given by their places in the table (layers,)."""
        return Sizes(self.place[options], self.rank[options], self.nnz[options])

    def targets(self, sizes: Sizes) -> dict[str, Target]:
        """Return arrays as targets by layer name."""
        parts = zip(self.names, *(part.tolist() for part in sizes.arrays), strict=True)
        return {name: Target(rank, nnz, self.pattern, storage=self.storages[place]) for name, place, rank, nnz in parts}

    def costs(self, place: Ints, rank: Ints, nnz: Ints) -> Ints:
        """Compute the costs of targets, in the budget's unit."""
        d_out, d_in = self.d_out[place], self.d_in[place]
        if self.budget.accounting == "params":
            return params_kept(rank, nnz, 0, d_out, d_in)
        bits = index_bits(self.pattern), self._value_bits[place], self._factor_bits[place]
        return bytes_by_part(rank, nnz, 0, d_out, d_in, *bits).total

    def used(self, sizes: Sizes) -> int:
        """Sum the costs of one target per layer."""
        return int(self.costs(*sizes.arrays).sum())

    def slack(self, sizes: Sizes) -> int:
        """Compute the rest of the budget."""
        return self.budget.limit - self.used(sizes)

    @cached_property
    def dense(self) -> Ints:
        """The costs of the dense layers in 16 bits, by place, (places,)."""
        if self.budget.accounting == "params":
            return self.numel
        return bytes_by_part(0, self.numel, 0, self.d_out, self.d_in).total

    @property
    def axis(self) -> str:
        """The field of a target that uses up the budget, as `Problem.axis`."""
        return "nnz" if self.pattern is None and self.limits.sparse else "rank"

    def floor(self, rank: Ints) -> Ints:
        """Compute the largest ranks within the limits that are at most `rank`, as `Limits.floor`."""
        most = rank if self.limits.max_rank is None else np.minimum(rank, self.limits.max_rank)
        return most // self.limits.rank_multiple * self.limits.rank_multiple

    def grow(self, place: Ints, rank: Ints, nnz: Ints, top: Ints, limit: Ints) -> tuple[Ints, Ints]:
        """Raise the ranks or the nonzeros, whichever is the axis, within costs and limits, as `Problem.grow` does.

        Args:
            top: the largest values of the axis; targets above them stay.
            limit: the largest costs.
        Returns: ranks and nonzeros.
        """
        step = 1
        if self.axis == "rank":
            step = self.limits.rank_multiple
            top = self.floor(top)
        start = rank if self.axis == "rank" else nnz

        def at(steps: Ints) -> tuple[Ints, Ints]:
            raised = start + steps * step
            return (raised, nnz) if self.axis == "rank" else (rank, raised)

        high = np.maximum(0, (top - start) // step)
        whole = self.costs(place, *at(high)) <= limit
        low = np.where(whole, high, 0)
        while bool((high - low > 1).any()):
            middle = (low + high) // 2
            fits = self.costs(place, *at(middle)) <= limit
            low, high = np.where(fits, middle, low), np.where(fits, high, middle)
        return at(low)

    # ------------------------------------------------------------------------------------ predictions

    def predict(self, place: Ints, rank: Ints, nnz: Ints) -> Floats:
        """Interpolate the errors of targets, as `ErrorSurface.predict` does."""
        return self.between_rows(place, rank, lambda row: self._in_row(row, nnz, place))

    def predicted(self, sizes: Sizes) -> float:
        """Sum the predicted errors of one target per place."""
        return math.fsum(self.predict(*sizes.arrays).tolist())

    def between_rows(self, place: Ints, rank: Ints, values: Callable[[Ints], NDArray]) -> Floats:
        """Interpolate values of rows linearly in rank; constant outside the ranks of the place's options.

        Args:
            values: computes those of the rows with these numbers, one per element of `place`.
        """
        right = np.searchsorted(self._row_keys, place * self._ranks + np.minimum(rank, self._ranks - 1))
        right = np.where(rank >= self._ranks, self._row_end[place] + 1, right)
        first, last = self._row_start[place], self._row_end[place]
        low, high = (right - 1).clip(first, last), right.clip(first, last)
        x0, x1 = self.rank[self._first[low]], self.rank[self._first[high]]
        y0, y1 = values(low), values(high)
        t = (rank - x0) / np.where(high > low, x1 - x0, 1)
        return y0 + np.where(high > low, t, 0.0) * (y1 - y0)

    def _in_row(self, row: Ints, nnz: Ints, place: Ints) -> Floats:
        """Interpolate errors in nonzeros, between the options of rows."""
        right = np.searchsorted(self._keys, row * self._counts + np.minimum(nnz, self._counts - 1))
        right = np.where(nnz >= self._counts, self._last[row] + 1, right)
        first, last = self._first[row], self._last[row]
        low, high = (right - 1).clip(first, last), right.clip(first, last)
        x0, x1 = self.nnz[low], self.nnz[high]
        y0, y1 = self.error[low], self.error[high]
        t = (nnz - x0) / np.where(high > low, x1 - x0, 1)
        return y0 + np.where(high > low, t, 0.0) * (y1 - y0)

    def scaled(self, factors: Floats) -> OptionTable:
        """Return the same table with the errors of every layer times its factor, (layers,), all above 0."""
        options, slopes = self.hull
        made = self.with_errors(self.error * factors[self.layer])
        # What is convex stays so: the options of the hull are the same.
        made._hull = options, slopes * factors[self.layer[options]]
        return made

    def with_errors(self, error: Floats) -> OptionTable:
        """Return the same table with other errors, one per option."""
        made = copy.copy(self)
        made.error, made._hull = error, None
        return made

    # ------------------------------------------------------------------------------------ rows and neighbours

    @cached_property
    def most_rank(self) -> Ints:
        """The largest rank offered at every place, (places,)."""
        return self.rank[self._first[self._row_end]]

    @cached_property
    def least_rank(self) -> Ints:
        """The smallest rank offered at every place, (places,)."""
        return self.rank[self._first[self._row_start]]

    @cached_property
    def share(self) -> Floats:
        """The part of the parameters of every option that is in its rank; 0 where nothing is kept."""
        return self.shares(self.place, self.rank, self.nnz)

    def shares(self, place: Ints, rank: Ints, nnz: Ints) -> Floats:
        """Compute the parts of the parameters that are in the rank, as `Target.rank_share`."""
        return rank * self.per_rank[place] / np.maximum(1, rank * self.per_rank[place] + nnz)

    def least_nnz(self, place: Ints, rank: Ints) -> Ints:
        """Compute the fewest nonzeros at which errors beside these ranks are predicted and not a constant."""
        return np.ceil(self.between_rows(place, rank, lambda row: self.nnz[self._first[row]])).astype(np.int64)

    def next_option(self, place: Ints, rank: Ints, nnz: Ints) -> Ints:
        """Find the next larger value of the axis that an option has; -1 where there is none.

        Along the nonzeros these are the options of the same rank. Where that is between two options, or has one option
        alone, those of all ranks count.
        """
        if self.axis == "rank":
            row = np.searchsorted(self._row_keys, place * self._ranks + np.minimum(rank, self._ranks - 1), "right")
            inside = row <= self._row_end[place]
            return np.where(inside, self.rank[self._first[np.where(inside, row, 0)]], -1)
        key = place * self._ranks + np.minimum(rank, self._ranks - 1)
        row = np.searchsorted(self._row_keys, key).clip(max=len(self._row_keys) - 1)
        own = (self._row_keys[row] == key) & (rank < self._ranks) & (self._last[row] > self._first[row])
        count = np.minimum(nnz, self._counts - 1)
        option = np.searchsorted(self._keys, row * self._counts + count, "right")
        inside = own & (option <= self._last[row])
        found = np.where(inside, self.nnz[np.where(inside, option, 0)], -1)
        if not bool(own.all()):
            levels = self._levels
            place = np.searchsorted(levels, place * self._counts + count, "right").clip(max=len(levels) - 1)
            inside = ~own & (levels[place] // self._counts == place) & (levels[place] % self._counts > nnz)
            found = np.where(inside, levels[place] % self._counts, found)
        return found

    @cached_property
    def _levels(self) -> Ints:
        """The distinct nonzeros of all options of every place, as ascending keys."""
        return np.unique(self.place * self._counts + self.nnz)

    # ------------------------------------------------------------------------------------ the convex hull

    @cached_property
    def _by_cost(self) -> Ints:
        """The order of the options by layer, cost, rank and nonzeros."""
        return np.argsort(self.layer * (int(self.cost.max()) + 1) + self.cost, kind="stable")

    @property
    def hull(self) -> tuple[Ints, Floats]:
        """The options on the lower convex hull of errors over costs, by layer and ascending cost, and their slopes.

        The slope of an option is the fall of the error per unit of cost from the one before it: positive, and strictly
        descending in a layer; infinite for its first.
        """
        if self._hull is None:
            self._hull = self._make_hull()
        return self._hull

    def _make_hull(self) -> tuple[Ints, Floats]:
        order = self._by_cost
        # Of equal costs the least error, of equal errors the least rank.
        layer, cost = self.layer[order], self.cost[order]
        order = order[first_least(self.error[order], np.flatnonzero(_changes(layer) | _changes(cost)))]
        # What costs more than the least error of a layer is never chosen.
        layer = self.layer[order]
        starts = np.flatnonzero(_changes(layer))
        order = order[np.arange(len(order)) <= first_least(self.error[order], starts)[layer]]
        while True:
            slopes = self._slopes(order)
            # An option above or on the line between its neighbours is no corner.
            inner = np.append((slopes[:-1] <= slopes[1:]) & np.isfinite(slopes[1:]), False)
            if not inner.any():
                return order, slopes
            order = order[~inner]

    def _slopes(self, order: Ints) -> Floats:
        layer, cost, error = self.layer[order], self.cost[order], self.error[order]
        slopes = np.full(len(order), np.inf)
        same = ~_changes(layer)[1:]
        np.divide(-np.diff(error), np.diff(cost), out=slopes[1:], where=same)
        return slopes


def _changes(values: NDArray) -> NDArray[np.bool_]:
    """Tell for every element whether it differs from the one before it; the first does."""
    return np.append(True, values[1:] != values[:-1])


def first_least(values: Floats, starts: Ints) -> Ints:
    """Find the place of the first of the least values of every segment.

    Args:
        values: (n,). starts: where the segments begin, ascending, the first at 0.

    >>> first_least(np.array([3.0, 1.0, 1.0, 5.0, 4.0]), np.array([0, 3])).tolist()
    [1, 4]
    """
    least = np.minimum.reduceat(values, starts)
    hit = np.flatnonzero(values <= np.repeat(least, np.diff(np.append(starts, len(values)))))
    return hit[np.searchsorted(hit, starts)]
