"""What rounding adds follows what a target keeps, and falls by what factors make up for."""

from __future__ import annotations

import pytest

from globalopt.values.budget import Target
from globalopt.values.layer import LayerSpec
from globalopt.values.rounding_losses import RoundingLosses
from globalopt.values.storage import Storage

SPEC = LayerSpec("up", 0, "in", "up", 40, 60)
LOSSES = RoundingLosses((0.5, 1.0), {4: (0.4, 0.2)}, (4,), {8: (0.01,)}, {4: 1.0}, ranked=0.6, share=0.3)


def added(rank: int, kept: float) -> float:
    nnz = int(kept * SPEC.numel) - rank * (SPEC.d_out + SPEC.d_in)
    return LOSSES.added(Target(rank, nnz, storage=Storage(4, 16)), SPEC)


def test_rank_saves_a_part_that_grows_with_its_share():
    none, some, more = (added(rank, 0.5) for rank in (0, 1, 2))
    assert none == pytest.approx(0.4)
    assert none > some > more
    # A share of a rank of 1 is 1/12: the logarithm is linear in it.
    assert some / none == pytest.approx(0.6 ** (1 / 12 / 0.3))
    assert more / some == pytest.approx(some / none)


def test_beyond_the_measured_share_it_falls_with_the_nonzeros():
    per_rank = 1 / 12
    for rank in (4, 8, 11):
        assert added(rank, 0.5) == pytest.approx(0.4 * 0.6 * (1 - rank * per_rank) / 0.7)
    assert LOSSES.added(Target(12, 0, storage=Storage(4, 16)), SPEC) == 0


def test_factors_add_what_they_are_rounded_by():
    target = Target(4, 800, storage=Storage(4, 8))
    assert LOSSES.added(target, SPEC) == pytest.approx(added(4, 0.5) + 0.01)
