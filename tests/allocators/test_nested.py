from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from allocators import Knapsack
from allocators.nested import NAME, is_within, nested, options_within
from globalopt.errors import BudgetError
from globalopt.types import NM, Allocation, Budget, Problem, Target
from tests.surfaces import problem

KEPT = (0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


def family(p: Problem, kept=KEPT, **options) -> list[Allocation]:
    budgets = [Budget.fraction(k, p.specs, p.budget.accounting) for k in kept]
    return list(nested(p, budgets, Knapsack(**options)))


def assert_nested(p: Problem, found: list[Allocation]) -> None:
    for outer, inner in itertools.pairwise(found):
        for spec in p.specs:
            mine, theirs = inner.targets[spec.name], outer.targets[spec.name]
            assert is_within(mine, theirs, Target.dense(spec))


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


@pytest.mark.parametrize("seed", range(3))
def test_the_gap_is_the_price_of_nesting_and_small(seed):
    p = problem(0.5, seed=seed, layers=16)
    for allocation in family(p):
        free = Knapsack().allocate(replace(p, budget=allocation.budget))
        assert allocation.bound == free.bound
        assert allocation.predicted == pytest.approx(p.predicted(allocation.targets), rel=1e-12)
        assert free.predicted <= allocation.predicted * (1 + 1e-9)
        assert allocation.predicted <= 1.1 * free.predicted


def test_the_largest_budget_is_the_knapsack_and_the_order_given_does_not_matter():
    p = problem(0.9, seed=1)
    found = family(p)
    assert found[0].targets == Knapsack().allocate(p).targets
    assert family(p, sorted(KEPT)) == found


@pytest.mark.parametrize("seed", range(3))
def test_under_a_pattern_only_ranks_shrink(seed):
    p = problem(0.9, seed=seed, pattern=NM(2, 4))
    found = family(p, (1.0, 0.8, 0.7, 0.6, 0.5))
    assert_nested(p, found)
    assert all(t.nnz == NM(2, 4).nnz(spec) for a in found for spec in p.specs for t in [a.targets[spec.name]])
    ranks = [sum(t.rank for t in a.targets.values()) for a in found]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[-1] == 0 < ranks[0]
    with pytest.raises(BudgetError, match=r"Raise --budget to at least 0\.5"):
        family(p, (0.6, 0.4))


def test_everything_is_within_a_dense_layer():
    p = problem(1.0, seed=2)
    found = family(p, (1.0, 0.5))
    assert all(found[0].targets[spec.name] == Target.dense(spec) for spec in p.specs)
    assert found[0].predicted == found[0].bound == 0.0
    assert found[1].targets == Knapsack().allocate(replace(p, budget=found[1].budget)).targets


def test_the_bounds_of_the_relaxation_alone_are_the_same():
    p = problem(0.5, seed=3)
    assert [a.bound for a in family(p, exact=False)] == [a.bound for a in family(p)]


def test_options_within_a_target_keep_their_prices():
    surface = problem(0.5).surfaces[1]
    outer = Target(2, 71)
    inside = options_within(surface, outer)
    edge = [Target(rank, 71) for rank in range(3)]
    assert set(inside.targets) == {t for t in surface.targets if t.rank <= 2 and t.nnz <= 71} | set(edge)
    for target in (*inside.targets, Target(1, 13), Target(2, 70)):
        assert inside.predict(target) == surface.predict(target)
    # A target on the grid adds nothing, one inside a dense layer loses nothing.
    on_grid = surface.targets[3]
    assert len(options_within(surface, on_grid).targets) == 4
    assert options_within(surface, Target.dense(surface.spec)) is surface


def test_a_rank_whose_options_start_beyond_the_target_is_not_offered():
    surface = problem(0.5).surfaces[1]
    kept = [(t, e) for t, e in zip(surface.targets, surface.error, strict=True) if t.rank == 0 or t.nnz >= 96]
    surface = replace(surface, targets=tuple(t for t, _ in kept), error=tuple(e for _, e in kept))
    assert {t.rank for t in options_within(surface, Target(0, 70)).targets} == {0}
    # `outer` itself is always there.
    assert {t.rank for t in options_within(surface, Target(1, 70)).targets} == {0, 1}
