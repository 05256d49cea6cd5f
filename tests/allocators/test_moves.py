"""Moves between allocations: always of one cost, always legal, drawn as they say."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from scipy.stats import binom

from allocators import Knapsack, Uniform
from allocators._moves import Moves, default_delta, improving_share
from globalopt.values.budget import Target
from globalopt.values.layer import NM
from globalopt.values.problem import Problem
from tests.objectives import BentObjective
from tests.surfaces import problem

CASES = [
    pytest.param(kept, accounting, pattern, id=f"{kept}-{accounting}-{pattern}")
    for kept, accounting, pattern in [
        (0.3, "params", None),
        (0.9, "params", None),
        (0.3, "bytes", None),
        (0.8, "bytes", None),
        (0.6, "params", NM(2, 4)),
        (0.7, "bytes", NM(2, 4)),
    ]
]


def by_name(p: Problem, targets, move, *arguments) -> dict[str, Target] | None:
    """Make a move of targets by layer name."""
    found = move(Moves(p.table), p.table.sizes(targets), *arguments)
    return None if found is None else p.table.targets(found)


def random_swap(p, targets, delta, rng):
    return by_name(p, targets, Moves.random_swap, delta, rng)


def random_trade(p, targets, delta, rng):
    return by_name(p, targets, Moves.random_trade, delta, rng)


def guided(p, targets, delta, rng, temperature):
    return by_name(p, targets, Moves.guided, delta, rng, temperature)


def level_swap(p, targets, giver, taker, delta):
    return by_name(p, targets, Moves.swap, p.table.names.index(giver), p.table.names.index(taker), delta)


def trade(p, targets, name, ranks):
    return by_name(p, targets, Moves.trade, p.table.names.index(name), ranks)


MOVES = {
    "swap": random_swap,
    "trade": random_trade,
    "guided": lambda *arguments: guided(*arguments, temperature=0.5),
}


def check_legal(p: Problem, targets: dict[str, Target], slack: int) -> None:
    """Within the budget with at most `slack` unspent, and every target one its surface can price."""
    assert 0 <= p.budget.limit - p.used(targets) <= slack
    for surface in p.surfaces:
        spec = surface.spec
        target = targets[spec.name].check(spec)
        assert target.pattern == p.pattern
        assert target.params(spec) <= spec.numel
        assert p.budget.cost(target, spec) <= p.budget.cost(Target.dense(spec), spec)
        assert target.rank in range(4)


@pytest.mark.parametrize("kind", MOVES)
@pytest.mark.parametrize(("kept", "accounting", "pattern"), CASES)
def test_every_move_keeps_the_budget(kind, kept, accounting, pattern):
    moved = 0
    for seed in range(12):
        p = problem(kept, seed, accounting=accounting, pattern=pattern)
        rng = random.Random(seed)
        targets = dict((Knapsack(exact=False) if seed % 2 else Uniform()).allocate(p).targets)
        unspent = p.budget.limit - p.used(targets)
        # A 16-bit value with its index, or a rank of the largest layer; otherwise not one parameter.
        slack = (36 if pattern else 0) if accounting == "params" else (72 if pattern else 3)
        for _ in range(12):
            then = MOVES[kind](p, targets, rng.choice([1, 5, 40]), rng)
            if then is None:
                continue
            moved += 1
            assert then != targets
            if p.budget.accounting == "params" and pattern is None:
                changed = sum(then[name] != targets[name] for name in targets)
                assert changed in {"swap": (2,), "trade": (1,), "guided": (1, 2)}[kind]
            check_legal(p, then, max(slack, unspent))
            targets = then
    assert moved >= (0 if pattern and kind == "trade" else 50)


def test_a_swap_is_exact_in_parameters():
    p = problem(0.5)
    targets = dict(Uniform(rank_share=0.0).allocate(p).targets)
    moved = level_swap(p, targets, "layer.0", "layer.1", 7)
    assert moved is not None
    assert moved["layer.0"].nnz == targets["layer.0"].nnz - 7
    assert moved["layer.1"].nnz == targets["layer.1"].nnz + 7


def test_a_swap_moves_no_more_than_there_is():
    p = problem(0.5)
    targets = dict(Uniform(rank_share=0.0).allocate(p).targets)
    moved = level_swap(p, targets, "layer.0", "layer.1", 10_000)
    assert moved is not None
    assert moved["layer.0"] == Target.zero()
    assert p.used(moved) == p.used(targets)
    assert level_swap(p, moved, "layer.0", "layer.1", 1) is None


def test_a_trade_pays_rank_in_nonzeros():
    p = problem(0.5)
    targets = dict(Uniform(rank_share=0.0).allocate(p).targets)
    moved = trade(p, targets, "layer.1", 2)
    assert moved is not None
    assert moved["layer.1"] == Target(2, targets["layer.1"].nnz - 2 * 32)
    assert trade(p, moved, "layer.1", -2) == targets
    assert trade(p, targets, "layer.1", -1) is None


def test_nothing_moves_where_everything_is_kept():
    p = problem(1.0)
    dense = {spec.name: Target.dense(spec) for spec in p.specs}
    assert random_swap(p, dense, 5, random.Random(0)) is None


def test_uniform_swaps_are_uniform():
    p = problem(0.5, layers=4)
    targets = dict(Uniform(rank_share=0.0).allocate(p).targets)
    rng = random.Random(0)
    pairs: Counter[tuple[str, ...]] = Counter()
    for _ in range(1200):
        moved = random_swap(p, targets, 3, rng)
        assert moved is not None
        change = {name: moved[name].nnz - targets[name].nnz for name in targets}
        pairs[tuple(sorted(change, key=lambda name: change[name]))] += 1
    givers_and_takers = Counter((order[0], order[-1]) for order in pairs.elements())
    assert len(givers_and_takers) == 12
    assert all(
        binom.cdf(n, 1200, 1 / 12) > 1e-4 and binom.sf(n, 1200, 1 / 12) > 1e-4 for n in givers_and_takers.values()
    )


def test_guided_moves_gain_more_than_uniform_ones():
    p = problem(0.4, layers=8)
    targets = dict(Uniform().allocate(p).targets)
    before = p.predicted(targets)

    def mean_gain(move) -> float:
        rng = random.Random(1)
        return sum(before - p.predicted(move(p, targets, 10, rng) or targets) for _ in range(200)) / 200

    cold = mean_gain(lambda *arguments: guided(*arguments, temperature=0.1))
    warm = mean_gain(lambda *arguments: guided(*arguments, temperature=2.0))
    assert cold > warm > mean_gain(random_swap)


def test_the_optimum_has_no_improving_swaps_and_another_point_has():
    """With `bend=0` the surfaces know the true order, so the knapsack is optimal but for the grid."""
    p = problem(0.4, layers=8)
    best = dict(Knapsack().allocate(p).targets)
    settled = improving_share(p, BentObjective(p, bend=0), best, 100, random.Random(0))
    uniform = dict(Uniform().allocate(p).targets)
    rough = improving_share(p, BentObjective(p, bend=0), uniform, 100, random.Random(0))
    assert settled.tried == rough.tried == 100
    assert settled.improving <= 5
    assert settled.bound < 0.15
    assert rough.improving > 30
    assert rough.improving / 100 < rough.bound < 1


def test_the_bound_is_that_of_clopper_and_pearson():
    p = problem(0.4, layers=8)
    targets = dict(Uniform().allocate(p).targets)
    found = improving_share(p, BentObjective(p), targets, 60, random.Random(0))
    assert binom.cdf(found.improving, found.tried, found.bound) == pytest.approx(0.05)


def test_the_certificate_stops_at_the_limit():
    p = problem(0.4)
    objective = BentObjective(p, limit=2000)
    found = improving_share(p, objective, dict(Knapsack().allocate(p).targets), 100, random.Random(0))
    assert 0 < found.tried < 100
    assert objective.tokens <= 2000
    assert improving_share(p, BentObjective(p, limit=0), dict(Uniform().allocate(p).targets), 9, random.Random(0)) == (
        0,
        0,
        1.0,
    )


def test_default_step():
    p = problem(0.4)
    assert default_delta(p.table) == p.budget.total // (64 * 6)
