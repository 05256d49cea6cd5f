"""Families of budgets from the command line: one analysis, nested budget files, what is measured, and resuming."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest

from allocators.nested import is_within
from globalopt.budgets import budget_file
from globalopt.budgets.budget_file import BudgetFile
from globalopt.commands.console import INTERRUPTED
from globalopt.objective.kl_to_dense import TargetObjective
from globalopt.pipeline import family, session
from globalopt.runs.artefacts import FAMILY, PREDICTION
from globalopt.runs.folder import Run
from globalopt.values.budget import Target
from tests.command import contents, done, interrupt, no_partial_files, read, refused, run

BUDGETS = ("0.3", "0.5", "0.8")


@pytest.fixture(scope="session")
def tiny_search(tiny_search: tuple[str, ...]) -> tuple[str, ...]:
    """The search without its allocator: that of a family is the nested knapsack."""
    at = tiny_search.index("--allocator")
    return (*tiny_search[:at], *tiny_search[at + 2 :])


@pytest.fixture(scope="module")
def tiny_family(tiny_search, tmp_path_factory) -> Path:
    """The folder of a finished family; not to be changed."""
    folder = tmp_path_factory.mktemp("family") / "three"
    done(*tiny_search, "--budget", ",".join(BUDGETS), "--out", folder, "-q")
    return folder


def budget_files(folder: Path, names=BUDGETS) -> list[BudgetFile]:
    return [budget_file.read(folder / "budgets" / f"{name}.json") for name in names]


def stable(folder: Path) -> dict[str, object]:
    """What must not depend on how a family came about: budget files and points."""
    files = {path.name: path.read_bytes() for path in (folder / "budgets").iterdir()}
    return {**files, "points": read(folder / "family.json")["points"]}


def assert_nested(files: list[BudgetFile]) -> None:
    for inner, outer in itertools.pairwise(files):
        for less, more in zip(inner.layers, outer.layers, strict=True):
            assert is_within(less.target, more.target, Target.dense(less.spec))


def test_a_family_leaves_budget_files_and_no_model(tiny_family):
    assert {path.name for path in tiny_family.iterdir()} == {
        "manifest.json", "family.json", "budgets", "curves"
    }  # fmt: skip
    assert {path.name for path in (tiny_family / "budgets").iterdir()} == {f"{name}.json" for name in BUDGETS}
    assert no_partial_files(tiny_family)


def test_its_files_are_nested_and_use_their_budgets(tiny_family, tiny_llama):
    files = budget_files(tiny_family)
    assert_nested(files)
    for name, file in zip(BUDGETS, files, strict=True):
        assert file.asked == float(name)
        assert file.limit == int(file.asked * file.total)
        assert 0.999 * file.limit <= file.used <= file.limit
        assert file.bound is not None
        assert file.predicted is not None
        assert file.bound <= file.predicted
        path = tiny_family / "budgets" / f"{name}.json"
        assert "valid" in done("budget", "validate", path, "--model", tiny_llama).stdout
        assert "nested-knapsack" in done("budget", "show", path).stdout


def test_its_points_say_what_the_files_say_and_what_was_measured(tiny_family):
    made = read(tiny_family / "family.json")
    for file, point in zip(budget_files(tiny_family), made["points"], strict=True):
        assert [point[key] for key in ("asked", "limit", "used", "predicted", "bound")] == [
            file.asked, file.limit, file.used, file.predicted, file.bound
        ]  # fmt: skip
        assert point["gap"] == file.allocation.gap
        assert point["file"] == f"budgets/{file.asked:g}.json"
        assert point["predicted"] < point["uniform"]["predicted"]
        for outcome in (point, point["uniform"]):
            assert outcome["measured"] > 0
            assert outcome["stderr"] > 0
    measured = [point["measured"] for point in made["points"]]
    assert measured == sorted(measured, reverse=True)
    assert made["candidates"] == "span"


def test_a_point_is_refined_by_the_command_that_is_proposed(tiny_family, tmp_path):
    folder = shutil.copytree(tiny_family, tmp_path / "family")
    shown = done("report", folder).stdout
    assert "Family of 3 nested budgets" in shown
    assert max(map(len, shown.split(" budgets  ")[0].splitlines())) <= 80
    assert (folder / "report" / "frontier.png").exists()
    program, *arguments = shown.splitlines()[-1].split()[1:]
    assert program == "globalopt"
    done(*arguments, "--out", tmp_path / "refined", "-q")
    summary = read(tmp_path / "refined" / "summary.json")
    assert (summary["solver"], summary["asked"], summary["allocator"]) == ("oats", 0.5, "nested-knapsack")
    assert (tmp_path / "refined" / "budget.json").read_bytes() == (folder / "budgets" / "0.5.json").read_bytes()


def test_a_finished_family_is_read_back(tiny_search, tiny_family, monkeypatch):
    before = contents(tiny_family)
    monkeypatch.setattr(family, "analyse", None)
    again = done(*tiny_search, "--budget", "0.8,0.3,0.5", "--out", tiny_family, "--json")
    assert "is finished" in again.stderr
    assert json.loads(again.stdout) == read(tiny_family / "family.json")
    assert contents(tiny_family) == before


def test_another_family_in_the_same_folder_is_refused(tiny_search, tiny_family, tiny_run):
    options = ("--budget", ",".join(BUDGETS), "-q")
    for other in (["--budget", "0.3,0.5"], ["--pattern", "2:4", "--budget", "0.6,0.8"], ["--search-tokens", "0"]):
        assert "holds another run" in refused(1, *tiny_search, *options, *other, "--out", tiny_family)
    assert "different budgets" in refused(1, *tiny_search, "--budget", "0.3,0.5", "-q", "--out", tiny_family)
    assert "family" in refused(1, *tiny_search, *options, "--out", tiny_run)
    assert "family, " in refused(1, *tiny_search, "--out", tiny_family, "-q")
    assert "report it alone" in refused(1, "report", tiny_family, tiny_run)


def test_fresh_makes_another_family_in_its_place(tiny_search, tiny_family, tmp_path):
    folder = shutil.copytree(tiny_family, tmp_path / "family")
    done(*tiny_search, "--budget", "0.4,0.6", "--out", folder, "--fresh", "-q")
    assert {path.name for path in (folder / "budgets").iterdir()} == {"0.4.json", "0.6.json"}


@pytest.mark.parametrize(
    ("owner", "name", "at"),
    [
        (Run, PREDICTION, 3),
        (budget_file, "write", 2),
        (TargetObjective, "losses", 4),
        (Run, FAMILY, 1),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_interrupted_family_goes_on(tiny_search, tiny_family, tmp_path, monkeypatch, owner, name, at):
    command = (*tiny_search, "--budget", ",".join(BUDGETS), "--out", tmp_path / "family", "-q")
    with monkeypatch.context() as patch:
        interrupt(patch, owner, name, at)
        assert run(*command).exit_code == INTERRUPTED
    assert not (tmp_path / "family" / "family.json").exists()
    asked = []
    losses = TargetObjective.losses
    monkeypatch.setattr(TargetObjective, "losses", lambda *arguments: asked.append(1) or losses(*arguments))
    done(*command)
    # Three nested and three uniform allocations; what was measured before is in the journal.
    assert len(asked) == {"losses": 3, FAMILY: 0}.get(name, 6)
    assert stable(tmp_path / "family") == stable(tiny_family)


def test_a_frontier_leaves_out_what_a_pattern_does_not_reach(tiny_search, tmp_path):
    options = ("--pattern", "2:4", "--frontier", "--search-tokens", "0", "--sensitivity", "none")
    shown = done(*tiny_search, *options, "--out", tmp_path / "family")
    assert "Left out: 0.1, 0.15" in shown.stderr
    assert "left out: 8 budgets that pattern 2:4 does not reach" in shown.stdout
    made = read(tmp_path / "family" / "family.json")
    assert made["left_out"] == [0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45]
    assert made["candidates"] is made["points"][0]["measured"] is None
    assert not (tmp_path / "family" / "search").exists()
    assert_nested(budget_files(tmp_path / "family", [f"{point['asked']:g}" for point in made["points"]]))


def test_a_family_up_to_the_dense_model_in_bytes(tiny_search, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done(*tiny_search, "--budget", "1,0.4", "--accounting", "bytes", "--allocator-set", "exact=false")
    folder = tmp_path / "runs" / "llama-family-bytes-oats-seed0"
    dense = budget_files(folder, ["0.4", "1"])[1]
    assert all(entry.nnz == entry.d_out * entry.d_in for entry in dense.layers)
    assert read(folder / "family.json")["points"][1]["measured"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--budget", "0.3,,0.5"], 2, "several separated by commas; got '0.3,,0.5'"),
        (["--budget", "0.3,half"], 2, "got '0.3,half'"),
        (["--budget", ""], 2, "got ''"),
        (["--budget", "half"], 2, "got 'half'"),
        (["--budget", "0.3,0.30"], 2, "names a fraction twice"),
        (["--budget", "0.3,1.5"], 2, "in (0, 1]; got 1.5"),
        (["--budget", "0.3,nan"], 2, "in (0, 1]; got nan"),
        (["--budget", "0.3", "--frontier"], 2, "not both"),
        (["--budget", "0.3,0.5", "--allocator", "uniform"], 2, "made by the nested knapsack"),
        (["--frontier", "--allocator-set", "gp=1"], 2, "did you mean 'gap'?"),
        (["--budget", "0.3", "--search-tokens", "0"], 2, "--search-tokens 0 is for a family"),
        (["--budget", "0.6,0.4", "--pattern", "2:4"], 3, "Raise --budget to at least 0.5"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_no_family(tiny_search, tmp_path, options, code, says):
    assert says in refused(code, *tiny_search, *options, "--out", tmp_path / "run", "-q")
    assert not (tmp_path / "run").exists()


def test_a_frontier_that_reaches_nothing(tiny_search, tmp_path, monkeypatch):
    monkeypatch.setattr(family, "FRONTIER", (0.1, 0.2))
    message = refused(3, *tiny_search, "--pattern", "2:4", "--frontier", "--out", tmp_path / "run", "-q")
    assert "Raise --budget to at least 0.5" in message


def test_a_broken_family_is_named(tiny_family, tmp_path):
    folder = shutil.copytree(tiny_family, tmp_path / "family")
    (folder / "family.json").write_text('{"command": 1}')
    assert "does not fit" in refused(1, "report", folder)
    assert "holds a family of budgets" in refused(1, "eval", folder, "-q")


def test_the_dense_weights_are_back_after_measuring(tiny_search, tmp_path, monkeypatch):
    kept = {}
    made = session.set_up

    def set_up(*arguments):
        kept["session"] = made(*arguments)
        kept["before"] = {spec.name: kept["session"].layers.weight(spec.name) for spec in kept["session"].layers.specs}
        return kept["session"]

    monkeypatch.setattr(session, "set_up", set_up)
    done(*tiny_search, "--budget", "0.3,0.5", "--out", tmp_path / "family", "-q")
    layers = kept["session"].layers
    assert all(layers.weight(name).equal(weight) for name, weight in kept["before"].items())
