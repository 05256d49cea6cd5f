"""Costs of the stages: exponents that are fitted to sizes, and one search that is measured."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def cost(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("cost")
    sys.modules.pop("cost", None)


def test_exponents_are_those_of_a_power_law(cost):
    sizes = [cost.Size(*size) for size in ((64, 2, 4), (128, 2, 4), (64, 4, 4), (64, 2, 16), (128, 4, 16))]
    seconds = [3e-6 * s.width**2 * s.depth * s.windows**0.5 for s in sizes]
    found = cost.fit(sizes, seconds)
    assert found[1:] == pytest.approx((2.0, 1.0, 0.5))
    assert cost.at(found, 256, 8, 64) == pytest.approx(3e-6 * 256**2 * 8 * 8)


def test_what_does_not_vary_has_no_exponent_and_too_few_sizes_no_fit(cost):
    sizes = [cost.Size(width, 2, 4) for width in (64, 128, 256)]
    assert cost.fit(sizes, [1.0, 4.0, 16.0])[1:] == pytest.approx((2.0, 0.0, 0.0))
    assert cost.fit(sizes, [1.0, 0.0, 0.0]) is None


@pytest.mark.slow
def test_a_search_is_measured_and_read_back(cost, tmp_path, capsys):
    command = ["--out", str(tmp_path), "--widths", "64", "--depths", "2", "--windows", "4", "--match", "none"]
    command += ["--allocator", "knapsack", "--set", "steps=5"]
    assert cost.main(command) == 0
    shown = capsys.readouterr().out
    assert all(stage in shown for stage in ("labels", "anchors", "correct", "refine", "Memory and disk"))
    assert cost.main(command) == 0
    assert capsys.readouterr().out == shown
    # Another program is measured by itself: the cells of this one are not its own.
    other = tmp_path / "globalopt"
    other.write_text(f'#!/bin/sh\necho $1 >> {tmp_path}/called\nexec {sys.executable} -m globalopt "$@"\n')
    other.chmod(0o755)
    assert cost.main([*command, "--program", str(other)]) == 0
    assert (tmp_path / "called").read_text().split() == ["search", "search"]
    assert len(list((tmp_path / "cells").iterdir())) == 2
