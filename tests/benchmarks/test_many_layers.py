"""The benchmark of many layers, on a handful of them."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    # Scripts find each other beside themselves.
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("many_layers")
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_every_row_is_measured_once_per_size_and_read_back(script, tmp_path, monkeypatch, capsys):
    measured = []

    def here(label, layers, options):
        measured.append((label, layers))
        return script.measure(label, layers, options.kept, options.seed)

    monkeypatch.setattr(script, "apart", here)
    rows = [script.SURFACES, script.FILE, "uniform", "knapsack", "bernoulli:preset=cap"]
    command = ["--out", str(tmp_path), "--layers", "4", "40", "--allocators", *rows]
    assert script.main(command) == 0
    assert measured == [(row, layers) for row in rows for layers in (4, 40)]
    cells = json.loads((tmp_path / "many_layers.json").read_text())["cells"]
    found = {(cell["label"], cell["layers"]): cell for cell in cells}
    assert found["knapsack", 40]["predicted"] < found["uniform", 40]["predicted"]
    assert 0 <= found["knapsack", 40]["gap"] < 1e-4
    assert all(cell["seconds"] >= 0 and cell["peak_bytes"] > 0 for cell in cells)
    # One evaluation of three masks on the whole selection text.
    assert found["bernoulli:preset=cap", 4]["tokens"] == 3 * script.CHUNKS * script.WINDOWS * script.SEQLEN
    assert found["uniform", 4]["tokens"] == 0
    assert "knapsack" in capsys.readouterr().out
    assert script.main(command) == 0
    assert len(measured) == 2 * len(rows)


def test_a_cell_of_its_own_process_is_what_is_measured_here(script, tmp_path):
    options = script.argparse.Namespace(out=tmp_path, kept=0.3, seed=0, limit=120.0)
    apart, here = script.apart("knapsack", 30, options), script.measure("knapsack", 30, 0.3, 0)
    assert (apart.predicted, apart.gap, apart.found) == (here.predicted, here.gap, here.found)
    assert script.apart("knapsack", 30, script.argparse.Namespace(**{**vars(options), "limit": 0.01})).seconds is None


def test_the_exponent_of_a_line_is_one(script):
    made = [script.Cell(layers, "any", 0.002 * layers) for layers in (10, 100, 1000, 10000)]
    assert script.exponent(made) == pytest.approx(1.0)
    assert script.exponent(made[:2]) is None
