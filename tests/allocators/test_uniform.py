"""Facts special to the uniform allocator."""

from __future__ import annotations

import pytest

from allocators import Uniform
from allocators._spend import spend
from globalopt.errors import UsageError
from globalopt.values.layer import NM
from tests.surfaces import problem


def test_every_layer_keeps_the_same_fraction():
    p = problem(0.5, layers=8)
    found = Uniform(rank_share=0.3).allocate(p)
    for spec in p.specs:
        target = found.targets[spec.name]
        # Rounding leaves at most a unit per layer, and all of it may go to one of them.
        assert target.params(spec) == pytest.approx(0.5 * spec.numel, abs=len(p.specs) + 1)
        assert target.rank == min(3, int(0.3 * 0.5 * spec.numel / (spec.d_out + spec.d_in)))


def test_pattern_leaves_only_the_rank():
    p = problem(0.7, pattern=NM(2, 4), layers=8)
    found = Uniform().allocate(p)
    for spec in p.specs:
        assert found.targets[spec.name].nnz == spec.numel // 2
    assert any(target.rank for target in found.targets.values())


def test_rank_share_outside_its_range():
    with pytest.raises(UsageError, match=r"got 1\.5"):
        Uniform(rank_share=1.5)


def test_spend_takes_the_steepest_layer_first():
    p = problem(0.5, layers=4)
    least = {surface.spec.name: surface.targets[1] for surface in p.surfaces}
    before = p.predicted(least)
    after = spend(p, least)
    assert p.used(after) == p.budget.limit
    assert p.predicted(after) < before
    assert all(after[name].nnz >= least[name].nnz for name in least)
