"""Facts special to the exact allocator."""

from __future__ import annotations

import os

import pytest
from scipy.optimize import milp

from allocators import Knapsack, Uniform
from globalopt.values.budget import NO_LIMITS, Limits
from globalopt.values.layer import NM
from globalopt.values.storage import PLAIN, Storage
from tests.reference.knapsack import best_in_between, best_on_grid
from tests.surfaces import problem


@pytest.mark.parametrize("accounting", ["params", "bytes"])
@pytest.mark.parametrize("seed", range(4))
def test_at_least_as_good_as_dynamic_programming_on_the_grid(seed, accounting):
    p = problem(0.4, seed=seed, accounting=accounting)
    found = Knapsack().allocate(p)
    assert found.predicted <= best_on_grid(p) * (1 + 1e-9)


@pytest.mark.parametrize("pattern", [None, NM(2, 4)])
@pytest.mark.parametrize("kept", [0.55, 0.6, 0.8])
@pytest.mark.parametrize("seed", range(4))
def test_optimal_among_all_between_the_options_and_proved_so(seed, kept, pattern):
    p = problem(kept, seed=seed, pattern=pattern)
    found, best = Knapsack().allocate(p), best_in_between(p)
    assert found.predicted <= best * (1 + 2e-6)
    assert found.bound is not None
    assert best * (1 - 2e-6) <= found.bound <= best * (1 + 1e-6)
    assert found.gap is not None
    assert found.gap < 4e-6


@pytest.mark.parametrize("limits", [NO_LIMITS, Limits(2), Limits(sparse=False)])
@pytest.mark.parametrize("seed", range(2))
def test_bound_holds_in_bytes_and_within_limits(seed, limits):
    p = problem(0.5, seed=seed, accounting="bytes", limits=limits)
    found = Knapsack().allocate(p)
    assert found.bound is not None
    assert found.bound <= min(best_on_grid(p), found.predicted) * (1 + 1e-6)
    assert found.gap is not None
    assert found.gap < 1e-3


@pytest.mark.parametrize("pattern", [None, NM(2, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_bits_are_chosen_with_the_sizes_and_proved_so(seed, pattern):
    """In bytes, over storages: the grid is searched by dynamic programming, and the bound is below it."""
    p = problem(0.4, seed=seed, accounting="bytes", pattern=pattern, storages=(PLAIN, Storage(8, 8), Storage(4, 8)))
    found, best = Knapsack().allocate(p), best_on_grid(p)
    # Under a pattern the few numbers that are left may all be best in 4 bits.
    assert len({target.storage for target in found.targets.values()}) > 1 or pattern is not None
    assert found.predicted <= best * (1 + 1e-9)
    assert found.bound is not None
    assert found.bound <= best * (1 + 1e-6)
    assert found.gap is not None
    assert found.gap < 2e-3


@pytest.mark.parametrize("seed", range(4))
def test_the_relaxation_alone_bounds_from_below(seed):
    p = problem(0.6, seed=seed)
    relaxed = Knapsack(exact=False).allocate(p)
    assert relaxed.bound is not None
    assert relaxed.bound <= best_in_between(p) * (1 + 1e-12)
    # Six layers: the duality gap is at most one option of one layer.
    assert relaxed.gap is not None
    assert relaxed.gap < 0.1


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

    monkeypatch.setattr("allocators._core.milp", chatty)
    p = problem(0.4)
    Knapsack().allocate(p)
    os.write(1, b"ours")
    assert capfd.readouterr().out == "ours"
