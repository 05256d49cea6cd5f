"""Work divided over processes: every item once, and no part much larger than it must be."""

from __future__ import annotations

import itertools
import random

import pytest

from globalopt.machine import ranks, shares


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_bins_hold_at_most_four_thirds_of_a_fair_share_or_of_the_largest_item(count):
    draw = random.Random(0)
    for items in (1, 5, 40):
        costs = [draw.uniform(1, 10) for _ in range(items)]
        owners = shares.bins(costs, count)
        loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == one) for one in range(count)]
        assert max(loads) <= max(max(costs), sum(costs) / count) + max(costs)
        assert set(owners) <= set(range(count))
        assert sum(loads) == pytest.approx(sum(costs))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 7), (5, 1), (4, 6), (64, 1)])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_grids_cover_every_cell_once(rows, columns, count):
    parts = [shares.grid(rows, columns, number, count) for number in range(count)]
    cells = [cell for down, across in parts for cell in itertools.product(down, across)]
    assert sorted(cells) == list(itertools.product(range(rows), range(columns)))


def test_grid_divides_what_there_is_more_of():
    assert shares.grid(8, 2, 0, 8) == (range(1), range(2))
    assert shares.grid(1, 16, 0, 8) == (range(1), range(2))


def test_one_process_has_all(monkeypatch):
    items = ["a", "b", "c"]
    assert ranks.share(items) == items
    found = []
    for number in range(2):
        monkeypatch.setattr(ranks, "_world", ranks.World(number, 2, 2, None))
        found += ranks.share(items)
    assert sorted(found) == items
