from __future__ import annotations

import json
from dataclasses import replace

import pytest

from allocators import get_allocator
from globalopt.budgets import budget_file
from globalopt.budgets.budget_file import BudgetFile
from globalopt.errors import ArtefactError, UsageError
from globalopt.values.budget import Limits, Target
from globalopt.values.error_unit import ErrorUnit
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.problem import Problem
from globalopt.values.storage import PLAIN, Storage
from tests.surfaces import problem

PROBLEMS = {
    "params": lambda: problem(0.5),
    "bytes": lambda: problem(0.4, accounting="bytes"),
    "2:4": lambda: problem(0.7, pattern=NM(2, 4)),
    "all": lambda: problem(1.0),
    "even ranks": lambda: problem(0.5, limits=Limits(2, 4)),
    "factors": lambda: problem(0.5, limits=Limits(sparse=False)),
    "bits": lambda: problem(0.3, accounting="bytes", storages=(PLAIN, Storage(8, 8), Storage(4, 8))),
}


def made(at: Problem) -> BudgetFile:
    allocation = get_allocator("knapsack").allocate(at)
    total = sum(spec.numel for spec in at.specs)
    return budget_file.make(allocation, at, "f" * 64, total, total + 10, at.budget.kept, ErrorUnit.OUTPUT_ERROR)


@pytest.fixture(params=PROBLEMS)
def at(request) -> Problem:
    return PROBLEMS[request.param]()


def test_round_trip_is_exact(at, tmp_path):
    file = made(at)
    path = tmp_path / "budget.json"
    budget_file.write(path, file)
    read = budget_file.read(path)
    assert read == file
    budget_file.write(tmp_path / "again.json", read)
    assert path.read_bytes() == (tmp_path / "again.json").read_bytes()


def test_the_allocation_comes_back(at, tmp_path):
    allocation = get_allocator("knapsack").allocate(at)
    budget_file.write(tmp_path / "budget.json", made(at))
    read = budget_file.read(tmp_path / "budget.json")
    assert read.for_model("f" * 64, at.specs, tmp_path) == allocation
    assert list(read.allocation.targets) == [spec.name for spec in at.specs]
    assert at.predicted(read.allocation.targets) == pytest.approx(read.predicted)


def test_plans_add_up(at):
    file = made(at)
    assert sum(plan.cost for plan in file.plans) == file.used <= file.limit
    assert sum(plan.dense_cost for plan in file.plans) == file.total
    assert all(0 <= plan.kept <= 1.01 for plan in file.plans)


def test_nothing_of_this_machine_is_in_the_file(tmp_path):
    budget_file.write(tmp_path / "budget.json", made(problem(0.5)))
    text = (tmp_path / "budget.json").read_text()
    assert str(tmp_path) not in text
    assert "/" not in text


def test_other_models_are_refused(tmp_path):
    at = problem(0.5)
    file = made(at)
    with pytest.raises(ArtefactError, match="other type or vocabulary"):
        file.for_model("0" * 64, at.specs, tmp_path)
    first = at.specs[0]
    wider = LayerSpec(first.name, first.block, first.site, first.kind, first.d_out + 1, first.d_in)
    for specs in (at.specs[1:], (wider, *at.specs[1:])):
        with pytest.raises(ArtefactError, match=r"differ first at layer\.0"):
            file.for_model("f" * 64, specs, tmp_path)


@pytest.mark.parametrize("field", sorted(BudgetFile.model_fields.keys() - {"limits", "embeddings"}))
def test_every_field_is_needed(tmp_path, field):
    path = tmp_path / "budget.json"
    budget_file.write(path, made(problem(0.5)))
    raw = json.loads(path.read_text())
    del raw[field]
    path.write_text(json.dumps(raw))
    with pytest.raises(ArtefactError, match=field):
        budget_file.read(path)


@pytest.mark.parametrize("unit", ErrorUnit)
def test_the_unit_of_errors_is_read_as_written_and_another_is_refused(tmp_path, unit):
    path = tmp_path / "budget.json"
    budget_file.write(path, made(problem(0.5)).model_copy(update={"error_unit": unit}))
    raw = json.loads(path.read_text())
    assert raw["error_unit"] == unit.value
    assert budget_file.read(path).error_unit is unit
    path.write_text(json.dumps({**raw, "error_unit": "bits"}))
    with pytest.raises(ArtefactError, match="error_unit"):
        budget_file.read(path)


@pytest.mark.parametrize("patterned", [False, True])
def test_a_plane_of_signs_is_refused_as_no_file_holds_one(patterned):
    at = problem(0.5)
    targets = {spec.name: Target(1, spec.numel // 4) for spec in at.specs}
    first = at.specs[0]
    half = NM(2, 4)
    kept = Target(1, half.nnz(first), half, signs=True) if patterned else Target(1, 0, signs=True)
    allocation = at.finish({**targets, first.name: kept}, "by hand")
    with pytest.raises(UsageError, match=rf"Layer {first.name}: a budget file holds no plane of signs"):
        budget_file.make(allocation, at, "f" * 64, 10, 10, 0.5, ErrorUnit.NATS)
    with pytest.raises(ArtefactError, match=rf"Layer {first.name}: a budget file holds no plane of signs"):
        budget_file.imported({**targets, first.name: kept}, made(at))


@pytest.mark.parametrize(
    ("field", "value"),
    [("rank", 1.5), ("nnz", -1), ("d_in", 0), ("cost", "many"), ("pattern", 4), ("predicted", "low")],
)
def test_bad_values_are_named(tmp_path, field, value):
    path = tmp_path / "budget.json"
    budget_file.write(path, made(problem(0.5)))
    raw = json.loads(path.read_text())
    raw["layers"][1][field] = value
    path.write_text(json.dumps(raw))
    with pytest.raises(ArtefactError, match=rf"layers\.1\.{field}"):
        budget_file.read(path)


def test_a_file_says_only_limits_that_there_are(tmp_path):
    budget_file.write(tmp_path / "free.json", made(problem(0.5)))
    assert "limits" not in json.loads((tmp_path / "free.json").read_text())
    limited = made(problem(0.5, limits=Limits(2, 4)))
    assert budget_file.record(limited)["limits"] == {"rank_multiple": 2, "max_rank": 4, "sparse": True}
    # Targets from elsewhere are not promised to be within them.
    changed = {entry.name: entry.target for entry in limited.layers}
    first = limited.layers[0]
    changed[first.name] = replace(first.target, rank=0, nnz=first.target.nnz // 2)
    assert budget_file.imported(changed, limited).limits is None


def test_only_files_with_few_bits_are_of_the_second_schema(tmp_path):
    plain, few = made(PROBLEMS["bytes"]()), made(PROBLEMS["bits"]())
    assert (plain.schema_version, few.schema_version) == (1, 2)
    assert "storage" not in budget_file.record(plain)["layers"][0]
    assert {entry["storage"] for entry in budget_file.record(few)["layers"]} >= {"4/8", "8"}
    raw = budget_file.record(few)
    raw["layers"][0]["storage"] = "7"
    (tmp_path / "budget.json").write_text(json.dumps(raw))
    with pytest.raises(ArtefactError, match="stored in 16, 8, 6, 5, 4, 3 bits; got 7"):
        budget_file.read(tmp_path / "budget.json")
