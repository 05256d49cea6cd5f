"""Spend the rest of the budget that a grid of options leaves, to less than one unit of the free axis."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

import numpy as np

from globalopt.values.budget import Target
from globalopt.values.option_table import OptionTable
from globalopt.values.problem import Problem
from globalopt.values.sizes import Floats, Ints, Sizes


def spend(problem: Problem, targets: Mapping[str, Target]) -> dict[str, Target]:
    """Spend the rest of the budget of `targets` by layer name, as `spend_sizes` does."""
    table = problem.table
    return table.targets(spend_sizes(table, table.sizes(targets)))


def spend_sizes(table: OptionTable, sizes: Sizes) -> Sizes:
    """Spend the rest of the budget in nonzeros (in rank where only that is free), where it lowers the error fastest.

    Each step goes at most to the next option of the same layer, so the predicted error stays an interpolation
    between neighbouring options; the largest gain per unit of cost is taken first. Targets that exceed the budget are
    returned as they are: `Problem.finish` refuses them.
    """
    slack = table.slack(sizes)
    if slack <= 0:
        return sizes
    place, rank, nnz = sizes.place, sizes.rank.copy(), sizes.nnz.copy()
    axis = rank if table.axis == "rank" else nnz
    offers = _offers(table, np.arange(len(place)), place, rank, nnz)
    # Of equal gains the first name.
    queue = list(zip((-offers[1]).tolist(), offers[0].tolist(), offers[2].tolist(), strict=True))
    heapq.heapify(queue)
    while slack > 0 and queue:
        _, number, step = heapq.heappop(queue)
        layer = np.array([number])
        at, here = place[layer], (rank[layer], nnz[layer])
        before = int(table.costs(at, *here)[0])
        reached = table.grow(at, *here, np.array([step]), np.array([before + slack]))
        slack -= int(table.costs(at, *reached)[0]) - before
        moved = (reached[0][0], reached[1][0]) != (here[0][0], here[1][0])
        rank[layer], nnz[layer] = reached
        if moved and axis[number] == step:
            for offer in zip(*_offers(table, layer, at, *reached), strict=True):
                heapq.heappush(queue, (-float(offer[1]), number, int(offer[2])))
    return Sizes(place, rank, nnz)


def _offers(table: OptionTable, layer: Ints, place: Ints, rank: Ints, nnz: Ints) -> tuple[Ints, Floats, Ints]:
    """Find the layers with a next larger option, its gain per unit of cost, and its value of the axis."""
    step = table.next_option(place, rank, nnz)
    then = (step, nnz) if table.axis == "rank" else (rank, step)
    # A dense layer cannot grow.
    can = (step >= 0) & (then[0] * table.per_rank[place] + then[1] <= table.numel[place])
    layer, place, rank, nnz, step = layer[can], place[can], rank[can], nnz[can], step[can]
    then = then[0][can], then[1][can]
    cost = table.costs(place, *then) - table.costs(place, rank, nnz)
    gain = table.predict(place, rank, nnz) - table.predict(place, *then)
    return layer, gain / np.maximum(cost, 1), step
