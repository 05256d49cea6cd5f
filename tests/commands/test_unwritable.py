"""Runs that can be read but not written are shown and measured all the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import Result

from tests.command import done, refused
from tests.export.runs import made_run


@pytest.fixture
def blocked(tiny_run: Path, tmp_path: Path) -> Path:
    """A run in which neither the report nor the result of an evaluation can be written, whoever runs this."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    shutil.rmtree(run / "report", ignore_errors=True)
    (run / "report").touch()
    (run / "eval.json").unlink(missing_ok=True)
    (run / "eval.json" / "inner").mkdir(parents=True)
    return run


def noted(result: Result) -> str:
    """The last line on stderr, which is no error."""
    line = result.stderr.strip().splitlines()[-1]
    assert "error" not in line
    assert "--out" not in line
    return line


def test_a_report_that_cannot_be_drawn_is_printed(blocked: Path) -> None:
    said = done("report", blocked)
    assert "perplexity" in said.stdout
    assert "not drawn. Cannot write" in noted(said)


def test_an_evaluation_that_cannot_be_kept_is_printed(blocked: Path) -> None:
    said = done("eval", blocked)
    assert "perplexity" in said.stdout
    assert "not kept in the run. Cannot write" in noted(said)


def test_an_export_that_cannot_be_written_names_its_option(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", kinds=("sparse",))
    (tmp_path / "file").touch()
    said = refused(1, "export", run, "--out", tmp_path / "file" / "out")
    assert said.endswith("Choose a writable --out.")


@pytest.mark.parametrize(
    "words",
    [
        ("report", "{long}"),
        ("eval", "{long}/x", "--tasks-path", "x"),
        ("export", "{long}", "--out", "out"),
        ("search", "{long}/x", "--budget", "0.5", "--calibration", "x"),
        ("search", "--budget", "0.5", "--out", "{long}"),
    ],
)
def test_names_that_are_too_long_are_one_line(words: tuple[str, ...], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    long = str(tmp_path / ("x" * 300))
    said = refused(1, *(word.format(long=long) for word in words))
    assert "x" * 300 in said
    assert "too long" in said
