"""Plans: options resolved once, and methods recorded so that no two of them are taken for one."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from allocators import ALLOCATORS
from globalopt.analysis.corrections import ROUNDS
from globalopt.errors import UsageError
from globalopt.pipeline.method_records import limits_record, method_record
from globalopt.pipeline.options import PROBE_STEPS, RefineOptions, SearchOptions
from globalopt.pipeline.plan import (
    probe_solver,
    resolve,
    resolve_refinement,
)
from globalopt.protocols import Outputs, Reads
from globalopt.runs.files import digest
from globalopt.values.budget import NO_LIMITS, Limits
from solvers import SOLVERS, get_solver

SOURCE = """
from dataclasses import dataclass
from typing import ClassVar
{imports}

class Base:
    shift = {shift}

@dataclass(frozen=True)
class Mine({base}):
    name: ClassVar[str] = "mine"
    strength: float = 0.5

    def allocate(self, problem, objective=None):
        return {body}
"""


def module(
    folder: Path, name: str, shift: int = 0, base: str = "Base", body: str = "1", imports: str = ""
) -> ModuleType:
    """A module of a user's own, in a file."""
    path = folder / f"{name}.py"
    path.write_text(SOURCE.format(shift=shift, base=base, body=body, imports=imports))
    spec = importlib.util.spec_from_file_location("mine", path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


# ------------------------------------------------------------------------------------------------- records of methods


def test_own_methods_are_told_apart_by_fields_and_source(tmp_path, monkeypatch):
    def record(module: ModuleType, **options: Any) -> dict[str, Any]:
        # `inspect` looks a class up in the module of its name.
        monkeypatch.setitem(sys.modules, "mine", module)
        return method_record(module.Mine(**options))

    first = record(module(tmp_path, "first"))
    assert record(module(tmp_path, "same")) == first
    assert record(module(tmp_path, "fields"), strength=0.4) != first
    assert record(module(tmp_path, "source", body="2")) != first
    # The classes that it derives from are as much of it.
    assert record(module(tmp_path, "base", shift=1)) != first
    assert json.loads(json.dumps(first)) == first


def test_a_class_derived_from_one_of_ours_has_its_version_too(tmp_path, monkeypatch):
    made = module(tmp_path, "derived", base="Uniform", imports="from allocators import Uniform")
    monkeypatch.setitem(sys.modules, "mine", made)
    before = method_record(made.Mine())
    assert "source" in before
    monkeypatch.setattr("allocators.Uniform.version", 99)
    assert method_record(made.Mine()) != before


class Plain:
    name = "plain"


@dataclass(frozen=True)
class Holding:
    name = "holding"
    weights: Any = field(default_factory=list)


def test_a_method_without_fields_is_refused_in_one_line():
    with pytest.raises(UsageError, match=r"^Plain is no dataclass, .* Make it a frozen dataclass[^\n]*$"):
        method_record(Plain())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("value", [[1.0], {"a": 1}, (1, 2), object(), len, 1j, b"x"])
def test_a_field_that_cannot_be_recorded_is_refused_in_one_line(value):
    with pytest.raises(UsageError, match=rf"^Holding\.weights is a {type(value).__name__}; [^\n]*$"):
        method_record(Holding(value))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("value", [1, 0.5, "word", True, None])
def test_numbers_texts_and_truth_values_are_recorded(value):
    assert method_record(Holding(value))["options"] == {"weights": value}  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_refused_in_one_line(value):
    # A manifest is JSON, which has no such numbers.
    with pytest.raises(UsageError, match=r"^Holding\.weights is (nan|inf); "):
        method_record(Holding(value))  # pyright: ignore[reportArgumentType]


def test_an_own_method_is_refused_before_anything_is_computed():
    with pytest.raises(UsageError, match="Plain is no dataclass"):
        resolve(SearchOptions(0.5), allocator=Plain())  # pyright: ignore[reportArgumentType]


def test_limits_are_recorded_where_there_are_some():
    assert limits_record(NO_LIMITS) is None
    assert limits_record(Limits(sparse=False)) == {"rank_multiple": 1, "max_rank": None, "sparse": False}


# ------------------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("fisher", [True, False])
def test_a_record_is_json_and_of_no_other_plan(name, fisher):
    options = SearchOptions(0.5, solver=name, sensitivity="fisher" if fisher else "none")
    record = resolve(options, RefineOptions(match="block")).record()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    others = [
        SearchOptions(0.4, solver=name, sensitivity=options.sensitivity),
        SearchOptions(0.5, solver=name, sensitivity=options.sensitivity, seed=1),
        SearchOptions(0.5, solver=name, sensitivity=options.sensitivity, predict_from="span"),
        SearchOptions(0.5, solver=name, sensitivity=options.sensitivity, allocator="uniform"),
    ]
    records = [record, *(resolve(other, RefineOptions(match="block")).record() for other in others)]
    assert len({digest(record) for record in records}) == len(records)


def test_without_a_backward_sweep_nothing_is_weighted():
    plan = resolve(SearchOptions(0.5, sensitivity="none"), RefineOptions(match="block"))
    assert not plan.analysis.weighted
    assert plan.rounds == 0, "output errors are no losses that the model could correct"
    assert not plan.refinement.output_grams
    assert not plan.refinement.metric_choices
    assert not plan.refinement.block_output_grams


@pytest.mark.parametrize("name", SOLVERS)
def test_the_probe_solver_weights_rows_where_the_solver_weights_outputs(name):
    solver = get_solver(name)
    plan = resolve(SearchOptions(0.5, solver=name))
    assert plan.analysis.probe == probe_solver(solver)
    assert plan.analysis.probe.outputs == (Outputs.NONE if solver.outputs is Outputs.NONE else Outputs.ROWS)
    assert plan.analysis.weighted == (solver.outputs is not Outputs.NONE)
    assert resolve_refinement(RefineOptions(), solver, True, 0).metric_choices == plan.analysis.weighted


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_that_only_ranks_entries_probes_itself_and_is_compared_with_nothing(name):
    solver = get_solver(name)
    plan = resolve(SearchOptions(0.5, solver=name)).analysis
    ranks = name in ("wanda", "magnitude", "rtn")
    assert (plan.probe == solver) == ranks
    assert plan.compared == (not ranks)
    if not ranks:
        outputs = Outputs.NONE if solver.outputs is Outputs.NONE else Outputs.ROWS
        assert plan.probe == get_solver("3basil", {"steps": str(PROBE_STEPS), "outputs": outputs})
    # Without anchors there is nothing to compare.
    assert not resolve(SearchOptions(0.5, solver=name, predict_from="span")).analysis.compared


def test_the_probe_itself_is_compared_with_nothing():
    options = {"steps": str(PROBE_STEPS), "outputs": "rows"}
    assert not resolve(SearchOptions(0.5, solver="3basil", solver_options=options)).analysis.compared
    assert resolve(SearchOptions(0.5, solver="3basil")).analysis.compared


def test_predictions_are_corrected_where_they_are_losses_unless_it_is_refused():
    assert resolve(SearchOptions(0.5)).rounds == ROUNDS
    assert resolve(SearchOptions(0.5, correct=False)).rounds == 0
    assert resolve(SearchOptions(0.5, sensitivity="none")).rounds == 0


@pytest.mark.parametrize("name", ALLOCATORS)
@pytest.mark.parametrize("solver", ["3basil", "wanda"])
def test_errors_of_layers_are_in_nats_where_there_are_output_grams(name, solver):
    if name == "optuna":
        pytest.importorskip("optuna")
    plan = resolve(SearchOptions(0.5, solver=solver, allocator=name))
    predicts = Reads.SURFACES in plan.reads
    assert predicts == (name not in ("uniform", "owl", "alpha"))
    assert plan.refinement.output_grams == (predicts or solver == "3basil")
    assert plan.refinement.metric_choices == (solver == "3basil")


def test_an_allocator_says_what_it_reads_and_an_objective_needs_surfaces():
    @dataclass(frozen=True)
    class Silent:
        name = "silent"
        paper = ""
        uses_objective = False

        def allocate(self, problem, objective=None):
            raise AssertionError

    with pytest.raises(UsageError, match=r"^Silent does not say what it reads of a problem; give the class `reads`.*$"):
        resolve(SearchOptions(0.5), allocator=Silent())  # pyright: ignore[reportArgumentType]

    @dataclass(frozen=True)
    class Asking(Silent):
        reads = Reads.OBJECTIVE

    assert resolve(SearchOptions(0.5), allocator=Asking()).reads == Reads.OBJECTIVE | Reads.SURFACES  # pyright: ignore[reportArgumentType]
