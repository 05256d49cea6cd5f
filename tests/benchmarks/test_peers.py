"""The comparison with llm-compressor on a tiny model, with a stand-in for what runs in its environment."""

from __future__ import annotations

import hashlib
import importlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.command import done
from tests.tiny_models import save_tiny

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODULES = ("peers", "peer_programs", "peer_tables", "environments", "finished_cells")


@pytest.fixture
def peers(monkeypatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("peers")
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def command(tmp_path) -> list[str]:
    """The command line on a tiny model; an empty file is the interpreter of llm-compressor."""
    for name in ("train", "test"):
        words = random.Random(name).choices(["the", "cat", "sat", "on", "a", "mat", "and", "saw", "it"], k=600)
        (tmp_path / f"{name}.txt").write_text(" ".join(words))
    save_tiny(tmp_path / "dense", dtype=torch.bfloat16)
    python = tmp_path / "out" / "environments" / "llm-compressor" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    texts = ["--calibration", str(tmp_path / "train.txt"), "--eval-text", str(tmp_path / "test.txt")]
    sizes = ["--nsamples", "4", "--seqlen", "16", "--eval-windows", "3"]
    return [str(tmp_path / "dense"), *texts, *sizes, "--out", str(tmp_path / "out")]


class Programs:
    """Both programs in this process: globalopt by its command, and half of the weights by size for llm-compressor."""

    def __init__(self, broken: str = "") -> None:
        self.broken = broken
        self.ran: list[tuple[str, str, str]] = []
        self.jobs: list[dict[str, Any]] = []

    def __call__(self, name: str, environments: Path, words, variables, out: Path):
        self.ran.append((name, out.parent.parent.name, out.parent.name))
        cost = importlib.import_module("environments").Cost
        said, code = "", 0
        if name == "globalopt":
            assert "--no-evaluate" in words
            done(*words[2:])
        else:
            job = json.loads(Path(words[1]).read_text())
            self.jobs.append(job)
            self.compress(job)
            said, code = '{"llmcompressor": "0"}\n', int(job["method"] == self.broken)
        taken = cost(1.0, 2.0, 2**29) if name == "globalopt" else cost(2.0, 4.0, 2**30)
        return subprocess.CompletedProcess(words, code, said, "it broke\n" if code else ""), taken

    def compress(self, job: dict[str, Any]) -> None:
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
        for name in job["layers"]:
            weight = model.get_parameter(f"{name}.weight").data
            if "bits" in job:
                step = weight.abs().max() / 2 ** (job["bits"] - 1)
                weight.copy_((weight / step).round() * step)
            elif job["mask_structure"] == "2:4":
                smaller = weight.abs().unflatten(1, (-1, 4)).topk(2, dim=2, largest=False).indices
                weight.unflatten(1, (-1, 4)).scatter_(2, smaller, 0)
            else:
                weight[weight.abs() < weight.abs().median()] = 0
        model.to(getattr(torch, job["dtype"])).save_pretrained(job["out"])
        AutoTokenizer.from_pretrained(job["model"]).save_pretrained(job["out"])


def test_both_programs_read_the_same_windows_and_finished_cells_are_not_run_again(
    peers, command, tmp_path, monkeypatch, capsys
):
    programs = Programs()
    monkeypatch.setattr(peers, "measure_python", programs)
    asked = [*command, "--rows", "wanda", "rtn-int4", "--repeats", "2"]
    assert peers.main(asked) == 0
    assert programs.ran == [
        ("llm-compressor", "wanda", "llm-compressor-0"),
        ("globalopt", "wanda", "globalopt-0"),
        ("globalopt", "wanda", "globalopt-1"),
        ("llm-compressor", "wanda", "llm-compressor-1"),
        ("llm-compressor", "rtn-int4", "llm-compressor-0"),
        ("globalopt", "rtn-int4", "globalopt-0"),
        ("globalopt", "rtn-int4", "globalopt-1"),
        ("llm-compressor", "rtn-int4", "llm-compressor-1"),
    ]
    shown = capsys.readouterr().out
    assert peers.main(asked) == 0
    assert len(programs.ran) == 8
    assert capsys.readouterr().out == shown

    found = json.loads((tmp_path / "out" / "peers.json").read_text())
    theirs, ours, *rounded = found["results"]
    assert (theirs["row"], theirs["program"], ours["program"]) == ("wanda", "llm-compressor", "globalopt")
    # What llm-compressor is given is what globalopt says that it read.
    job = programs.jobs[0]
    windows = np.load(job["tokens"])
    assert windows.shape == (4, 16)
    digest = hashlib.sha256(windows.astype("<i8").tobytes()).hexdigest()
    assert digest == found["calibration_sha256"]
    assert (job["mask_structure"], job["dtype"], job["sparsity"]) == ("0:0", "bfloat16", 0.5)
    for each in (theirs, ours):
        assert each["quality"]["kept"] == pytest.approx(0.5, abs=0.01)
        assert each["quality"]["bytes"] == pytest.approx(0.5 + 1 / 16, abs=0.01)
        assert len(each["quality"]["kl"]) == 3
        assert min(each["quality"]["kl"]) > 0
    # Widths are 32 and 48, which groups of 32 and 16 divide.
    assert sorted(set(programs.jobs[-1]["group_sizes"].values())) == [16, 32]
    their_bits, our_bits = (16 * each["quality"]["bytes"] for each in rounded)
    assert 4.5 <= their_bits <= 5
    assert our_bits == pytest.approx(4.25, abs=0.01)
    assert all(each["quality"]["kept"] == 1 for each in rounded)
    # Costs are of whole processes; a second model is not kept.
    assert "| Wanda, 50 % | globalopt | 1.0 | 0.50 (0.50 to 0.50) |" in shown
    assert sorted(path.name for path in (tmp_path / "out" / "runs" / "wanda").iterdir()) == [
        "globalopt-0",
        "llm-compressor-0",
    ]


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_both_programs_prune_to_two_of_four(peers, command, tmp_path, monkeypatch, method):
    programs = Programs()
    monkeypatch.setattr(peers, "measure_python", programs)
    assert peers.main([*command, "--rows", f"{method}-2:4"]) == 0
    (job,) = programs.jobs
    assert (job["method"], job["sparsity"], job["mask_structure"]) == (method, 0.5, "2:4")
    for each in json.loads((tmp_path / "out" / "peers.json").read_text())["results"]:
        # Half of the weights in 16 bits, and four bits of index for every four.
        assert (each["quality"]["kept"], each["quality"]["bytes"]) == (0.5, 0.5625)
        folder = tmp_path / "out" / "runs" / f"{method}-2of4" / f"{each['program']}-0"
        saved = folder / ("run/model" if each["program"] == "globalopt" else "model")
        model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
        for name in job["layers"]:
            weight = model.get_parameter(f"{name}.weight")
            assert (weight.unflatten(1, (-1, 4)).count_nonzero(dim=2) == 2).all(), (each["program"], name)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("bits", [8, 4])
def test_both_programs_round_every_weight_to_as_many_bits(peers, command, tmp_path, monkeypatch, method, bits):
    programs = Programs()
    monkeypatch.setattr(peers, "measure_python", programs)
    assert peers.main([*command, "--rows", f"{method}-int{bits}"]) == 0
    (job,) = programs.jobs
    assert (job["method"], job["bits"]) == (method, bits)
    theirs, ours = json.loads((tmp_path / "out" / "peers.json").read_text())["results"]
    run = tmp_path / "out" / "runs" / f"{method}-int{bits}" / "globalopt-0" / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["solver"], summary["compressed"]) == (method, [])
    assert {layer["storage"] for layer in summary["layers"]} == {str(bits)}
    assert ours["quality"]["kept"] == theirs["quality"]["kept"] == 1
    # A scale of 16 bits for every 64 numbers.
    assert 16 * ours["quality"]["bytes"] == pytest.approx(bits + 0.25, abs=0.01)
    assert min(ours["quality"]["kl"]) > 0


