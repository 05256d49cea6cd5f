"""Groups of equal price: an allocation as counts of groups, so that every choice of so many meets the budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from globalopt.values.budget import Target
from globalopt.values.problem import Problem
from globalopt.values.surface import ErrorSurface


@dataclass(frozen=True)
class Stack:
    """Describe the rank part or the sparse part of one layer, cut into groups ordered by importance.

    Args:
        name: of the layer.
        axis: "rank" or "nnz".
        size: how many groups there are.
        start: how many of them the start keeps.
        paid: cost of the part in the start, in the budget's unit.
        dense: cost of the dense layer.
    """

    name: str
    axis: str
    size: int
    start: int
    paid: int
    dense: int

    def price(self, count: int, group: int) -> int:
        """Compute the price of `count` groups: the start's, plus or minus `group` for each of them; 0 for none."""
        return self.paid + (count - self.start) * group if count else 0


class Groups:
    """Describe the allocations around a start that have its cost, as counts of groups per stack.

    Every layer has a stack of rank groups and one of sparse groups (under a pattern of rank groups alone); all groups
    of the problem have one price `g = ceil(price of all parts / groups)`. `c_r` rank and `c_s` sparse groups of a
    layer have the price `P = start's price + g (c_r - start's) + g (c_s - start's)`: the layer gets the rank that the
    price of `c_r` buys, rounded down, and the rest of P buys entries, to the unit. So a group smaller than a direction
    needs no rule of its own, and the counts of the start are the start itself. A rank above those of the surface, or
    beside which the surface offers more entries than P buys, is lowered until the surface predicts its error. A layer
    whose price is that of the dense layer is dense. Without sparse parts there are rank groups alone; ranks are within
    the problem's limits.

    Args:
        problem: surfaces, budget, pattern; every layer has options in one storage.
        start: targets within the budget.
        groups: about how many there are in all.
    """

    def __init__(self, problem: Problem, start: Mapping[str, Target], groups: int) -> None:
        self.problem = problem
        self._layers = {s.spec.name: _LayerPrices(problem, s) for s in problem.surfaces}
        names = sorted(self._layers)
        tops = {name: self._layers[name].tops() for name in names}
        self.price = max(1, -(-sum(sum(top.values()) for top in tops.values()) // groups))
        self.stacks = [
            self._stack(name, axis, top, start[name]) for name in names for axis, top in tops[name].items() if top
        ]
        self._columns: dict[str, list[int]] = {name: [] for name in names}
        for column, stack in enumerate(self.stacks):
            self._columns[stack.name].append(column)
        self._known: dict[tuple[str, tuple[int, ...]], tuple[Target, float]] = {}

    @property
    def start(self) -> Tensor:
        """The counts of the start, (stacks,)."""
        return torch.tensor([stack.start for stack in self.stacks], dtype=torch.int64)

    def targets(self, counts: Tensor) -> dict[str, Target]:
        """Return the targets of `counts` (stacks,), which are within the budget whenever they sum to the start's."""
        return {name: self._priced(name, counts[columns].tolist())[0] for name, columns in self._columns.items()}

    def predicted(self, counts: Tensor) -> Tensor:
        """Predict the errors (samples,) float64 of `counts` (samples, stacks)."""
        total = torch.zeros(len(counts), dtype=torch.float64)
        for name, columns in self._columns.items():
            distinct, which = counts[:, columns].unique(dim=0, return_inverse=True)
            errors = [self._priced(name, row)[1] for row in distinct.tolist()]
            total += torch.tensor(errors, dtype=torch.float64)[which]
        return total

    def _stack(self, name: str, axis: str, top: int, target: Target) -> Stack:
        layer = self._layers[name]
        paid = layer.paid(target)[axis]
        start, remainder = divmod(paid, self.price)
        size = max(start, math.ceil((top - remainder) / self.price))
        return Stack(name, axis, size, start, paid, layer.dense)

    def _priced(self, name: str, counts: Sequence[int]) -> tuple[Target, float]:
        key = name, tuple(counts)
        if key not in self._known:
            prices = {"rank": 0, "nnz": 0}
            for column, count in zip(self._columns[name], counts, strict=True):
                stack = self.stacks[column]
                prices[stack.axis] = stack.price(count, self.price)
            layer = self._layers[name]
            target = layer.bought(**prices)
            self._known[key] = target, layer.surface.predict(target)
        return self._known[key]


class _LayerPrices:
    """Describe the targets of one layer by price, under the problem's accounting and pattern."""

    def __init__(self, problem: Problem, surface: ErrorSurface) -> None:
        self.surface = surface
        self.spec = surface.spec
        self.budget = problem.budget
        self.pattern = problem.pattern
        self.limits = problem.limits
        nnz = self.pattern.nnz(self.spec) if self.pattern else 0
        (self.storage,) = surface.storages
        self.bare = Target(0, nnz, self.pattern, storage=self.storage)
        self.whole = replace(Target.dense(self.spec), storage=self.storage)
        self.base = self.budget.cost(self.bare, self.spec)
        self.per_rank = self.budget.cost(replace(self.bare, rank=1), self.spec) - self.base
        self.dense = self.budget.cost(self.whole, self.spec)
        self.most_rank = max(target.rank for target in surface.targets)

    def tops(self) -> dict[str, int]:
        """Return the highest useful price of each part."""
        if not self.limits.sparse:
            return {"rank": self.dense}
        ranks = {"rank": self.most_rank * self.per_rank}
        return ranks if self.pattern else {**ranks, "nnz": self.dense}

    def paid(self, target: Target) -> dict[str, int]:
        """Return the price of each part of `target`."""
        if not self.limits.sparse:
            return {"rank": self.budget.cost(target, self.spec)}
        rank = target.rank * self.per_rank
        return {"rank": rank, "nnz": self.budget.cost(target, self.spec) - self.base - rank}

    def bought(self, rank: int, nnz: int) -> Target:
        """Return the target for the prices `rank` and `nnz` together."""
        ranks = self.limits.floor(min(rank // self.per_rank, self.most_rank))
        if self.pattern is not None:
            return replace(self.bare, rank=ranks)
        price = rank + nnz
        if price >= self.dense:
            return self.whole
        if not self.limits.sparse:
            return Target(ranks, 0, storage=self.storage)
        while True:
            target = self.budget.grow(Target(ranks, 0, storage=self.storage), self.spec, "nnz", self.spec.numel, price)
            if not ranks or target.nnz >= self._least(ranks):
                return target
            ranks -= self.limits.rank_multiple

    def _least(self, rank: int) -> int:
        """Return the fewest entries that the surface offers beside so many directions or more."""
        return min(target.nnz for target in self.surface.targets if target.rank >= rank)
