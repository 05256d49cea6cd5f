"""The address of a stage changes with what the stage reads, with the versions before it, and with nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, fields, is_dataclass, replace
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest

from allocators import ALLOCATORS, get_allocator
from globalopt.budgets import budget_file
from globalopt.budgets.budget_file import BudgetFile
from globalopt.budgets.serving_limits import get_profile
from globalopt.pipeline import addresses
from globalopt.pipeline.addresses import (
    FINISHED,
    REFINED,
    VERSIONS,
    Addresses,
    algorithms,
    analysis_addresses,
    compress_addresses,
    refinement_addresses,
    search_addresses,
)
from globalopt.pipeline.method_records import method_record
from globalopt.pipeline.options import RefineOptions, SearchOptions
from globalopt.pipeline.plan import SearchPlan, probe_solver, resolve, resolve_refinement
from globalopt.protocols import Reads, Solver
from globalopt.runs.artefacts import Stage
from globalopt.runs.cache import Address
from globalopt.values.budget import NO_LIMITS, Budget, Target
from globalopt.values.error_unit import ErrorUnit
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.problem import Allocation, Problem
from globalopt.values.storage import Storage
from globalopt.values.surface import ErrorSurface
from solvers import SOLVERS, get_solver

SPECS = tuple(LayerSpec(name, 0, "in", name, 8, 8) for name in ("up", "gate"))

DATA = {"model": "m", "calibration": "c", "selection": "s", "batch_size": 8, "dtype": "torch.float32"}


def session(**changes: object) -> Any:
    """All that addresses read of a session."""
    data = {**DATA, **changes}
    splits = {name: SimpleNamespace(sha256=data[name]) for name in ("calibration", "selection")}
    return SimpleNamespace(
        model_digest=data["model"],
        splits=SimpleNamespace(**splits),
        text_options=SimpleNamespace(batch_size=data["batch_size"]),
        loaded=SimpleNamespace(checkpoint_dtype=data["dtype"]),
    )


def budget(nnz: int = 32, pattern: NM | None = None) -> BudgetFile:
    targets = {spec.name: Target(0, nnz, pattern) for spec in SPECS}
    surfaces = tuple(ErrorSurface(spec, (targets[spec.name],), (0.1,)) for spec in SPECS)
    problem = Problem(surfaces, Budget.fraction(1.0, SPECS), pattern)
    return budget_file.make(
        problem.finish(targets, "hand"), problem, "fingerprint", 128, 128, 1.0, ErrorUnit.OUTPUT_ERROR
    )


def everything(plan: SearchPlan, file: BudgetFile, data: Any) -> dict[Stage, Address]:
    """All addresses of a search that finds the budget of `file`."""
    return refinement_addresses(data, plan.refinement, file, search_addresses(data, plan))


def planned(refining: RefineOptions | None = None, **changes: Any) -> SearchPlan:
    # In few bits, so that all stages are there.
    options = {"solver": "3basil", "allocator": "knapsack", "storage": "8", **changes}
    return resolve(SearchOptions(options.pop("budget", 0.5), **options), refining or RefineOptions(match="model"))


def changed(one: Addresses, other: Addresses) -> set[Stage]:
    """Stages that are elsewhere, or in one of both alone."""
    found = {stage for stage in (*one, *other) if one.get(stage) != other.get(stage)}
    # By what names the folder, too.
    assert found == {stage for stage in (*one, *other) if _digest(one, stage) != _digest(other, stage)}
    return found


def _digest(found: Addresses, stage: Stage) -> str | None:
    return found[stage].digest if stage in found else None


BASE = everything(planned(), budget(), session())

UP_TO_ALLOCATION = set(BASE) - {Stage.REFINEMENT, Stage.MODEL_MATCHING}

# What a stage reads of others, by default.
READS: Mapping[Stage, set[Stage]] = {
    Stage.GRAMS: set(),
    Stage.LABELS: set(),
    Stage.SPECTRA: {Stage.GRAMS},
    Stage.PROFILES: {Stage.GRAMS},
    Stage.SPANS: {Stage.GRAMS},
    Stage.ANCHORS: {Stage.SPANS, Stage.LABELS},
    Stage.METRICS: {Stage.GRAMS, Stage.LABELS, Stage.ANCHORS},
    Stage.GAPS: {Stage.ANCHORS, Stage.METRICS},
    Stage.ROUNDING: {Stage.GRAMS, Stage.ANCHORS, Stage.METRICS, Stage.LABELS},
    Stage.PREDICTIONS: {Stage.SPANS, Stage.ANCHORS, Stage.METRICS, Stage.GAPS, Stage.LABELS},
    Stage.OBJECTIVE: {Stage.PREDICTIONS, Stage.ROUNDING},
    Stage.CORRECTIONS: {Stage.OBJECTIVE},
    Stage.ALLOCATION: {Stage.OBJECTIVE, Stage.PROFILES, Stage.CORRECTIONS},
    # The allocation enters by the budget that it is, whoever found it.
    Stage.REFINEMENT: {Stage.GRAMS, Stage.METRICS, Stage.LABELS},
    Stage.MODEL_MATCHING: {Stage.REFINEMENT},
}


def followers(*stages: Stage) -> set[Stage]:
    """Stages that read one of `stages`, directly or not, with themselves."""
    found = set(stages)
    while more := {stage for stage, read in READS.items() if read & found} - found:
        found |= more
    return found & set(BASE)


# ------------------------------------------------------------------------------------------------- versions


def test_every_stage_is_addressed_and_has_a_version():
    # Model and text, which all addresses hold the hashes of, have addresses of their own.
    before = {Stage.DEQUANTISED, Stage.SELF_TEXT}
    assert set(BASE) == set(READS) == set(Stage) - {Stage.RESULT} - before
    assert set(VERSIONS) == set(Stage) - before
    assert len({address.digest for address in BASE.values()}) == len(BASE)


@pytest.mark.parametrize("stage", VERSIONS, ids=str)
def test_a_new_version_moves_its_stage_and_the_followers_alone(stage, monkeypatch):
    monkeypatch.setitem(addresses.VERSIONS, stage, VERSIONS[stage] + 1)  # pyright: ignore[reportArgumentType]
    assert changed(BASE, everything(planned(), budget(), session())) == followers(stage)
    assert algorithms()[stage] == VERSIONS[stage]


@pytest.mark.parametrize("stage", VERSIONS, ids=str)
def test_every_version_is_of_the_identity_of_a_search(stage):
    assert stage in algorithms()
    assert (stage in algorithms(REFINED)) == (stage in REFINED)


def test_stages_of_a_family_and_of_a_refinement_are_stages():
    assert set(FINISHED) | set(REFINED) <= set(VERSIONS)
    # A refinement names the versions of all that it reads.
    plan = resolve_refinement(RefineOptions(match="model"), get_solver("3basil"), fisher=True, seed=0)
    found = compress_addresses(session(), plan, budget(), probe_solver(plan.solver), None)
    assert {address.stage for address in found.values()} | {Stage.RESULT} == set(REFINED)


# ------------------------------------------------------------------------------------------------- inputs

FOUND = {Stage.CORRECTIONS, Stage.ALLOCATION}
"""What depends on the budget."""

EVALUATED = {Stage.OBJECTIVE, *FOUND}

AFTER_GAPS = {Stage.PREDICTIONS, *EVALUATED}

SOLVED = {Stage.ANCHORS, Stage.METRICS, Stage.GAPS, Stage.ROUNDING, *AFTER_GAPS}


SESSION_CHANGES: dict[str, tuple[dict[str, object], set[Stage]]] = {
    "another model": ({"model": "x"}, set(BASE)),
    "another calibration text": ({"calibration": "x"}, set(BASE)),
    "another batch size": ({"batch_size": 4}, set(BASE)),
    "another selection text": ({"selection": "x"}, EVALUATED),
    "saved in another type": ({"dtype": "torch.bfloat16"}, {Stage.REFINEMENT, Stage.MODEL_MATCHING}),
}


@pytest.mark.parametrize("change", SESSION_CHANGES)
def test_what_a_session_changes(change):
    data, expected = SESSION_CHANGES[change]
    assert changed(BASE, everything(planned(), budget(), session(**data))) == expected


SEARCH_CHANGES: dict[str, tuple[dict[str, Any], set[Stage]]] = {
    "nothing": ({}, set()),
    "budget": ({"budget": 0.4}, FOUND),
    "allocator": ({"allocator": "auto"}, {Stage.ALLOCATION}),
    # One that reads no predictions has no anchors, at which metrics are chosen otherwise.
    "one-shot allocator": ({"allocator": "uniform"}, {Stage.METRICS, Stage.GAPS, Stage.ROUNDING, *AFTER_GAPS}),
    "allocator options": ({"allocator_options": {"exact": "false"}}, {Stage.ALLOCATION}),
    "search tokens": ({"search_tokens": 1000}, {Stage.ALLOCATION}),
    "corrections": ({"correct": False}, FOUND),
    "candidates": ({"candidates": "span"}, EVALUATED),
    "solver": ({"solver": "hassle-free"}, {Stage.GAPS, *AFTER_GAPS}),
    "solver preset": ({"solver_options": {"preset": "fast"}}, {Stage.GAPS, *AFTER_GAPS}),
    "solver options": ({"solver_options": {"steps": "7"}}, {Stage.GAPS, *AFTER_GAPS}),
    # The probe solver weights rows where the solver weights outputs in either way.
    "outputs": ({"solver_options": {"outputs": "rows"}}, {Stage.GAPS, *AFTER_GAPS}),
    "probe steps": ({"probe_steps": 7}, SOLVED),
    "no outputs": ({"solver_options": {"outputs": "none"}}, SOLVED),
    "no low-rank part": ({"solver": "sparsegpt"}, SOLVED),
    "its own probe": ({"solver": "wanda"}, SOLVED),
    "other bits": ({"storage": "4/8"}, FOUND),
    "16 bits": ({"storage": "16"}, {Stage.ROUNDING, *EVALUATED}),
    "accounting": ({"accounting": "bytes"}, {Stage.GAPS, *AFTER_GAPS}),
    "embeddings": ({"accounting": "bytes", "embeddings": "8"}, {Stage.GAPS, *AFTER_GAPS}),
    "pattern": ({"pattern": "2:4"}, {Stage.SPANS, *SOLVED}),
    "ranks in multiples": ({"rank_multiple": 4}, SOLVED),
    "largest rank": ({"max_rank": 4}, SOLVED),
    "serving profile": ({"serving_profile": "adapter", "storage": "16"}, SOLVED),
    "span scaling": ({"scaling": "none"}, {Stage.SPANS, *SOLVED}),
    "span scaling by outputs": ({"scaling": "output"}, {Stage.SPANS, *SOLVED}),
    "predict_from": ({"predict_from": "span"}, SOLVED),
    "sensitivity": ({"sensitivity": "none"}, SOLVED),
    # With it also the windows change, as the text says above.
    "seed": ({"seed": 1}, {Stage.LABELS, *SOLVED}),
}


@pytest.mark.parametrize("change", SEARCH_CHANGES)
def test_what_an_option_of_a_search_changes(change):
    options, expected = SEARCH_CHANGES[change]
    before = {stage: BASE[stage] for stage in UP_TO_ALLOCATION}
    assert changed(before, search_addresses(session(), planned(**options))) == expected


@pytest.mark.parametrize("bits", ["16", "8", "auto"])
def test_embeddings_move_what_depends_on_the_budget_alone(bits):
    before, after = (search_addresses(session(), planned(accounting="bytes", embeddings=b)) for b in (None, bits))
    assert changed(before, after) == FOUND


def test_every_option_of_a_search_is_in_the_table():
    varied = {name for options, _ in SEARCH_CHANGES.values() for name in options}
    assert varied | {"budget"} == {field.name for field in fields(SearchOptions)}


REFINE_CHANGES: dict[str, tuple[RefineOptions, set[Stage]]] = {
    "order": (RefineOptions("site", "model"), {Stage.REFINEMENT, Stage.MODEL_MATCHING}),
    "matching": (
        RefineOptions(match="model", match_options={"epochs": "2"}),
        {Stage.REFINEMENT, Stage.MODEL_MATCHING},
    ),
    "distillation": (RefineOptions(match="model", distill_options={"epochs": "2"}), {Stage.MODEL_MATCHING}),
    "blocks alone": (RefineOptions(match="block"), {Stage.MODEL_MATCHING}),
    "no matching": (RefineOptions(), {Stage.REFINEMENT, Stage.MODEL_MATCHING}),
}


@pytest.mark.parametrize("change", REFINE_CHANGES)
def test_what_an_option_of_a_refinement_changes(change):
    options, expected = REFINE_CHANGES[change]
    assert changed(BASE, everything(planned(options), budget(), session())) == expected


def test_another_budget_moves_the_refinement_and_the_same_budget_of_another_search_does_not():
    refined = {Stage.REFINEMENT, Stage.MODEL_MATCHING}
    assert changed(BASE, everything(planned(), budget(nnz=31), session())) == refined
    assert changed(BASE, everything(planned(budget=0.4, search_tokens=7), budget(), session())) == FOUND


def test_a_refinement_reads_the_choices_that_the_search_made_by_what_it_computed():
    own = planned(allocator="uniform")
    assert changed(BASE, everything(own, budget(), session())) >= {Stage.METRICS, Stage.REFINEMENT}
    # Without output Grams there is nothing to choose, whatever was solved before.
    plain = (planned(allocator=name, solver="sparsegpt", storage="16") for name in ("uniform", "knapsack"))
    one, other = (everything(plan, budget(), session()) for plan in plain)
    # Errors of layers are in another unit.
    assert changed(one, other) == {Stage.ALLOCATION, Stage.REFINEMENT, Stage.MODEL_MATCHING}
    # Two that read none share their choices.
    one, other = (everything(planned(allocator=name), budget(), session()) for name in ("uniform", "owl"))
    assert changed(one, other) == {Stage.ALLOCATION}


FROM_LABELS: set[Stage] = {stage for stage in REFINED if stage not in (Stage.RESULT, Stage.GRAMS)}

COMPRESS_CHANGES: dict[str, tuple[dict[str, Any], set[Stage]]] = {
    "model": ({"data": {"model": "x"}}, {Stage.GRAMS, *FROM_LABELS}),
    "calibration": (
        {"data": {"calibration": "x"}},
        {Stage.GRAMS, *FROM_LABELS},
    ),
    "selection": ({"data": {"selection": "x"}}, set()),
    "seed": ({"seed": 1}, FROM_LABELS),
    "solver options": ({"solver_options": {"steps": "7"}}, {Stage.REFINEMENT, Stage.MODEL_MATCHING}),
    "budget": ({"file": budget(nnz=31)}, {Stage.REFINEMENT, Stage.MODEL_MATCHING}),
    "pattern": (
        {"file": budget(pattern=NM(2, 4)), "pattern": NM(2, 4)},
        {Stage.METRICS, Stage.REFINEMENT, Stage.MODEL_MATCHING},
    ),
    "sensitivity": ({"fisher": False}, {Stage.METRICS, Stage.REFINEMENT, Stage.MODEL_MATCHING}),
}


def refined(
    data: Mapping[str, object] = {},
    seed: int = 0,
    solver_options: Mapping[str, str] = {},
    file: BudgetFile | None = None,
    pattern: NM | None = None,
    fisher: bool = True,
) -> dict[Stage, Address]:
    solver = get_solver("3basil", solver_options)
    plan = resolve_refinement(RefineOptions(match="model"), solver, fisher, seed)
    return compress_addresses(session(**data), plan, file or budget(), probe_solver(solver), pattern)


@pytest.mark.parametrize("change", COMPRESS_CHANGES)
def test_what_an_option_of_compress_changes(change):
    options, expected = COMPRESS_CHANGES[change]
    assert changed(refined(), refined(**options)) == expected


def test_compress_shares_grams_and_output_grams_with_a_search():
    found = refined()
    for stage in (Stage.GRAMS, Stage.LABELS):
        assert found[stage] == BASE[stage]
    # A search with anchors chooses metrics by these; one without, as a refinement by itself does.
    assert found[Stage.METRICS] != BASE[Stage.METRICS]
    one_shot = everything(planned(allocator="uniform"), budget(), session())
    assert found[Stage.METRICS] == one_shot[Stage.METRICS]
    assert found[Stage.REFINEMENT] == one_shot[Stage.REFINEMENT]


# ------------------------------------------------------------------------------------------------- every field


def other_value(field: Field[Any], value: Any) -> Any:
    """Another value of a field."""
    if (field.name, type(value)) in OTHERS:
        return OTHERS[field.name, type(value)]
    if isinstance(value, bool):
        return not value
    if isinstance(value, Enum):
        return next(member for member in type(value) if member is not value)
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 if value else 0.01
    if isinstance(value, str):
        return value + "x"
    raise AssertionError(f"Say in OTHERS what else {field.name} may be than {value!r}")


OTHERS: Mapping[tuple[str, type], Any] = {
    ("pattern", type(None)): NM(2, 4),
    ("accounting", str): "bytes",
    ("scaling", str): "none",
    ("max_rank", type(None)): 4,
    ("threshold", int): 7,
    ("samples", int): 4,
    ("storage", str): "4/8",
    ("storages", tuple): (Storage(4, 8),),
}


def variants(value: Any, inner: Callable[[Any], bool] = lambda value: False) -> list[tuple[str, Any]]:
    """A dataclass with one field changed at a time, by the name of the field; of some fields, their fields in turn."""
    found = []
    for field in fields(value):
        held = getattr(value, field.name)
        if is_dataclass(held) and inner(held):
            found += [(f"{field.name}.{name}", replace(value, **{field.name: other})) for name, other in variants(held)]
        else:
            found.append((field.name, replace(value, **{field.name: other_value(field, held)})))
    return found


def parts(value: Any) -> bool:
    return True


def named(value: Any) -> str:
    return value if isinstance(value, str) else "other"


ANALYSIS = planned().analysis
REFINEMENT = planned().refinement

NO_INPUT = "profile"
"""Field of a plan that is read before anything is computed."""


def test_the_menu_of_storages_decides_the_corrections_and_no_prediction():
    one, two = (search_addresses(session(), planned(storage=storage)) for storage in ("8", "4/8"))
    assert changed(one, two) == FOUND


@pytest.mark.parametrize(
    ("name", "other"), [row for row in variants(ANALYSIS, parts) if row[0] != "storages"], ids=named
)
def test_every_field_of_an_analysis_decides_the_predictions(name, other):
    one, two = (analysis_addresses(session(), plan)[Stage.PREDICTIONS] for plan in (ANALYSIS, other))
    assert one.digest != two.digest, name


@pytest.mark.parametrize(("name", "other"), variants(REFINEMENT, parts), ids=named)
def test_every_field_of_a_refinement_decides_its_end(name, other):
    one, two = (
        refinement_addresses(session(), plan, budget(), search_addresses(session(), planned()))[Stage.MODEL_MATCHING]
        for plan in (REFINEMENT, other)
    )
    assert one.digest != two.digest, name


@pytest.mark.parametrize("matching", ["matching", "distillation"])
def test_to_leave_a_part_of_matching_out_is_another_refinement(matching):
    other = replace(REFINEMENT, **{matching: None})
    assert changed(BASE, everything(replace(planned(), refinement=other), budget(), session())) >= {
        Stage.MODEL_MATCHING
    }


def test_every_field_of_a_search_decides_its_allocation():
    plan = planned()
    alternatives: dict[str, Any] = {
        "analysis": replace(plan.analysis, seed=1),
        "allocator": get_allocator("uniform"),
        "candidates": "span",
        "search_tokens": 7,
        "words": {**plan.words, "correct": False},
        "embeddings": "8",
    }
    known = {*alternatives, NO_INPUT, "rule", "refinement"}
    assert known == {field.name for field in fields(SearchPlan)}, "another field: say whether it decides results"
    others = [(name, replace(plan, **{name: other})) for name, other in alternatives.items()]
    others += [(f"rule.{name}", replace(plan, rule=rule)) for name, rule in variants(plan.rule)]
    before = search_addresses(session(), plan)[Stage.ALLOCATION]
    for name, other in others:
        assert search_addresses(session(), other)[Stage.ALLOCATION].digest != before.digest, name
    # These do not, nor do most words; of the refinement only what follows it depends.
    words = {**plan.words, **{name: None for name in plan.words if name != "correct"}}
    unread = {"words": words, "profile": get_profile("adapter"), "refinement": replace(REFINEMENT, seed=1)}
    for name, value in unread.items():
        assert search_addresses(session(), replace(plan, **{name: value}))[Stage.ALLOCATION] == before, name


def test_limits_decide_the_predictions_field_by_field():
    assert ANALYSIS.limits == NO_LIMITS
    digests = {
        analysis_addresses(session(), replace(ANALYSIS, limits=limits))[Stage.PREDICTIONS].digest
        for _, limits in (("", NO_LIMITS), *variants(NO_LIMITS))
    }
    assert len(digests) == len(fields(NO_LIMITS)) + 1


METHODS = [*SOLVERS.values(), *ALLOCATORS.values()]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_option_of_a_method_is_recorded(method):
    records = [method_record(one) for one in (method(), *(other for _, other in variants(method())))]
    assert all(record not in records[:i] for i, record in enumerate(records))


def test_no_two_methods_have_one_record():
    records = [method_record(method()) for method in METHODS]
    assert all(record not in records[:i] for i, record in enumerate(records))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_new_version_of_a_method_is_another_method(method, monkeypatch):
    before = method_record(method())
    monkeypatch.setattr(method, "version", method.version + 1)
    assert method_record(method()) != before


# ------------------------------------------------------------------------------------------------- equal plans


def test_equal_plans_have_equal_addresses():
    assert changed(BASE, everything(planned(), budget(), session())) == set()


def typed(value: Any) -> str:
    """A value as it is typed."""
    return str(value).lower() if isinstance(value, bool) else str(value)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_default_that_is_typed_is_no_other_solver(name):
    solver = get_solver(name)
    words = {field.name: typed(getattr(solver, field.name)) for field in fields(solver)}  # pyright: ignore[reportArgumentType]
    # One with a plane of signs is in 16 bits.
    one, other = (planned(solver=name, storage="16", solver_options=options) for options in ({}, words))
    assert changed(everything(one, budget(), session()), everything(other, budget(), session())) == set()
    assert one.record() == other.record()


@pytest.mark.parametrize("name", [name for name in ALLOCATORS if name != "optuna"])
def test_a_default_that_is_typed_is_no_other_allocator(name):
    allocator: Any = get_allocator(name)
    words = {field.name: typed(getattr(allocator, field.name)) for field in fields(allocator)}
    one, other = planned(allocator=name), planned(allocator=name, allocator_options=words)
    assert search_addresses(session(), one) == search_addresses(session(), other)
    assert one.record() == other.record()


def test_a_default_of_the_search_that_is_given_is_no_other_search():
    defaults = {
        field.name: getattr(SearchOptions(0.5), field.name) for field in fields(SearchOptions) if field.name != "budget"
    }
    one = resolve(SearchOptions(0.5))
    other = resolve(SearchOptions(0.5, **defaults), RefineOptions())
    assert search_addresses(session(), one) == search_addresses(session(), other)
    assert one.record() == other.record()


def test_a_default_of_matching_that_is_typed_is_no_other_refinement():
    plan = planned(RefineOptions(match="model"))
    assert plan.refinement.matching is not None
    words = {
        field.name: typed(getattr(plan.refinement.matching, field.name)) for field in fields(plan.refinement.matching)
    }
    other = planned(RefineOptions(match="model", match_options={"preset": "default", **words}))
    assert changed(BASE, everything(other, budget(), session())) == set()


# ------------------------------------------------------------------------------------------------- own methods


@dataclass(frozen=True)
class OwnSolver(Solver[None]):
    """A solver of a user's own: what it computes is of no matter here."""

    name = "own"
    strength: float = 0.5

    def prepare(self, weight: Any, metric: Any) -> None:
        raise NotImplementedError

    def solve(self, state: None, target: Target, start: Any = None) -> Any:
        raise NotImplementedError


@dataclass(frozen=True)
class OwnAllocator:
    """An allocator of a user's own."""

    name = "own"
    paper = ""
    reads = Reads.NOTHING
    strength: float = 0.5

    def allocate(self, problem: Problem, objective: Any = None) -> Allocation:
        raise NotImplementedError


def test_own_methods_are_told_apart_by_their_fields():
    def found(solver: float, allocator: float) -> dict[Stage, Address]:
        options = SearchOptions(0.5)
        plan = resolve(options, None, OwnAllocator(allocator), OwnSolver(solver))  # pyright: ignore[reportArgumentType]
        return search_addresses(session(), plan)

    before = found(0.5, 0.5)
    assert changed(before, found(0.5, 0.5)) == set()
    assert changed(before, found(0.5, 0.4)) == {Stage.ALLOCATION}
    assert changed(before, found(0.4, 0.5)) == {Stage.GAPS, *AFTER_GAPS}
