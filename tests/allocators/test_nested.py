from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from allocators import Knapsack
from allocators.nested import NAME, is_within, nested, options_around
from globalopt.errors import BudgetError
from globalopt.values.budget import Budget, Limits, Target
from globalopt.values.layer import NM
from globalopt.values.problem import Allocation, Problem
from tests.surfaces import problem

KEPT = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)


def family(p: Problem, kept=KEPT, **options) -> list[Allocation]:
    budgets = [Budget.fraction(k, p.specs, p.budget.accounting) for k in kept]
    return list(nested(p, budgets, Knapsack(**options)))


def assert_nested(p: Problem, found: list[Allocation]) -> None:
    for inner, outer in itertools.pairwise(found):
        for spec in p.specs:
            less, more = inner.targets[spec.name], outer.targets[spec.name]
            assert is_within(less, more, Target.dense(spec))


@pytest.mark.parametrize("accounting", ["params", "bytes"])
@pytest.mark.parametrize("seed", range(3))
def test_smaller_budgets_are_within_larger_ones_and_exact(seed, accounting):
    p = problem(0.5, seed=seed, layers=8, accounting=accounting)
    found = family(p)
    assert [a.budget.kept for a in found] == pytest.approx(KEPT, abs=2e-3)
    assert_nested(p, found)
    # What one nonzero costs in bytes: its value and its index.
    unit = 1 if accounting == "params" else 4
    for allocation in found:
        assert allocation.by == NAME
        assert allocation.budget.limit - unit < allocation.used <= allocation.budget.limit


@pytest.mark.parametrize("limits", [Limits(2), Limits(sparse=False), Limits(2, sparse=False)])
def test_every_point_is_within_the_limits(limits):
    p = problem(0.5, layers=8, limits=limits)
    found = family(p)
    assert_nested(p, found)
    for allocation in found:
        for spec in p.specs:
            limits.check(allocation.targets[spec.name], spec)


@pytest.mark.parametrize("seed", range(3))
def test_the_gap_is_the_price_of_nesting(seed):
    p = problem(0.5, seed=seed, layers=16)
    for allocation in family(p):
        free_problem = replace(p, budget=allocation.budget)
        free = Knapsack(exact=False).allocate(free_problem)
        assert free.bound is not None
        assert allocation.bound == free.bound
        assert allocation.predicted == pytest.approx(p.predicted(allocation.targets), rel=1e-12)
        assert free.bound <= allocation.predicted
        # A family has ranks between the options too, which can be worth a little more.
        exact = Knapsack().allocate(free_problem)
        assert exact.predicted <= allocation.predicted * (1 + 2e-3)
        if allocation.budget.kept < 0.7:
            assert allocation.predicted <= 1.15 * exact.predicted


def test_the_smallest_budget_is_the_knapsack_and_the_order_given_does_not_matter():
    p = problem(0.1, seed=1)
    found = family(p)
    assert found[0].targets == Knapsack().allocate(p).targets
    assert family(p, sorted(KEPT, reverse=True)) == found


@pytest.mark.parametrize("seed", range(3))
def test_under_a_pattern_only_ranks_grow(seed):
    p = problem(0.9, seed=seed, pattern=NM(2, 4))
    found = family(p, (0.5, 0.6, 0.7, 0.8, 1.0))
    assert_nested(p, found)
    assert all(t.nnz == NM(2, 4).nnz(spec) for a in found for spec in p.specs for t in [a.targets[spec.name]])
    ranks = [sum(t.rank for t in a.targets.values()) for a in found]
    assert ranks == sorted(ranks)
    assert ranks[0] == 0 < ranks[-1]
    with pytest.raises(BudgetError, match=r"Raise --budget to at least 0\.5"):
        family(p, (0.6, 0.4))


def test_the_whole_budget_is_the_dense_model():
    p = problem(1.0, seed=2)
    whole = family(p, (0.5, 1.0))[1]
    assert all(whole.targets[spec.name] == Target.dense(spec) for spec in p.specs)
    assert whole.predicted == whole.bound == whole.gap == 0.0


def test_the_relaxation_alone_gives_the_same_bounds():
    p = problem(0.5, seed=3)
    assert [a.bound for a in family(p, exact=False)] == [a.bound for a in family(p)]


def test_options_around_a_target_keep_their_prices():
    surface = problem(0.5).surfaces[1]
    dense = Target.dense(surface.spec)
    outside = options_around(surface, Target(1, 71))
    edge = {Target(rank, 71) for rank in (1, 2, 3)}
    assert set(outside.targets) == {t for t in surface.targets if t.rank >= 1 and t.nnz >= 71} | edge | {dense}
    for target in (*outside.targets, Target(1, 80), Target(2, 100)):
        assert outside.predict(target) == surface.predict(target)
    assert set(options_around(surface, Target.zero()).targets) == set(surface.targets)
    assert options_around(surface, dense).targets == (dense,)


def test_a_rank_whose_options_start_beyond_the_target_is_not_offered_there():
    surface = problem(0.5).surfaces[1]
    kept = [(t, e) for t, e in zip(surface.targets, surface.error, strict=True) if t.rank != 2 or t.nnz >= 96]
    surface = replace(surface, targets=tuple(t for t, _ in kept), error=tuple(e for _, e in kept))
    assert {t.rank for t in options_around(surface, Target(0, 70)).targets if t.nnz == 70} == {0, 1, 3}
