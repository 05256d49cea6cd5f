"""Facts special to AlphaPruning's allocator."""

from __future__ import annotations

from dataclasses import replace

import pytest

from allocators import Alpha, Uniform
from globalopt.errors import UsageError
from globalopt.values.problem import Problem, Profile
from tests.allocators.test_owl import kept_by_block
from tests.surfaces import problem


def with_alphas(p: Problem, by_block: list[float]) -> Problem:
    return replace(p, profiles={s.name: Profile({}, by_block[s.block]) for s in p.specs})


def test_published_formula():
    """Sizes 2:1 (six layers), sparsity 0.5, ratios 0.7 and 1.3: eta = 0.5 * 3 / (2 * 0.7 + 1.3) = 0.5556."""
    p = problem(0.5, layers=6)
    sizes = [sum(s.numel for s in p.specs if s.block == b) for b in (0, 1)]
    found = Alpha().allocate(with_alphas(p, [2.0, 5.0]))
    eta = 0.5 * sum(sizes) / (0.7 * sizes[0] + 1.3 * sizes[1])
    assert kept_by_block(p, found.targets) == pytest.approx([1 - 0.7 * eta, 1 - 1.3 * eta], abs=7 / sizes[1])
    assert found.used == p.budget.limit


def test_a_block_is_the_plain_mean_of_its_layers():
    p = problem(0.5, layers=12)
    alphas = [2.0, 4.0, 2.0, 4.0] + [2.9] * 4 + [2.0, 6.0, 2.0, 6.0]
    spread = replace(p, profiles={f"layer.{i}": Profile({}, alpha) for i, alpha in enumerate(alphas)})
    assert Alpha().allocate(spread).targets == Alpha().allocate(with_alphas(p, [3.0, 2.9, 4.0])).targets


def test_heavier_tails_keep_more():
    p = with_alphas(problem(0.4, layers=12), [4.0, 2.0, 3.0])
    first, second, third = kept_by_block(p, Alpha().allocate(p).targets)
    assert first < third < second


def test_a_sparsity_above_one_drops_the_block_and_the_rest_pays():
    """Kept 0.2, ratios 0 and 2: sparsities 0 and 1.6; block 0 cannot stay whole, it gets all of the budget."""
    p = with_alphas(problem(0.2, layers=8), [2.0, 5.0])
    found = Alpha(epsilon=1.0).allocate(p)
    assert kept_by_block(p, found.targets) == pytest.approx([0.4, 0.0], abs=2 / 880)
    assert found.used == p.budget.limit


def test_equal_exponents_are_uniform():
    p = with_alphas(problem(0.5, layers=8), [3.0, 3.0])
    assert Alpha().allocate(p).targets == Uniform().allocate(p).targets


def test_bad_input():
    with pytest.raises(UsageError, match=r"'alpha' reads the layers' profiles"):
        Alpha().allocate(replace(problem(0.5), profiles={}))
    with pytest.raises(UsageError, match=r"epsilon.*got 1\.5"):
        Alpha(epsilon=1.5)
    with pytest.raises(UsageError, match="rank_share"):
        Alpha(rank_share=-1)
