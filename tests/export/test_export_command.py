"""`globalopt export` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from globalopt.export.formats import FORMATS
from tests.command import contents, done, refused
from tests.export.runs import made_run


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return made_run(tmp_path_factory.mktemp("made") / "run", kinds=("both", "sparse"))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_written_and_says_how_it_is_loaded(name, made, tmp_path):
    out = tmp_path / "out"
    said = done("export", made, "--format", name, "--out", out).stdout
    assert str(out) in said
    assert {"written", "size", "load"} <= set(said.split())
    size = sum(len(body) for body in contents(out).values())
    # Its path, which an adapter holds, is as long.
    again = tmp_path / "two"
    record = json.loads(done("export", made, "--format", name, "--out", again, "--json").stdout)
    assert record == {"format": name, "folder": str(again), "bytes": size}
    assert done("export", made, "--format", name, "--out", tmp_path / "quiet", "-q").stdout == ""


def test_a_run_of_the_program_is_exported(ranked_run, tmp_path):
    for name in FORMATS:
        done("export", ranked_run, "--format", name, "--out", tmp_path / name)
    assert contents(tmp_path / "dense") == contents(ranked_run / "model")


def test_mistakes_are_one_line(made, tmp_path):
    assert "did you mean 'packed'" in refused(2, "export", made, "--format", "pack", "--out", tmp_path / "out")
    assert "holds no run" in refused(1, "export", tmp_path, "--out", tmp_path / "out")
    (tmp_path / "file").touch()
    assert "not empty" in refused(1, "export", made, "--out", tmp_path / "file")
    assert "not empty" in refused(1, "export", made, "--out", made)
