"""The benchmark of exports, end to end on a tiny run."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.export.runs import made_run

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture
def serving(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "serving", raising=False)
    module = importlib.import_module("serving")
    # A process for every contender takes seconds to start.
    monkeypatch.setattr(module, "apart", lambda *arguments: module.weigh(*arguments))
    return module


def test_every_contender_is_measured_beside_dense_and_read_back(serving, tmp_path, capsys, monkeypatch):
    run = made_run(tmp_path / "run", kinds=("both", "sparse"))
    command = [str(run), "--out", str(tmp_path / "out"), "--dtype", "float32", "--prompt", "8", "--tokens", "2"]
    command += ["--rounds", "2"]
    assert serving.main(command) == 0
    printed = capsys.readouterr().out
    (file,) = (tmp_path / "out").glob("*.json")
    rows = json.loads(file.read_text())["rows"]
    assert [row["name"] for row in rows] == list(serving.CONTENDERS)
    assert all(len(row["speed"]["decode"]) == len(row["speed"]["prefill"]) == 2 for row in rows)
    assert {name: row["paths"] for name, row in zip(serving.CONTENDERS, rows, strict=True)}["packed unpack"] == {
        "unpack": 14
    }
    assert "no difference was measured" in " ".join(printed.split())
    monkeypatch.setattr(serving, "measure", None)
    assert serving.main(command) == 0
    assert capsys.readouterr().out == printed


def test_a_missing_run_is_one_line(serving, tmp_path, capsys):
    assert serving.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_ratios_are_of_the_same_round(serving):
    assert serving.ratios([2.0, 4.0, 9.0], [1.0, 4.0, 3.0]) == (2.0, 1.0, 3.0)