def test_a_row_that_breaks_leaves_the_others(peers, command, monkeypatch, capsys):
    monkeypatch.setattr(peers, "measure_python", Programs(broken="gptq"))
    assert peers.main([*command, "--rows", "gptq-int4", "rtn-int8"]) == 2
    said = capsys.readouterr()
    assert "gptq-int4 by llm-compressor ended with 1 (it broke)" in said.err
    assert "| round to nearest, 8 bits | llm-compressor |" in said.out
    assert "GPTQ" not in said.out


def test_a_missing_environment_is_named(peers, command, tmp_path, capsys):
    (tmp_path / "out" / "environments" / "llm-compressor" / "bin" / "python").unlink()
    assert peers.main([*command, "--rows", "wanda"]) == 2
    assert "Add --install" in capsys.readouterr().err


def test_held_logits_give_the_metrics_of_the_dense_model(peers, tmp_path):
    from globalopt.evaluation.perplexity import evaluate_both
    from globalopt.text.splits import Split
    from tests.tiny_models import tiny_ids, tiny_model

    split = Split("test", tiny_ids(4, 12), (0, 12, 24, 36), (0, 48), "made up", "0" * 64, special_tokens=0)
    dense, other = tiny_model("llama"), tiny_model("llama", seed=1)
    held = peers.Remembered(dense)
    expected = evaluate_both(other, dense, split)
    for _ in range(2):
        for found, wanted in zip(evaluate_both(other, held, split), expected, strict=True):
            assert found.nll == pytest.approx(wanted.nll)
        assert found.kl == pytest.approx(wanted.kl)


