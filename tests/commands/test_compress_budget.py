"""`compress --budget` runs what a published method needs, and writes its budget."""

from __future__ import annotations

import json

import pytest

from globalopt.budgets import budget_file
from tests.command import WINDOWS, done

PLAIN = ["load", "allocate", "refine", "save", "evaluate"]


@pytest.mark.parametrize(
    ("options", "stages"),
    [
        (["--solver", "wanda", "--pattern", "2:4"], PLAIN),
        (["--solver", "sparsegpt", "--allocator", "owl"], ["load", "grams", "profile", *PLAIN[1:]]),
        (["--solver", "oats", "--set", "steps=2", "--rank-share", "0.4"], PLAIN),
        (["--solver", "magnitude", "--accounting", "bytes"], PLAIN),
    ],
    ids=["wanda", "owl", "oats", "bytes"],
)
def test_a_fraction_is_kept_without_an_analysis(tiny_llama, tiny_text, tmp_path, options, stages):
    text = ("--calibration", tiny_text, *WINDOWS, "--samples", "0", "--out", tmp_path / "run", "--json")
    summary = json.loads(done("compress", tiny_llama, "--budget", "0.5", *options, *text).stdout)
    assert [stage["name"] for stage in summary["stages"]] == stages
    file = budget_file.read(tmp_path / "run" / "budget.json")
    assert (file.asked, file.predicted) == (0.5, None)
    assert file.accounting == ("bytes" if "bytes" in options else "params")
    assert 0.98 * summary["limit"] <= summary["used"] <= summary["limit"] == file.limit
    assert any(layer.rank for layer in file.layers) == ("--rank-share" in options)
    assert summary["matching"] == []
    assert not (tmp_path / "run" / "samples.json").exists()
