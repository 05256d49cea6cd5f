"""Effort: one word sets the defaults of a whole search; what is given by itself stays as it is given."""

from __future__ import annotations

import itertools
from dataclasses import fields

import pytest

from globalopt.commands.arguments import refine_options
from globalopt.errors import UnknownNameError
from globalopt.matching.block import Matching
from globalopt.pipeline.effort import EFFORTS, get_effort
from globalopt.pipeline.options import PROBE_STEPS, RefineOptions, SearchOptions, TextOptions
from globalopt.pipeline.plan import resolve
from solvers import SOLVERS, get_solver

NAMES = tuple(EFFORTS)


def test_the_default_effort_is_the_defaults_of_all_options():
    level, texts, options = get_effort("default"), TextOptions(), SearchOptions(0.5)
    assert (level.nsamples, level.eval_windows) == (texts.nsamples, texts.eval_windows)
    assert (level.allocator, level.search_tokens) == (options.allocator, options.search_tokens)
    assert (level.probe_steps, level.epochs) == (PROBE_STEPS, Matching().epochs)
    assert get_solver("3basil", level.solver_options("3basil", {})) == get_solver("3basil")


def test_no_setting_falls_from_one_level_to_the_next():
    numbers = [field.name for field in fields(EFFORTS["best"]) if field.name not in ("allocator", "preset")]
    levels = [EFFORTS[name] for name in ("quick", "default", "best")]
    for one, next_one in itertools.pairwise(levels):
        assert all(getattr(one, name) <= getattr(next_one, name) for name in numbers)
    steps = [get_solver("3basil", level.solver_options("3basil", {})) for level in levels]
    assert [solver.preset for solver in steps] == ["fast", "default", "best"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("effort", NAMES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_takes_the_options_of_every_level(effort, solver):
    level = EFFORTS[effort]
    get_solver(solver, level.solver_options(solver, {}))


@pytest.mark.parametrize("effort", NAMES)
def test_what_is_given_by_itself_stays(effort):
    level = EFFORTS[effort]
    assert get_solver("3basil", level.solver_options("3basil", {"preset": "fast"})) == get_solver(
        "3basil", {"preset": "fast"}
    )
    assert refine_options("block", "block", ["epochs=7"], None, level).match_options["epochs"] == "7"
    assert refine_options("block", "none", None, None, level) == RefineOptions()


@pytest.mark.parametrize("effort", NAMES)
def test_the_probe_takes_the_steps_of_the_level(effort):
    plan = resolve(SearchOptions(0.5, probe_steps=EFFORTS[effort].probe_steps))
    assert plan.analysis.probe == get_solver("3basil", {"steps": str(EFFORTS[effort].probe_steps), "outputs": "rows"})


def test_an_unknown_level_is_refused():
    with pytest.raises(UnknownNameError, match="did you mean 'default'"):
        get_effort("defaults")