def test_rows_are_compared_with_their_own_and_a_search_with_another(peers):
    tables = importlib.import_module("peer_tables")
    cost = importlib.import_module("environments").Cost

    def result(row: str, program: str, kl: tuple[float, ...], *seconds: float) -> Any:
        made = tuple(tables.Made(cost(each, each, 2**30), "a", {}) for each in seconds)
        return tables.Result(row, program, made, tables.Quality(0.5, 0.56, 20.0, 10.0, kl, kl))

    results = [
        result("sparsegpt", "llm-compressor", (0.4, 0.6), 1.0, 2.0),
        result("sparsegpt", "globalopt", (0.5, 0.7), 2.0, 2.0),
        result("knapsack", "globalopt", (0.2, 0.2), 20.0),
    ]
    quality = tables.quality_table(peers.ROWS, results).splitlines()
    assert quality[3].endswith("| 0.5000 ± 0.1000 | - | - | - |")
    assert quality[4].endswith("| 0.6000 ± 0.1000 | 1.200 | +0.1000 ± 0.0000 | +0.1000 ± 0.0000 |")
    assert "| 0.400 | -0.3000 ± 0.1000 |" in quality[5]
    costs = tables.cost_table(peers.ROWS, results).splitlines()
    assert costs[2].startswith("| SparseGPT, 50 % | llm-compressor | 1.5 | - |")
    assert costs[3].startswith("| SparseGPT, 50 % | globalopt | 2.0 | 1.50 (1.00 to 2.00) |")


def test_every_row_is_of_a_program_and_groups_are_those_of_equal_size(peers):
    for name, row in peers.ROWS.items():
        assert row.peer or row.ours, name
        assert row.against in ("", *peers.ROWS)
    programs = importlib.import_module("peer_programs")
    made = programs.groups({"q": 64, "k": 64, "down": 256}, {"q": 64, "k": 64, "down": 128}, 8)
    assert [(each["targets"], each["weights"]["group_size"]) for each in made.values()] == [
        (["q", "k"], 64),
        (["down"], 128),
    ]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_process_is_measured_without_the_memory_of_its_parent(tmp_path):
    work = (
        "import sys, time\nheld = bytearray(60_000_000)\n"
        "end = time.process_time() + 0.4\nwhile time.process_time() < end: pass\nsys.exit(5)"
    )
    out = tmp_path / "cost.json"
    # This process is larger than what it measures.
    held = np.ones(40_000_000)
    words = [sys.executable, "-IS", BENCHMARKS / "measured.py", out, sys.executable, "-IS", "-c", work]
    assert subprocess.run([str(word) for word in words], check=False).returncode == 5
    found = json.loads(out.read_text())
    assert held.nbytes > 200_000_000
    assert 60_000_000 < found["peak"] < 120_000_000
    assert found["wall"] > 0.9 * found["cpu"] >= 0.36
