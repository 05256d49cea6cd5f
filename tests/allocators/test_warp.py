"""The warp of the surrogate: what its coefficients do, and how many there are."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from allocators._warp import MOST_KINDS, Warp
from globalopt.values.budget import Target
from globalopt.values.problem import Problem
from tests.surfaces import problem


def with_kinds(count: int) -> Problem:
    """One layer per kind; four layers per block."""
    p = problem(0.5, layers=count)
    surfaces = [replace(s, spec=replace(s.spec, kind=f"k{i}")) for i, s in enumerate(p.surfaces)]
    return replace(p, surfaces=tuple(surfaces))


def test_zero_changes_nothing():
    p = with_kinds(6)
    warp = Warp.of(p)
    assert warp.apply(p, [0.0] * len(warp.names)) == p


def test_at_most_twelve_coefficients():
    p = with_kinds(14)
    warp = Warp.of(p)
    assert len(warp.names) == MOST_KINDS + 3 == 12
    shared = [s.spec for s in p.surfaces if f"kind:{s.spec.kind}" not in warp.names]
    assert len(shared) == 6
    assert max(s.numel for s in shared) <= min(s.numel for s in p.specs if s not in shared)
    theta = [float(name == "kind:others") for name in warp.names]
    for spec in p.specs:
        assert warp.factors(spec, [Target.zero()], theta)[0] == pytest.approx(math.e if spec in shared else 1.0)


def test_nine_kinds_keep_their_own():
    assert "kind:others" not in Warp.of(with_kinds(9)).names
    assert len(Warp.of(with_kinds(10)).names) == 12


def test_order_of_layers_does_not_matter():
    p = with_kinds(12)
    assert Warp.of(replace(p, surfaces=p.surfaces[::-1])) == Warp.of(p)


def test_the_formula():
    p = with_kinds(12)
    warp = Warp.of(p)
    theta = np.linspace(-1, 1, len(warp.names))
    by_name = dict(zip(warp.names, theta, strict=True))
    for before, after in zip(p.surfaces, warp.apply(p, theta).surfaces, strict=True):
        spec = before.spec
        z = {0: -1.0, 1: 0.0, 2: 1.0}[spec.block]
        for target, error, warped in zip(before.targets, before.error, after.error, strict=True):
            low_rank = target.rank * (spec.d_out + spec.d_in)
            share = low_rank / (low_rank + target.nnz) if low_rank else 0.0
            exponent = by_name.get(f"kind:{spec.kind}", by_name["kind:others"])
            exponent += by_name["depth"] * z + by_name["depth²"] * z**2 + by_name["share"] * share
            assert warped == pytest.approx(error * math.exp(exponent))


def test_one_block_has_no_depth():
    p = problem(0.5, layers=3)
    warp = Warp.of(p)
    assert warp.apply(p, [0.0, 1.0, 1.0, 0.0]) == p
