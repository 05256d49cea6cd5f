"""Facts special to OWL's allocator, and to the shift that all block profiles share."""

from __future__ import annotations

from dataclasses import replace

import pytest

from allocators import Owl
from allocators._fractions import kept_targets
from globalopt.errors import UsageError
from globalopt.values.budget import Budget, Target
from globalopt.values.layer import NM
from globalopt.values.problem import Problem, Profile
from tests.surfaces import problem


def with_outliers(p: Problem, by_block: list[float]) -> Problem:
    """`p` with the share of outliers above 5 given per block."""
    profiles = {s.name: Profile({5: by_block[s.block]}, 3.0) for s in p.specs}
    return replace(p, profiles=profiles)


def kept_by_block(p: Problem, targets) -> list[float]:
    """The fraction that every block keeps."""
    dense = {s.name: p.budget.cost(Target.dense(s), s) for s in p.specs}
    used = {s.name: p.budget.cost(targets[s.name], s) for s in p.specs}
    blocks = sorted({s.block for s in p.specs})
    return [
        sum(used[s.name] for s in p.specs if s.block == b) / sum(dense[s.name] for s in p.specs if s.block == b)
        for b in blocks
    ]


def test_published_formula_where_blocks_are_equally_large():
    """Three equal blocks, shares 0, 2 and 4 %: 2 lambda times 0, 1/2, 1, minus their mean, plus what is kept."""
    p = with_outliers(problem(0.5, layers=12), [0.0, 0.02, 0.04])
    found = Owl().allocate(p)
    # Four layers a block, each rounded down by less than a unit, and the rest spent on some of them.
    assert kept_by_block(p, found.targets) == pytest.approx([0.42, 0.5, 0.58], abs=12 / 880)


def test_layers_of_a_block_keep_the_same_fraction():
    p = with_outliers(problem(0.5, layers=8), [0.0, 0.01])
    targets = Owl(spread=0.1).allocate(p).targets
    for spec in p.specs:
        expected = (0.4, 0.6)[spec.block] * spec.numel
        assert targets[spec.name].params(spec) == pytest.approx(expected, abs=len(p.specs) + 1)


def test_a_block_is_scored_by_its_entries_not_by_its_layers():
    """A tenth of the smallest layer of block 0 is fewer entries than a tenth of a larger one of block 1."""
    p = problem(0.5, layers=8)
    profiles = {s.name: Profile({5: 0.0}, 3.0) for s in p.specs}
    profiles["layer.0"] = profiles["layer.5"] = Profile({5: 0.1}, 3.0)
    p = replace(p, profiles=profiles)
    first, second = kept_by_block(p, Owl().allocate(p).targets)
    assert first < second


@pytest.mark.parametrize("kept", [0.03, 0.3, 0.97])
@pytest.mark.parametrize("accounting", ["params", "bytes"])
def test_budget_is_repaired_where_blocks_differ_and_fractions_clip(kept, accounting):
    """Six layers: block 1 has half of block 0; a spread of 1 clips at both ends."""
    p = with_outliers(problem(kept, layers=6, accounting=accounting), [0.05, 0.0])
    found = Owl(spread=1.0).allocate(p)
    assert 0 <= p.budget.limit - found.used < (1 if accounting == "params" else 4)
    first, second = kept_by_block(p, found.targets)
    assert first > second


def test_shift_clips_and_keeps_the_distances_of_the_others():
    """Blocks asked for -0.6, 0, 0.4 around a third: the first is dropped, the other two share the budget 0.4 apart."""
    p = problem(1 / 3, layers=12)
    targets = kept_targets(p, {0: -0.6, 1: 0.0, 2: 0.4}, 0.0)
    assert kept_by_block(p, targets) == pytest.approx([0.0, 0.3, 0.7], abs=12 / 880)
    assert p.used(targets) == p.budget.limit


def test_pattern_raises_rank_where_outliers_are():
    p = with_outliers(problem(0.65, layers=8, pattern=NM(2, 4)), [0.0, 0.05])
    targets = Owl(spread=0.05).allocate(p).targets
    for spec in p.specs:
        assert targets[spec.name].nnz == spec.numel // 2
    low, high = kept_by_block(p, targets)
    assert low < high


def test_equal_blocks_share_equally():
    p = with_outliers(problem(0.5, layers=8), [0.02, 0.02])
    assert kept_by_block(p, Owl().allocate(p).targets) == pytest.approx([0.5, 0.5], abs=9 / 880)


@pytest.mark.parametrize("profiles", [{}, {f"layer.{i}": Profile({3: 0.1}, 3.0) for i in range(6)}])
def test_without_profiles(profiles):
    with pytest.raises(UsageError, match=r"'owl' reads the layers' profiles, .*layer\.0.*profile_block"):
        Owl().allocate(replace(problem(0.5), profiles=profiles))


def test_options_outside_their_range():
    with pytest.raises(UsageError, match=r"3, 5, 7, 10 times the mean; got 4"):
        Owl(threshold=4)
    with pytest.raises(UsageError, match="spread"):
        Owl(spread=-0.1)
    with pytest.raises(UsageError, match="rank_share"):
        Owl(rank_share=2)


def test_a_budget_of_a_single_unit():
    p = with_outliers(problem(0.5), [0.0, 0.1])
    p = replace(p, budget=Budget(1, p.budget.total))
    assert Owl().allocate(p).used <= 1
