"""`globalopt export` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from globalopt.export.formats import FORMATS
from globalopt.runs.folder import Run
from tests.command import contents, done, refused
from tests.export.runs import made_run


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return made_run(tmp_path_factory.mktemp("made") / "run", kinds=("both", "sparse"))


def weights(folder: Path) -> int:
    return sum(len(body) for name, body in contents(folder).items() if name.endswith(".safetensors"))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_written_and_says_how_it_is_loaded(name, made, tmp_path):
    out = tmp_path / "out"
    said = done("export", made, "--format", name, "--out", out).stdout
    assert str(out) in said
    assert {"written", "size", "load"} <= set(said.split())
    larger = weights(out) > weights(made / "model")
    assert ("weights are larger" in said) == larger
    assert larger or name != "adapter"
    size = sum(len(body) for body in contents(out).values())
    # Its path, which an adapter holds, is as long.
    again = tmp_path / "two"
    record = json.loads(done("export", made, "--format", name, "--out", again, "--json").stdout)
    assert record == {"format": name, "folder": str(again), "bytes": size, "larger_than_dense": larger}
    assert done("export", made, "--format", name, "--out", tmp_path / "quiet", "-q").stdout == ""


def test_a_run_of_the_program_is_exported(ranked_run, tmp_path):
    for name in FORMATS:
        done("export", ranked_run, "--format", name, "--out", tmp_path / name)
    assert contents(tmp_path / "dense") == contents(ranked_run / "model")
    # A run names its model, its method, what it measured and its command in the card of every export.
    cards = [path.read_text() for path in tmp_path.rglob("README.md")]
    assert len(cards) == len(FORMATS) + 1
    for card in cards:
        rows = {line.split("|")[1].strip() for line in card.splitlines() if line.startswith("|")}
        assert {"base model", "method", "budget", "versions", "test"} <= rows
        assert f"    {Run.open(ranked_run).summary().command}\n" in card
    budgets = [path.read_bytes() for path in tmp_path.rglob("budget.json")]
    assert budgets == [(ranked_run / "budget.json").read_bytes()] * len(cards)


def test_mistakes_are_one_line(made, tmp_path):
    assert "did you mean 'packed'" in refused(2, "export", made, "--format", "pack", "--out", tmp_path / "out")
    assert "did you mean 'own'" in refused(
        2, "export", made, "--format", "adapter", "--ranks", "on", "--out", tmp_path / "x"
    )
    assert "--ranks own is of" in refused(2, "export", made, "--ranks", "own", "--out", tmp_path / "x")
    assert "holds no run" in refused(1, "export", tmp_path, "--out", tmp_path / "out")
    (tmp_path / "file").touch()
    assert "not empty" in refused(1, "export", made, "--out", tmp_path / "file")
    assert "not empty" in refused(1, "export", made, "--out", made)
