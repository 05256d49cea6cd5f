"""The arrays of all layers' options say what targets, budgets and surfaces say of one layer."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from globalopt.errors import UsageError
from globalopt.values.budget import Limits, Target
from globalopt.values.layer import NM
from globalopt.values.storage import PLAIN, Storage
from tests.surfaces import problem

CASES = [
    ("params", None, Limits()),
    ("bytes", None, Limits(2)),
    ("params", NM(2, 4), Limits()),
    ("bytes", NM(2, 4), Limits(2)),
    ("params", None, Limits(sparse=False)),
    ("bytes", None, Limits(2, sparse=False)),
]


MENU = (PLAIN, Storage(8, 8), Storage(3, 6))


@pytest.mark.parametrize("storages", [(PLAIN,), MENU])
@pytest.mark.parametrize(("accounting", "pattern", "limits"), CASES)
def test_costs_predictions_and_growth_are_those_of_one_layer(accounting, pattern, limits, storages):
    p = problem(0.8, seed=1, layers=7, accounting=accounting, pattern=pattern, limits=limits, storages=storages)
    table, rng = p.table, random.Random(0)
    surfaces = {surface.spec.name: surface for surface in p.surfaces}
    assert table.storages == storages * 7
    for place, layer in enumerate(table.owner.tolist()):
        surface = surfaces[table.names[layer]]
        spec = surface.spec
        for _ in range(100 // len(storages)):
            rank, nnz = limits.floor(rng.randint(0, spec.max_rank)), rng.randint(0, spec.numel)
            kept = pattern.nnz(spec) if pattern else nnz if limits.sparse else 0
            target = Target(rank, kept, pattern, storage=table.storages[place])
            at = np.array([place]), np.array([target.rank]), np.array([target.nnz])
            assert table.costs(*at)[0] == p.budget.cost(target, spec)
            assert table.predict(*at)[0] == surface.predict(target)
            assert table.shares(*at)[0] == target.rank_share(spec)
            top, limit = rng.randint(getattr(target, p.axis), spec.numel), rng.randint(0, 2 * spec.numel)
            top = min(top, spec.max_rank) if p.axis == "rank" else top
            grown = p.grow(target, spec, p.axis, top, limit)
            found = table.grow(*at, np.array([top]), np.array([limit]))
            assert (found[0][0], found[1][0]) == (grown.rank, grown.nnz)


@pytest.mark.parametrize("storages", [(PLAIN,), MENU])
@pytest.mark.parametrize(("accounting", "pattern", "limits"), CASES)
def test_the_hull_holds_what_is_best_at_some_price(accounting, pattern, limits, storages):
    p = problem(0.8, seed=2, layers=5, accounting=accounting, pattern=pattern, limits=limits, storages=storages)
    table = p.table
    options, slopes = table.hull
    for name, surface in {surface.spec.name: surface for surface in p.surfaces}.items():
        layer = table.names.index(name)
        mine = options[table.layer[options] == layer]
        own = slopes[table.layer[options] == layer]
        assert own[0] == np.inf
        assert (np.diff(own) < 0).all()
        frontier = surface.frontier(p.budget)
        for price in [0.0, *(2.0 ** np.arange(-20, 5))]:
            best = min(error + price * cost for _, cost, error in frontier)
            assert (table.error[mine] + price * table.cost[mine]).min() == pytest.approx(best, rel=1e-12)


def test_scaled_errors_have_the_same_hull():
    table = problem(0.5, layers=6).table
    factors = np.exp(np.random.default_rng(0).normal(size=6))
    scaled = table.scaled(factors)
    again = table.with_errors(table.error * factors[table.layer])
    assert (scaled.hull[0] == again.hull[0]).all()
    assert scaled.hull[1] == pytest.approx(again.hull[1])


def test_options_of_another_pattern_are_refused():
    p = problem(0.8, pattern=NM(2, 4))
    with pytest.raises(UsageError, match="another pattern than None"):
        replace(p, pattern=None)
