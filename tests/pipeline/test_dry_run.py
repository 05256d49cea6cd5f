"""A dry run says what a run would take, from the config alone, and writes nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from globalopt.models.finding import find_layers
from globalopt.models.loading import load_model
from globalopt.pipeline import dry_run, timing
from globalopt.pipeline.estimates import memory
from globalopt.pipeline.estimates.job import Job
from globalopt.pipeline.estimates.shape import Structure
from globalopt.pipeline.options import ModelOptions, TextOptions
from globalopt.runs.files import read_metadata, read_tensors
from globalopt.runs.workspace import Workspace
from solvers import get_solver
from tests.command import WINDOWS, contents, done, refused, write_text
from tests.tiny_models import parameter_count, save_tiny, tiny_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SIDE", 32)
    monkeypatch.setattr(timing, "PRODUCT", 64)


def planned(models: ModelOptions, job: Job, texts: TextOptions | None = None) -> dict[str, Any]:
    plan = dry_run.dry_run(Structure.of(models), models, texts or TextOptions(nsamples=8, seqlen=16), job)
    return json.loads(json.dumps(plan.record()))


def test_a_search_is_described_and_nothing_is_written(model: Path, tmp_path: Path) -> None:
    for path in model.glob("*.safetensors"):
        path.unlink()
    before = contents(tmp_path)
    words = (
        "search",
        model,
        "--budget",
        "0.5",
        "--out",
        tmp_path / "run",
        *WINDOWS,
        "--dry-run",
        "--set",
        "preset=fast",
    )
    shown = done(*words).stdout
    for text in ("parameters", "14 layers in 2 blocks", "peak memory", "disk", "time, about", "Nothing was loaded"):
        assert text in shown
    record = json.loads(done(*words, "--json").stdout)
    assert record["parameters"] == parameter_count(tiny_model("llama"))
    assert record["covered"] + sum(record["skipped"].values()) == record["parameters"]
    assert record["peak_bytes"] == sum(record["memory"].values())
    assert record["disk_bytes"] == sum(record["disk"].values())
    folders = {"grams", "labels", "spans", "anchors", "layers", "matched", "model"}
    assert set(record["disk"]) == folders
    stages = {"labels", "span", "anchors", "metric", "gap", "predict", "correct"}
    assert set(record["seconds"]) == stages | {"refine", "match blocks", "evaluate", "samples"}
    assert all(seconds > 0 for seconds in record["seconds"].values())
    assert contents(tmp_path) == before


def test_a_family_makes_no_model(model: Path, tmp_path: Path) -> None:
    words = ("search", model, "--budget", "0.3,0.5", "--out", tmp_path / "run", *WINDOWS, "--dry-run", "--json")
    record = json.loads(done(*words).stdout)
    assert not {"layers", "model"} & set(record["disk"])
    assert "refine" not in record["seconds"]


def test_disk_is_not_more_than_was_said(model: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    words = ("search", model, "--budget", "0.5", "--calibration", text, *WINDOWS, "--device", "cpu")
    method = ("--allocator", "knapsack", "--set", "preset=fast")
    record = json.loads(done(*words, *method, "--out", tmp_path / "run", "--dry-run", "--json").stdout)
    done(*words, *method, "--out", tmp_path / "run", "--quiet")
    cache = tmp_path / "globalopt-cache"
    folders = {name: list((cache / name).iterdir()) for name in ("grams", "labels", "anchors")}
    folders |= {name: [tmp_path / "run" / name] for name in ("layers", "matched", "model")}
    disk = record["disk"]
    for name, places in folders.items():
        files = [path for place in places for path in place.glob("*.safetensors")]
        written = sum(path.stat().st_size for path in files)
        headers = 1000 * sum(1 for place in places for _ in place.iterdir())
        assert 0.5 * disk[name] < written < disk[name] + headers, name
    file = ("--budget-file", tmp_path / "run" / "budget.json")
    before = contents(tmp_path)
    words = ("compress", model, *file, "--calibration", text, "--out", tmp_path / "again", "--dry-run", "--json")
    again = json.loads(done(*words, "--solver", "wanda", "--match", "none").stdout)
    assert set(again["disk"]) == {"layers", "model"}
    assert set(again["seconds"]) == {"refine", "evaluate", "samples"}
    assert "labels" in json.loads(done(*words, "--solver", "hassle-free", "--match", "none").stdout)["disk"]
    matched = json.loads(done(*words, "--solver", "wanda", "--match", "model").stdout)
    assert {"labels", "match blocks", "match model"} <= set(matched["seconds"])
    assert matched["disk"]["matched"] == 2 * matched["disk"]["layers"]
    assert contents(tmp_path) == before
    other = save_tiny(tmp_path / "other", "gpt2")
    said = refused(1, "compress", other, *file, "--dry-run", "--out", tmp_path / "third")
    assert "belongs to another model" in said


STAGES = {
    "uniform": ({"labels", "probe", "metric"}, set()),
    "owl": ({"labels", "probe", "metric", "profile"}, {"grams", "profile"}),
    "knapsack": (
        {"labels", "span", "anchors", "metric", "gap", "predict", "correct"},
        {"labels", "span", "anchors", "predict", "correct"},
    ),
}
"""The stages before refinement by allocator: of a search for 3BASiL, and of one for Wanda."""


@pytest.mark.parametrize("allocator", STAGES)
def test_only_what_allocator_and_solver_read_is_estimated(allocator: str, model: Path, tmp_path: Path) -> None:
    for solver, expected in zip(("3basil", "wanda"), STAGES[allocator], strict=True):
        words = ("search", model, "--out", tmp_path / "run", *WINDOWS, "--dry-run", "--json", "--match", "none")
        record = json.loads(done(*words, "--solver", solver, "--allocator", allocator).stdout)
        assert set(record["seconds"]) == expected | {"refine", "evaluate", "samples"}, solver
        assert ("anchors" in record["disk"]) == ("anchors" in expected)


def test_few_bits_take_a_stage_and_time(model: Path, tmp_path: Path) -> None:
    words = ("search", model, "--out", tmp_path / "run", *WINDOWS, "--dry-run", "--json", "--match", "none")
    words += ("--allocator", "knapsack", "--accounting", "bytes", "--budget", "0.3")
    whole, few = (json.loads(done(*words, "--storage", bits).stdout)["seconds"] for bits in ("16", "auto"))
    assert set(few) - set(whole) == {"rounding"}
    direct = ("compress", model, "--out", tmp_path / "run", *WINDOWS, "--dry-run", "--json", "--budget", "0.3")
    direct += ("--accounting", "bytes", "--solver", "gptq", "--storage", "4")
    assert set(json.loads(done(*direct).stdout)["seconds"]) == {"refine", "evaluate", "samples"}


def test_memory_follows_the_limit(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "resident", lambda: 10**6)
    job = Job(0.5, get_solver("wanda"), get_solver("wanda"), refines=True, sweeps=True)
    size = 4 * parameter_count(tiny_model("llama"))
    states = 4 * 8 * 16 * 32 * 3
    assert not planned(ModelOptions(str(model), max_memory=str(10**6 + 3 * size + states)), job)["lazy"]
    tight = planned(ModelOptions(str(model), max_memory=str(10**6 + 3 * size + states - 1)), job)
    assert (tight["lazy"], tight["states_in_files"]) == (True, False)
    assert tight["memory"]["hidden states"] == states
    layers = find_layers(load_model(model, device="cpu").model)
    block = sum(p.numel() for p in layers.blocks[0].parameters())
    outside = parameter_count(layers.model) - 2 * block
    assert tight["memory"]["weights"] == 4 * (outside + block)
    tightest = planned(ModelOptions(str(model), max_memory=str(10**6 + states)), job)
    assert tightest["states_in_files"]
    assert tightest["memory"]["hidden states"] == 0


@pytest.mark.parametrize("solver", ["magnitude", "svd", "slab", "3basil"])
def test_every_kind_of_solver_can_be_timed(solver: str, model: Path) -> None:
    job = Job(0.5, get_solver(solver), get_solver(solver), refines=True, sweeps=False)
    plan = planned(ModelOptions(str(model)), job)
    assert plan["fit_seconds"] > 0
    assert plan["memory"]["hidden states"] == 2 * 4 * 8 * 16 * 32


def test_a_run_that_shares_nothing_keeps_what_it_reads(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = ("--calibration", write_text(tmp_path / "text.txt"), *WINDOWS, "--device", "cpu", "--no-cache")
    words = ("search", model, "--budget", "0.5", *work, "--allocator", "knapsack", "--set", "preset=fast")
    said = json.loads(done(*words, "--out", tmp_path / "run", "--dry-run", "--json").stdout)
    assert said["disk_bytes"] < sum(said["disk"].values())
    held: list[tuple[int, int]] = []
    delete = Workspace.discard

    def discard(self: Workspace, *rest: Any) -> None:
        held.append(tensor_bytes(tmp_path / "run", said["disk"]))
        delete(self, *rest)

    monkeypatch.setattr(Workspace, "discard", discard)
    done(*words, "--out", tmp_path / "run", "--quiet")
    held.append(tensor_bytes(tmp_path / "run", said["disk"]))
    assert 0.5 * said["disk_bytes"] < max(size for size, _ in held)
    assert all(size < said["disk_bytes"] + 1000 * files for size, files in held)
    done_with = {"grams", "labels", "spans", "anchors", "metrics"}
    assert not any(done_with & set(path.parts) for path in (tmp_path / "run").rglob("*.safetensors"))
    # Of layers that were matched only the facts are left.
    solved = list((tmp_path / "run" / "layers").iterdir())
    assert solved
    assert all(not read_tensors(path)[0] and read_metadata(path)["status"] for path in solved)
    again = ("compress", model, "--budget-file", tmp_path / "run" / "budget.json", *work)
    done(*again, "--solver", "hassle-free", "--out", tmp_path / "again", "--quiet")
    assert {path.parent.name for path in (tmp_path / "again").rglob("*.safetensors")} == {"layers", "matched", "model"}


def tensor_bytes(folder: Path, stages: Mapping[str, int]) -> tuple[int, int]:
    """Bytes of the tensors of some stages, each counted once whatever its names, and in how many files they are."""
    paths = [path for path in folder.rglob("*.safetensors") if stages.keys() & set(path.parts)]
    sizes = {(found := path.stat()).st_ino: found.st_size for path in paths}
    return sum(sizes.values()), len(sizes)
