"""The warp of the surrogate: what its coefficients do, and how many there are."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from allocators._warp import MOST_KINDS, Warp
from globalopt.values.problem import Problem
from tests.surfaces import problem


def with_kinds(count: int) -> Problem:
    """One layer per kind; four layers per block."""
    p = problem(0.5, layers=count)
    surfaces = [replace(s, spec=replace(s.spec, kind=f"k{i}")) for i, s in enumerate(p.surfaces)]
    return replace(p, surfaces=tuple(surfaces))


def test_zero_changes_nothing():
    table = with_kinds(6).table
    warp = Warp.of(table.specs)
    assert (warp.apply(table, [0.0] * len(warp.names)).error == table.error).all()


def test_at_most_twelve_coefficients():
    specs = with_kinds(14).specs
    warp = Warp.of(specs)
    assert len(warp.names) == MOST_KINDS + 3 == 12
    shared = [spec for spec in specs if f"kind:{spec.kind}" not in warp.names]
    assert len(shared) == 6
    assert max(s.numel for s in shared) <= min(s.numel for s in specs if s not in shared)
    others = warp.features(specs)[:, warp.names.index("kind:others")]
    assert others.tolist() == [float(spec in shared) for spec in specs]


def test_nine_kinds_keep_their_own():
    assert "kind:others" not in Warp.of(with_kinds(9).specs).names
    assert len(Warp.of(with_kinds(10).specs).names) == 12


def test_order_of_layers_does_not_matter():
    specs = with_kinds(12).specs
    assert Warp.of(specs[::-1]) == Warp.of(specs)


def test_the_formula():
    p = with_kinds(12)
    table = p.table
    warp = Warp.of(table.specs)
    theta = np.linspace(-1, 1, len(warp.names))
    by_name = dict(zip(warp.names, theta, strict=True))
    warped = warp.apply(table, theta)
    for layer, rank, nnz, before, after in zip(
        table.layer, table.rank, table.nnz, table.error, warped.error, strict=True
    ):
        spec = table.specs[layer]
        z = {0: -1.0, 1: 0.0, 2: 1.0}[spec.block]
        low_rank = rank * (spec.d_out + spec.d_in)
        share = low_rank / (low_rank + nnz) if low_rank else 0.0
        exponent = by_name.get(f"kind:{spec.kind}", by_name["kind:others"])
        exponent += by_name["depth"] * z + by_name["depth²"] * z**2 + by_name["share"] * share
        assert after == pytest.approx(before * math.exp(exponent))


def test_one_block_has_no_depth():
    table = problem(0.5, layers=3).table
    warp = Warp.of(table.specs)
    assert (warp.apply(table, [0.0, 1.0, 1.0, 0.0]).error == table.error).all()
