"""Laws that every row of the allocator table obeys; a new row is tested at once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from allocators import ALLOCATORS, get_allocator
from globalopt.errors import BudgetError
from globalopt.protocols import Reads
from globalopt.values.budget import Budget, Limits, Target
from globalopt.values.layer import NM
from globalopt.values.problem import Problem
from globalopt.values.storage import PLAIN, Storage
from tests.objectives import BentObjective
from tests.reference.knapsack import best_on_grid
from tests.surfaces import problem

CASES = [
    pytest.param({"kept": kept, "accounting": accounting, "pattern": pattern}, id=f"{kept}-{accounting}-{pattern}")
    for kept, accounting, pattern in [
        (0.3, "params", None),
        (0.5, "params", None),
        (0.9, "params", None),
        (0.5, "bytes", None),
        (0.6, "params", NM(2, 4)),
        (0.7, "bytes", NM(2, 4)),
    ]
]

MENU = (PLAIN, Storage(8, 8), Storage(4, 8))
MIXED = [
    pytest.param({"kept": kept, "accounting": "bytes", "pattern": pattern, "storages": storages}, id=name)
    for name, kept, pattern, storages in [
        ("any of three", 0.45, None, MENU),
        ("4 bits", 0.3, None, (Storage(4, 8),)),
        ("2:4", 0.45, NM(2, 4), MENU),
    ]
]


LIMITED = [
    pytest.param({"kept": kept, "accounting": accounting, "pattern": pattern, "limits": limits}, id=name)
    for name, kept, accounting, pattern, limits in [
        ("even ranks", 0.4, "params", None, Limits(2)),
        ("even ranks in bytes", 0.6, "bytes", None, Limits(2)),
        ("triples, at most 4", 0.5, "params", None, Limits(3, 4)),
        ("no rank", 0.5, "params", None, Limits(max_rank=0)),
        ("2:4 and even ranks", 0.75, "params", NM(2, 4), Limits(2)),
        ("2:4 and even ranks in bytes", 0.85, "bytes", NM(2, 4), Limits(2)),
        ("factors", 0.4, "params", None, Limits(sparse=False)),
        ("factors of even ranks", 0.6, "params", None, Limits(2, sparse=False)),
        ("factors of even ranks in bytes", 0.3, "bytes", None, Limits(2, sparse=False)),
    ]
]


VARIANTS = {
    "bernoulli": (
        {"groups": "150", "spread": "0.15", "updates": "3", "samples": "4"},
        {"preset": "cap"},
    ),
    "evolution": ({"generations": "3"}, {"preset": "evopress", "generations": "2"}),
    "optuna": ({"trials": "6"}, {"sampler": "cmaes", "trials": "12"}),
    "auto": ({"rounds": "2", "designs": "4", "local": "false"},),
}
"""Options under which an allocator is tested instead of its defaults: presets of their own, and searches cut short."""


@pytest.fixture(
    params=[
        pytest.param((name, options), id="-".join((name, *options.values())))
        for name in sorted(ALLOCATORS)
        for options in VARIANTS.get(name, ({},))
    ]
)
def allocator(request):
    return get_allocator(*request.param)


def solve(allocator, case, seed=0):
    p = problem(seed=seed, **case)
    return p, allocator.allocate(p, BentObjective(p))


@pytest.mark.parametrize("case", CASES)
def test_budget_is_met_and_never_exceeded(allocator, case):
    p, found = solve(allocator, case)
    assert p.used(found.targets) == found.used <= p.budget.limit
    # What cannot be spent is less than the cheapest unit of what is free, for some layer that can still grow.
    step = 1 if p.pattern is None else min(spec.d_out + spec.d_in for spec in p.specs)
    unit = step * (2 if p.budget.accounting == "bytes" else 1)
    grown = all(t.params(s) + step > s.numel for s in p.specs for t in [found.targets[s.name]])
    assert p.budget.limit - found.used < (2 * unit if p.budget.accounting == "bytes" else unit) or grown or p.pattern


@pytest.mark.parametrize("case", CASES)
def test_every_target_fits_its_layer_and_pattern(allocator, case):
    p, found = solve(allocator, case)
    assert list(found.targets) == [spec.name for spec in p.specs]
    for spec in p.specs:
        target = found.targets[spec.name].check(spec)
        assert target.pattern == p.pattern


@pytest.mark.parametrize("case", LIMITED)
def test_every_target_is_within_the_limits(allocator, case):
    p, found = solve(allocator, case)
    assert p.used(found.targets) == found.used <= p.budget.limit
    for spec in p.specs:
        target = found.targets[spec.name]
        assert target.rank % p.limits.rank_multiple == 0
        assert p.limits.max_rank is None or target.rank <= p.limits.max_rank
        assert p.limits.sparse or target.nnz == 0 or target == Target.dense(spec)
        assert target.pattern == p.pattern
    if p.axis == "nnz":
        # What ranks leave of the budget goes to nonzeros, so that the limits cost none of it.
        assert p.budget.limit - found.used < (4 if p.budget.accounting == "bytes" else 1)


@pytest.mark.parametrize("case", MIXED)
def test_storages_are_of_the_menu_and_pay_for_themselves(allocator, case):
    p, found = solve(allocator, case)
    assert p.used(found.targets) == found.used <= p.budget.limit
    assert {target.storage for target in found.targets.values()} <= set(case["storages"])
    assert found.predicted == pytest.approx(sum(s.predict(found.targets[s.spec.name]) for s in p.surfaces))
    if len(case["storages"]) > 1 and p.pattern is None:
        plain = problem(**{**case, "storages": (PLAIN,)})
        assert found.predicted < allocator.allocate(plain, BentObjective(plain)).predicted


@pytest.mark.parametrize("case", CASES[:2])
def test_same_seed_same_answer(allocator, case):
    assert solve(allocator, case)[1] == solve(allocator, case)[1]


def test_only_those_that_say_so_use_the_objective(allocator):
    assert allocator.version >= 1
    p = problem(0.5)
    objective = BentObjective(p)
    found = allocator.allocate(p, objective)
    assert (objective.tokens > 0) == (Reads.OBJECTIVE in allocator.reads)
    if Reads.OBJECTIVE not in allocator.reads:
        assert allocator.allocate(p) == found


def test_order_of_layers_does_not_matter(allocator):
    p, found = solve(allocator, {"kept": 0.4})
    turned = replace(p, surfaces=p.surfaces[::-1])
    again = allocator.allocate(turned, BentObjective(turned))
    assert dict(again.targets) == dict(found.targets)


@pytest.mark.parametrize("seed", range(3))
def test_not_better_than_the_best_there_is(allocator, seed):
    """A miscounted cost shows as an error below the exact optimum of a slightly larger budget."""
    p = problem(0.5, seed=seed)
    found = allocator.allocate(p, BentObjective(p))
    # Between options the error is interpolated, so the grid optimum with one option's slack bounds it.
    slack = max(spec.numel // 8 + 1 for spec in p.specs)
    roomy = Problem(p.surfaces, Budget(p.budget.limit + slack, p.budget.total), p.pattern, p.seed)
    assert found.predicted >= best_on_grid(roomy) - 1e-12


def test_budget_below_the_floor_raises(allocator):
    with pytest.raises(BudgetError, match=r"Raise --budget to at least 0\.5"):
        problem(0.4, pattern=NM(2, 4))


def test_whole_budget_keeps_everything(allocator):
    _, found = solve(allocator, {"kept": 1.0})
    assert found.predicted == 0.0
