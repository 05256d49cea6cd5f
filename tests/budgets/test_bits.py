"""Bits of the stored numbers in budgets of other programs, in conversions, comparisons and serving profiles."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from globalopt.budgets import budget_file, diff
from globalopt.budgets.conversion import convert_target
from globalopt.budgets.serving_limits import PROFILES, check_storages
from globalopt.errors import UsageError
from globalopt.pipeline.options import SearchOptions
from globalopt.values.budget import Budget, Target
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.storage import PLAIN, Storage
from solvers import SOLVERS, get_solver
from tests.budgets.made_up import half, make, specs, write
from tests.command import done, refused

USAGE = 2
FEW = (PLAIN, Storage(8, 8), Storage(4, 8))


def stored(spec: LayerSpec) -> Storage:
    """Another storage for every layer of a block."""
    return FEW[(specs().index(spec) + spec.block) % len(FEW)]


def few(spec: LayerSpec) -> Target:
    return replace(half(spec), storage=stored(spec))


def few_sparse(spec: LayerSpec) -> Target:
    return Target(0, spec.numel // 2 + 8 * (spec.block - 1), storage=stored(spec))


def few_patterned(spec: LayerSpec) -> Target:
    return Target(0, spec.numel // 2, NM(2, 4), storage=stored(spec))


def budget(target, accounting: str = "bytes") -> budget_file.BudgetFile:
    """The budget that gives every layer of the made-up model `target`."""
    dense = make(Target.dense, accounting=accounting)
    return budget_file.imported({spec.name: target(spec) for spec in specs()}, dense)


@pytest.mark.parametrize("accounting", ["params", "bytes"])
def test_csv_holds_the_bits(tmp_path, accounting):
    path = write(tmp_path / "few.json", budget(few, accounting))
    done("budget", "convert", path, "--to", "csv", "--out", tmp_path / "few.csv")
    with (tmp_path / "few.csv").open() as file:
        assert [row["storage"] for row in csv.DictReader(file)] == [str(stored(spec)) for spec in specs()]
    like = write(tmp_path / "like.json", make(half, accounting=accounting))
    done("budget", "convert", tmp_path / "few.csv", "--from", "csv", "--like", like, "--out", tmp_path / "back.json")
    assert budget_file.read(tmp_path / "back.json").allocation.targets == budget(few, accounting).allocation.targets
    assert json.loads((tmp_path / "back.json").read_text())["schema_version"] == 2


def test_a_csv_of_16_bits_is_as_it_was(tmp_path):
    path = write(tmp_path / "plain.json", make(half))
    done("budget", "convert", path, "--to", "csv", "--out", tmp_path / "plain.csv")
    head = "name,block,kind,d_out,d_in,rank,nnz,pattern,cost,kept,density"
    assert (tmp_path / "plain.csv").read_text().splitlines()[0] == head
    # A table without the column is of 16 bits, whatever the budget that has the shapes.
    like = write(tmp_path / "few.json", budget(few, "params"))
    done("budget", "convert", tmp_path / "plain.csv", "--from", "csv", "--like", like, "--out", tmp_path / "back.json")
    assert budget_file.read(tmp_path / "back.json").allocation.targets == make(half).allocation.targets


@pytest.mark.parametrize("text", ["7", "4/8/4", "four"])
def test_unknown_bits_in_a_table_are_one_line(tmp_path, text):
    like = write(tmp_path / "like.json", make(half))
    (tmp_path / "few.csv").write_text(f"name,rank,nnz,storage\n{specs()[0].name},0,1,{text}\n")
    said = refused(
        1, "budget", "convert", tmp_path / "few.csv", "--from", "csv", "--like", like, "--out", tmp_path / "o"
    )
    assert "line 2" in said
    assert text in said


@pytest.mark.parametrize(
    ("name", "target", "options"),
    [
        ("sparsities", few_sparse, ()),
        ("sparsities", few_patterned, ()),
        ("evopress", few_sparse, ("--level-sparsity", 0.5, "--level-step", 8)),
        ("peft", few, ()),
    ],
)
def test_formats_without_bits_say_so_and_take_them_from_like(tmp_path, name, target, options):
    path = write(tmp_path / "few.json", budget(target))
    there = done("budget", "convert", path, "--to", name, "--out", tmp_path / "there", *options).stderr
    assert "the bits of 6 layers, fewer than 16, are not in it" in there
    back = done(
        "budget", "convert", tmp_path / "there", "--from", name, "--like", path, "--out", tmp_path / "back", *options
    )
    assert "bits of the stored numbers are those of --like" in back.stderr
    assert budget_file.read(tmp_path / "back").allocation.targets == budget(target).allocation.targets
    # Of 16 bits, nothing is said of any.
    plain = write(tmp_path / "plain.json", budget(lambda spec: replace(target(spec), storage=PLAIN)))
    assert "bits" not in done("budget", "convert", plain, "--to", name, "--out", tmp_path / "o", *options).stderr


def test_rank_as_nonzeros_keeps_the_bits_at_no_higher_cost():
    file = budget(few)
    without = budget_file.without_rank(file)
    for before, after in zip(file.layers, without.layers, strict=True):
        assert (after.rank, after.storage) == (0, before.storage)
        assert before.cost - 4 < after.cost <= before.cost
    assert without.schema_version == 2


@pytest.mark.parametrize(
    "solver",
    [name for name, solver in SOLVERS.items() if not solver.signs and (solver.sparse or solver.low_rank)],
)
def test_conversion_keeps_the_bits(solver):
    limits = Budget.fraction(1.0, specs(), "bytes")
    for spec in specs():
        for target in (few(spec), Target(0, spec.numel // 2, storage=stored(spec))):
            converted = convert_target(target, spec, get_solver(solver), limits)
            assert converted.storage == target.storage
            assert limits.cost(converted, spec) <= limits.cost(target, spec)
        for kept in (0, spec.numel):
            untouched = Target(0, kept, storage=stored(spec))
            assert convert_target(untouched, spec, get_solver(solver), limits) == untouched


def test_a_plane_of_signs_goes_with_16_bits_alone():
    limits, slab = Budget.fraction(1.0, specs(), "bytes"), get_solver("slab")
    spec = specs()[0]
    assert convert_target(Target(2, 160), spec, slab, limits).signs
    with pytest.raises(UsageError, match=r"slab keeps a plane of signs.*q_proj in 4/8\. Use another solver"):
        convert_target(Target(2, 160, storage=Storage(4, 8)), spec, slab, limits)


def test_other_bits_alone_are_a_difference():
    before = budget(lambda spec: replace(half(spec), storage=Storage(8, 8)))
    after = budget(few)
    found = diff.diff(before, after, (Path("a"), Path("b")))
    moved = sum(stored(spec) != Storage(8, 8) for spec in specs())
    assert found.whole.changed == found.restored == moved == 6
    assert diff.record(found)["layers"][0]["storage"] == ["8", str(stored(specs()[0]))]
    # Under params they cost nothing, and are a difference still.
    params = diff.diff(make(half), budget(few, "params"), (Path("a"), Path("b")))
    assert (params.whole.changed, params.given, params.taken) == (6, 0, 0)


def test_commands_tell_the_bits(tmp_path):
    path, plain = write(tmp_path / "few.json", budget(few)), write(tmp_path / "plain.json", make(half))
    told = "3 layers in 16 bits, 3 in 8, 3 in 4/8 (values/factors)"
    assert told in " ".join(done("budget", "validate", path).stdout.split())
    shown = done("budget", "show", path).stdout
    assert told in shown
    assert "Bits of a stored number, block by kind" in shown
    compared = done("budget", "diff", plain, path).stdout
    assert "6 are stored in other bits" in " ".join(compared.split())
    assert max(map(len, (shown + compared).splitlines())) <= 80
    for line in ("validate", "show"):
        said = done("budget", line, plain).stdout
        assert "stored" not in said.lower()
        assert "Bits" not in said


def test_profiles_that_hold_no_codes_refuse_few_bits():
    assert [name for name, profile in PROFILES.items() if not profile.codes] == ["adapter", "factors"]
    for name in PROFILES:
        check_storages(name, [PLAIN])
    with pytest.raises(UsageError, match="adapter holds numbers of 16 bits alone, not of 4/8"):
        SearchOptions(0.5, "bytes", serving_profile="adapter", storage="16,4/8")
