"""A run without its evaluation says that nothing was measured; the same command, or `globalopt eval`, does it later."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from globalopt.evaluation import perplexity
from globalopt.pipeline import measure
from reports.quality_tables import NOT_MEASURED
from tests.command import WINDOWS, assert_alike, done, read, refused, results, write_text
from tests.tiny_models import save_tiny

STAGES = {"evaluate", "samples"}


def words(command: str, place: Path, run: str) -> tuple[object, ...]:
    method = {
        "search": ("--allocator", "knapsack", "--solver", "wanda", "--match", "none"),
        "compress": ("--budget", "0.5", "--solver", "wanda"),
    }
    sizes = (*WINDOWS, "--samples", "1", "--device", "cpu", "--seed", 3)
    return (
        command,
        place / "model",
        "--calibration",
        place / "text.txt",
        *sizes,
        "--out",
        place / run,
        *method[command],
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, and a run of it that was measured."""
    folder = tmp_path_factory.mktemp("measured")
    save_tiny(folder / "model")
    write_text(folder / "text.txt")
    done(*words("compress", folder, "whole"))
    return folder


@pytest.fixture
def unmeasured(place: Path) -> Path:
    """A run of the same without its evaluation."""
    shutil.rmtree(place / "run", ignore_errors=True)
    done(*words("compress", place, "run"), "--no-evaluate", "--quiet")
    return place / "run"


@pytest.mark.parametrize("command", ["compress", "search"])
def test_nothing_is_evaluated(command: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("evaluate_both", "write_samples", "load_from"):
        monkeypatch.setattr(measure, name, None)
    monkeypatch.setattr(perplexity, "evaluate", None)
    asked = (*words(command, place, "run"), "--out", tmp_path / "run", "--no-evaluate")
    assert not STAGES & json.loads(done(*asked, "--dry-run", "--json").stdout)["seconds"].keys()
    summary = json.loads(done(*asked, "--json").stdout)
    assert summary["dense"] == summary["compressed"] == []
    assert not STAGES & {stage["name"] for stage in summary["stages"]}
    assert not {"windows.json", "samples.json"} & {path.name for path in (tmp_path / "run").iterdir()}


def test_the_model_is_the_same_and_the_stages_are_told_apart(place: Path, unmeasured: Path) -> None:
    assert_alike(results(unmeasured), results(place / "whole"))
    whole, run = (
        {stage["name"] for stage in read(place / name / "summary.json")["stages"]} for name in ("whole", "run")
    )
    assert whole - run >= STAGES
    assert {"load", "refine", "save"} <= run
    estimate = json.loads(done(*words("compress", place, "other"), "--dry-run", "--json").stdout)["seconds"]
    assert estimate.keys() >= STAGES


def test_everything_says_that_nothing_was_measured(place: Path, unmeasured: Path) -> None:
    shown = done(*words("compress", place, "run"), "--no-evaluate").stdout
    assert f"Quality: {NOT_MEASURED}" in shown
    assert f"globalopt eval {unmeasured}" in shown.replace("\n", "")
    assert "quality" in (brief := done(*words("compress", place, "run"), "--no-evaluate", "--quiet").stdout)
    assert NOT_MEASURED in brief.replace("\n", " ")
    page = (unmeasured / "report" / "report.html").read_text(encoding="utf-8")
    assert f"{NOT_MEASURED.capitalize()}." in page
    assert "Perplexity" not in page
    card = (unmeasured / "model" / "README.md").read_text(encoding="utf-8")
    assert "Not measured" in card
    assert "perplexity" not in card
    compared = done("report", place / "whole", unmeasured).stdout.replace("\n", " ")
    assert "not measured on test" in compared


@pytest.mark.parametrize("later", ["the same command", "eval"])
def test_it_is_measured_later(later: str, place: Path, unmeasured: Path) -> None:
    before = read(unmeasured / "summary.json")
    if later == "eval":
        said = done("eval", unmeasured, "--device", "cpu", "--json").stderr
        assert "keeps these" in said.replace("\n", " ")
    else:
        said = done(*words("compress", place, "run"), "--json").stderr
        assert "finished but for its evaluation" in said.replace("\n", " ")
    found, whole = (read(place / name / "summary.json") for name in ("run", "whole"))
    for models in ("dense", "compressed"):
        assert_alike(found[models], whole[models])
    assert_alike(read(unmeasured / "windows.json"), read(place / "whole" / "windows.json"))
    names = [stage["name"] for stage in found["stages"]]
    assert names[: len(before["stages"])] == [stage["name"] for stage in before["stages"]]
    assert len(names) == len(set(names))
    assert "evaluate" in names
    assert found["layers"] == before["layers"]
    assert "perplexity of the base model" in (unmeasured / "model" / "README.md").read_text(encoding="utf-8")
    shown = done("report", unmeasured).stdout
    assert "KL to dense" in shown
    assert NOT_MEASURED not in shown
    again = done(*words("compress", place, "run"), "--json")
    assert "nothing was computed again" in again.stderr.replace("\n", "")
    assert json.loads(again.stdout) == found


def test_other_windows_do_not_complete_a_run(unmeasured: Path) -> None:
    done("eval", unmeasured, "--device", "cpu", "--seqlen", 8, "--quiet")
    done("eval", unmeasured, "--device", "cpu", "--dense", unmeasured / "model", "--quiet")
    assert read(unmeasured / "summary.json")["compressed"] == []


def test_no_windows_are_refused_with_the_option_that_leaves_the_evaluation_out(place: Path) -> None:
    said = refused(2, *words("compress", place, "other"), "--eval-windows", 0)
    assert "--no-evaluate" in said
