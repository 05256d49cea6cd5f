"""`compress --budget` runs what a published method needs, and writes its budget."""

from __future__ import annotations

import json

import pytest

from globalopt.budgets import budget_file
from tests.command import WINDOWS, done, read

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


def test_bits_of_a_run_go_into_its_budget_its_results_and_its_report(tiny_llama, tiny_text, tmp_path):
    text = ("--calibration", tiny_text, *WINDOWS, "--samples", "0")
    # At .27 all entries fit in 4 bits, which is better than rank beside some of them.
    options = ("--budget", "0.2", "--storage", "4/8", "--solver", "oats", "--set", "steps=2", "--rank-share", "0.5")
    done("compress", tiny_llama, *options, *text, "--out", tmp_path / "run", "-q")
    file = budget_file.read(tmp_path / "run" / "budget.json")
    assert (file.schema_version, file.accounting) == (2, "bytes")
    assert {layer.storage for layer in file.layers} == {"4/8"}
    # Another solver, without low rank, refines the same file in the same bits.
    again = ("--budget-file", tmp_path / "run" / "budget.json", "--solver", "magnitude", *text)
    done("compress", tiny_llama, *again, "--match", "none", "--out", tmp_path / "again", "-q")
    for name in ("run", "again"):
        summary = read(tmp_path / name / "summary.json")
        assert {layer["storage"] for layer in summary["layers"]} == {"4/8"}
        assert sum(layer["bytes"] for layer in summary["layers"]) == summary["used"] <= file.limit
        told = done("report", tmp_path / name).stdout
        parts = told.partition("Bytes of the layers, by part")[2].partition("counted, not measured")[0].splitlines()
        sizes = [int(line.split("%")[0].split()[-2].replace(",", "")) for line in parts if "%" in line]
        assert sum(sizes[:-1]) == sizes[-1] == summary["used"]
    assert any(layer["rank"] for layer in read(tmp_path / "run" / "summary.json")["layers"])
