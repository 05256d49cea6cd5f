"""Facts special to the depth ramp."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from allocators import DepthRamp, Uniform
from allocators.depth_ramp import STEEPNESSES, depth_ramp, largest_beta
from globalopt.errors import UsageError
from globalopt.values.layer import NM
from globalopt.values.surface import ErrorSurface
from tests.allocators.test_owl import kept_by_block
from tests.objectives import BentObjective
from tests.surfaces import problem


@pytest.mark.parametrize(("kept", "beta"), [(0.3, 0.3), (0.5, 0.5), (0.8, 0.2)])
def test_published_progression(kept, beta):
    """Three equal blocks: min(2 s, 2 (1 - s)) / 2 apart at most."""
    p = problem(kept, layers=12)
    assert largest_beta(p) == pytest.approx(beta, abs=1e-3)
    for steepness in (0.5, 1.0):
        step = steepness * beta
        found = kept_by_block(p, depth_ramp(p, steepness))
        assert found == pytest.approx([kept + step, kept, kept - step], abs=12 / 880)


def test_pattern_bounds_the_step_from_below():
    assert largest_beta(problem(0.6, layers=12, pattern=NM(2, 4))) == pytest.approx(0.1, abs=1e-3)
    p = problem(0.65, layers=12, pattern=NM(2, 4))
    kept = kept_by_block(p, depth_ramp(p, 1.0))
    assert kept[0] > kept[1] > kept[2] >= 0.5


@pytest.mark.parametrize("steepness", STEEPNESSES[1:])
@pytest.mark.parametrize("layers", [10, 12])
def test_kept_falls_with_depth_and_the_budget_is_whole(steepness, layers):
    """With ten layers the last block is half as large, so the steepest ramps are shifted and clipped."""
    p = problem(0.4, layers=layers)
    targets = depth_ramp(p, steepness)
    assert p.used(targets) == p.budget.limit
    assert all(above > below for above, below in itertools.pairwise(kept_by_block(p, targets)))


def test_flat_is_uniform():
    p = problem(0.4, layers=12)
    assert depth_ramp(p, 0.0) == Uniform().allocate(p).targets
    one = problem(0.4, layers=4)
    assert largest_beta(one) == 0
    assert DepthRamp().allocate(one, BentObjective(one)).targets == Uniform().allocate(one).targets


def test_depth_counts_the_blocks_there_are():
    """Blocks 0, 1, 2 renamed to 0, 5, 9: their order is what matters."""
    p = problem(0.4, layers=12)

    def moved(surface: ErrorSurface) -> ErrorSurface:
        return replace(surface, spec=replace(surface.spec, block=(0, 5, 9)[surface.spec.block]))

    sparse = replace(p, surfaces=tuple(moved(surface) for surface in p.surfaces))
    assert depth_ramp(sparse, 1.0) == depth_ramp(p, 1.0)


def test_tuning_takes_the_ramp_of_least_loss():
    p = problem(0.4, layers=12)
    objective = BentObjective(p)
    found = DepthRamp().allocate(p, objective)
    losses = [objective.true(depth_ramp(p, steepness)) for steepness in STEEPNESSES]
    assert objective.true(found.targets) == min(losses)


def test_the_given_ramp_without_objective_or_tuning():
    p = problem(0.4, layers=12)
    objective = BentObjective(p)
    half = depth_ramp(p, 0.5)
    assert DepthRamp().allocate(p).targets == half
    assert DepthRamp(tune=False).allocate(p, objective).targets == half
    assert objective.asked == 0
    assert DepthRamp(tune=False, steepness=1.0).allocate(p).targets == depth_ramp(p, 1.0)


def test_options_outside_their_range():
    with pytest.raises(UsageError, match=r"steepness.*got 2"):
        DepthRamp(steepness=2)
    with pytest.raises(UsageError, match="rank_share"):
        DepthRamp(rank_share=2)
