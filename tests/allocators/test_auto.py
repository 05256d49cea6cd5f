"""The default search beats its portfolio where the surfaces are wrong, and is never worse where they are right."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from allocators import Knapsack
from allocators._race import Race
from allocators.auto import Auto, portfolio
from globalopt.errors import UsageError
from globalopt.values.option_table import OptionTable
from tests.objectives import BentObjective
from tests.surfaces import problem


def starts(p):
    return portfolio(p, Knapsack().allocate(p).targets)


@pytest.mark.parametrize("seed", range(3))
def test_it_learns_what_the_surfaces_do_not_know(seed):
    p = problem(0.4, layers=10, seed=seed)
    objective = BentObjective(p, bend=0.6)
    found = Auto(local=False).allocate(p, objective)
    best = min(objective.true(start) for start in starts(p))
    assert objective.true(found.targets) < 0.99 * best
    assert objective.tokens <= objective.limit


@pytest.mark.parametrize("limit", [0, 1500, 4000, 12000])
def test_within_its_tokens_it_is_never_worse_than_the_best_start(limit):
    p = problem(0.4, layers=8)
    objective = BentObjective(p, bend=0.6, limit=limit)
    found = Auto().allocate(p, objective)
    assert objective.true(found.targets) <= min(objective.true(start) for start in starts(p))
    # The starts are looked at whatever the limit says.
    assert objective.tokens <= max(limit, len(starts(p)) * objective.chunks * objective.chunk_tokens)


def test_without_profiles_the_heuristics_are_left_out():
    p = problem(0.4)
    assert len(starts(replace(p, profiles={}))) == len(starts(p)) - 2
    Auto(rounds=1, designs=2, local=False).allocate(replace(p, profiles={}), BentObjective(p))


def test_the_race_is_guided_by_the_corrected_surfaces(monkeypatch):
    """They know the true multipliers of the layers better than the surfaces as they were predicted."""
    p = problem(0.4, layers=10)
    objective = BentObjective(p, bend=0.6)
    guides: list[OptionTable] = []

    class Spied(Race):
        def __init__(self, trials, starts, rng, table=None):
            guides.append(table or trials.problem.table)
            super().__init__(trials, starts, rng, table)

    monkeypatch.setattr("allocators.auto.Race", Spied)
    Auto().allocate(p, objective)
    (corrected,) = guides
    table = p.table
    wanted = np.log([objective.multipliers[name] for name in table.names])
    # Per layer the mean of what the correction multiplies its errors by.
    known = table.error > 0
    ratios = np.log(corrected.error[known] / table.error[known])
    found = np.bincount(table.layer[known], ratios) / np.bincount(table.layer[known])
    assert np.corrcoef(found, wanted)[0, 1] > 0.8
    assert np.std(wanted - found) < 0.6 * np.std(wanted)


def test_it_needs_an_objective():
    with pytest.raises(UsageError, match="evaluates the model"):
        Auto().allocate(problem(0.4))


def test_its_bound_is_that_of_the_surfaces():
    p = problem(0.4)
    assert Auto(rounds=0, local=False).allocate(p, BentObjective(p)).bound == Knapsack().allocate(p).bound
