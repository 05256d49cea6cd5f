"""The cells of a real model, on a tiny one."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.benchmarks.in_process import InProcess

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SIZES = ("--nsamples", "4", "--seqlen", "32", "--eval-windows", "2", "--eval-seqlen", "32")


@pytest.fixture
def real_models(monkeypatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("real_models")
    sys.modules.pop("real_models", None)


def test_cells_are_searched_evaluated_and_read_back(real_models, tiny_llama, tiny_text, tmp_path, monkeypatch, capsys):
    other = tmp_path / "other.txt"
    other.write_text("a mat sat on the cat " * 40)
    words = ["--out", str(tmp_path / "out"), "--model", str(tiny_llama), "--calibration", str(tiny_text), *SIZES]
    words += ["--other", str(other), "--kept", "0.5", "--rows", "uniform-0", "uniform-0.2"]
    words += ["--with", "--solver oats --set steps=2 --sensitivity none"]
    monkeypatch.setattr(real_models, "subprocess", InProcess)
    assert real_models.main(words) == 0
    found = json.loads((tmp_path / "out" / "real-models.json").read_text())["cells"]["0.5 none"]
    (plain,), (ranked,) = found["uniform-0"], found["uniform-0.2"]
    assert list(plain["texts"]) == ["validation", "test", "other"]
    assert all(text["kl"] > 0 for text in plain["texts"].values())
    assert set(plain["rank_shares"].values()) == {0.0}
    assert 0 < max(ranked["rank_shares"].values()) <= 0.2
    assert 0.49 < ranked["used"] <= plain["used"] <= 0.5
    table = (tmp_path / "out" / "real-models.md").read_text()
    assert table.count("| uniform-0 |") == 1
    assert "1.00" in table
    monkeypatch.setattr(real_models, "run", None)
    capsys.readouterr()
    assert real_models.main(words) == 0
    assert capsys.readouterr().out.strip() == table.strip()


def test_a_budget_has_a_fraction_and_perhaps_a_pattern(real_models):
    assert real_models.budget_words("0.5") == ["--budget", "0.5"]
    assert real_models.budget_words("2:4@0.56") == ["--budget", "0.56", "--pattern", "2:4"]
