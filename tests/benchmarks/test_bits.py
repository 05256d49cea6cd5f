"""The cells of few bits, on a tiny model."""

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
SIZES = ("--nsamples", "4", "--seqlen", "32", "--eval-windows", "2")


@pytest.fixture
def bits(monkeypatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("bits")
    sys.modules.pop("bits", None)


def test_cells_are_compressed_evaluated_drawn_and_read_back(bits, tiny_llama, tiny_text, tmp_path, monkeypatch, capsys):
    words = ["--out", str(tmp_path / "out"), "--model", str(tiny_llama), "--calibration", str(tiny_text), *SIZES]
    words += ["--kept", "0.3", "0.15", "--rows", "gptq", "half-4", "--match", "none"]
    words += ["--with", "--solver wanda --sensitivity none"]
    monkeypatch.setattr("real_models.subprocess", InProcess)
    assert bits.main(words) == 0
    found = json.loads((tmp_path / "out" / "bits.json").read_text())["cells"]
    assert list(found) == ["0.3 gptq none", "0.5 half-4 none"]
    (whole,), (half,) = found.values()
    assert 0.26 < whole["kept"] < 0.3
    assert 0.19 < half["kept"] < 0.25
    assert whole["texts"]["test"]["kl"] > 0
    assert (tmp_path / "out" / "bits.png").exists()
    table = (tmp_path / "out" / "bits.md").read_text()
    monkeypatch.setattr(bits, "run", None)
    capsys.readouterr()
    assert bits.main(words) == 0
    assert capsys.readouterr().out.strip() == table.strip()


def test_whole_layers_take_the_most_bits_that_a_fraction_pays_for(bits):
    found = [bits.affordable_bits(kept) for kept in (1.0, 0.52, 0.5, 0.4, 0.33, 0.27, 0.21, 0.2)]
    assert found == [16, 8, 6, 6, 5, 4, 3, None]
    assert bits.row_words("rtn", 0.27)[:6] == ["compress", "--solver", "rtn", "--accounting", "bytes", "--storage"]
