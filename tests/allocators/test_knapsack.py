"""Facts special to the exact allocator."""

from __future__ import annotations

import os

import pytest
from scipy.optimize import milp

from allocators import Knapsack, Uniform
from globalopt.types import NM
from tests.reference.knapsack import best_on_grid
from tests.surfaces import problem


@pytest.mark.parametrize("accounting", ["params", "bytes"])
@pytest.mark.parametrize("seed", range(4))
def test_at_least_as_good_as_dynamic_programming_on_the_grid(seed, accounting):
    p = problem(0.4, seed=seed, accounting=accounting)
    found = Knapsack().allocate(p)
    assert found.predicted <= best_on_grid(p) * (1 + 1e-9)


@pytest.mark.parametrize("pattern", [None, NM(2, 4)])
@pytest.mark.parametrize("seed", range(4))
def test_bound_holds_and_certifies(seed, pattern):
    p = problem(0.6, seed=seed, pattern=pattern)
    found = Knapsack().allocate(p)
    assert found.bound is not None
    assert found.bound <= best_on_grid(p) + 1e-12
    assert found.bound <= found.predicted + 1e-12
    # Six layers: the duality gap is at most one option of one layer.
    assert found.gap is not None
    assert found.gap < 0.1


@pytest.mark.parametrize("seed", range(4))
def test_integer_search_is_never_worse_than_the_relaxation(seed):
    p = problem(0.35, seed=seed)
    relaxed = Knapsack(exact=False).allocate(p)
    assert Knapsack().allocate(p).predicted <= relaxed.predicted + 1e-12


def test_beats_uniform_where_layers_differ():
    p = problem(0.4, layers=12)
    assert Knapsack().allocate(p).predicted < 0.7 * Uniform().allocate(p).predicted


def test_nothing_is_printed_past_python(capfd, monkeypatch):
    """HiGHS writes remarks of its own to the process's standard output, which `--json` needs for itself."""

    def chatty(*arguments, **options):
        os.write(1, b"a remark")
        return milp(*arguments, **options)

    monkeypatch.setattr("allocators.knapsack.milp", chatty)
    p = problem(0.4)
    Knapsack().allocate(p)
    os.write(1, b"ours")
    assert capfd.readouterr().out == "ours"
