"""A finished run that is asked for again is shown without loading anything; what was changed is looked at again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from globalopt.pipeline import session
from globalopt.pipeline.finished import finished, question, remember
from globalopt.pipeline.options import ModelOptions, TextOptions
from globalopt.runs.folder import ASKED
from tests.command import WINDOWS, done, write_text
from tests.tiny_models import save_tiny


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")


def words(command: str, model: Path, text: Path, run: Path) -> tuple[object, ...]:
    chosen = {
        "search": ("--allocator", "uniform", "--solver", "wanda", "--match", "none"),
        "compress": ("--budget", "0.5", "--solver", "wanda"),
    }
    return (command, model, "--calibration", text, *WINDOWS, "--device", "cpu", "--out", run, *chosen[command])


@pytest.mark.parametrize("command", ["search", "compress"])
def test_a_finished_run_is_shown_without_loading_anything(
    command: str, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = words(command, model, text, tmp_path / "run")
    first = done(*asked, "--json")
    with monkeypatch.context() as patched:
        patched.setattr(session, "set_up", None)
        again = done(*asked, "--json")
    assert again.stdout == first.stdout
    assert "nothing was computed again" in again.stderr
    file = ("--budget-file", tmp_path / "run" / "budget.json", "--solver", "magnitude", "--match", "none")
    refined = ("compress", model, "--calibration", text, *WINDOWS, "--out", tmp_path / "refined", *file)
    first = done(*refined, "--json")
    with monkeypatch.context() as patched:
        patched.setattr(session, "set_up", None)
        assert done(*refined, "--json").stdout == first.stdout


def test_a_model_or_text_that_was_written_again_is_another_question(model: Path, text: Path, tmp_path: Path) -> None:
    models, texts = ModelOptions(str(model)), TextOptions(str(text))
    asked = question({"budget": 0.5}, models, texts)
    assert asked == question({"budget": 0.5}, models, texts)
    assert asked != question({"budget": 0.4}, models, texts)
    assert asked != question({"budget": 0.5}, models, TextOptions(str(text), seqlen=64))
    for path in (model / "config.json", text):
        os.utime(path, ns=(1, 1))
        changed = question({"budget": 0.5}, models, texts)
        assert changed != asked
        asked = changed
    assert question({}, ModelOptions("owner/model"), texts) is None
    assert question({}, models, TextOptions("owner/data:train")) is None


def test_a_run_whose_model_is_gone_is_not_finished(model: Path, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done(*words("compress", model, text, run), "--quiet")
    asked = (run / ASKED).read_text().strip().strip('"')
    assert finished(run, asked) is not None
    assert finished(run, "another") is None
    assert finished(run, None) is None
    for path in (run / "model").iterdir():
        path.unlink()
    (run / "model").rmdir()
    assert finished(run, asked) is None
    remember(tmp_path / "nowhere", None)
    assert not (tmp_path / "nowhere").exists()
