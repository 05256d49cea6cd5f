"""Two processes on one job: one start of both, in which every test here looks for something else."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from globalopt.machine import ranks
from globalopt.runs.files import read_tensors
from tests.command import WINDOWS, done, read

ROOT = Path(__file__).parents[2]
OPTIONS = ("--set", "steps=5", "--match-set", "epochs=1", "--batch-size", "4", "--samples", "0")


@dataclass(frozen=True)
class Job:
    """What two processes left behind."""

    folder: Path
    codes: tuple[int, int]

    def step(self, name: str, rank: int = 0) -> dict[str, Any]:
        return read(self.folder / f"{name}.{rank}.json")


@pytest.fixture(scope="module")
def words(tiny_llama, tiny_text) -> tuple[str, ...]:
    """A search with labels, anchors, corrections, candidates and block matching, all but its --out."""
    wide = [*WINDOWS[:-1], "4"]
    searching = ("--allocator", "auto", "--search-tokens", "1000")
    return ("search", str(tiny_llama), "--calibration", str(tiny_text), *wide, *OPTIONS, *searching)


@pytest.fixture(scope="module")
def job(tiny_llama, tiny_text, words, tmp_path_factory) -> Job:
    folder = tmp_path_factory.mktemp("several")
    site = ("compress", str(tiny_llama), "--calibration", str(tiny_text), *WINDOWS)
    site += ("--budget", "0.5", "--solver", "wanda")
    site += ("--sequential", "site", "--match", "model", "--distill-set", "epochs=1", "--batch-size", "4", "-v")

    def step(name: str, arguments: tuple[str, ...], out: str, cache: str, dies_at: int = 0) -> dict[str, Any]:
        places = ("--out", str(folder / out), "--cache", str(folder / cache))
        return {"name": name, "words": [*arguments, *places], "dies_at": dies_at}

    steps = [
        step("refused", words, "out{rank}", "cache{rank}"),
        step("two", words, "two", "cache"),
        step("site", site, "site", "cache"),
        step("evaluated", ("eval", str(folder / "two"), "-q"), "two", "cache"),
        step("killed", words, "killed", "other-cache", dies_at=20),
    ]
    steps[3]["words"] = steps[3]["words"][:3]
    (folder / "steps.json").write_text(json.dumps(steps))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.ranks_worker", str(folder), str(folder / "steps.json")]
    started = []
    for rank in range(2):
        own = {**os.environ, **place, "RANK": str(rank)}
        with (folder / f"said.{rank}").open("wb") as said:
            started.append(subprocess.Popen(command, cwd=ROOT, env=own, stdout=said, stderr=subprocess.STDOUT))
    try:
        codes = tuple(process.wait(timeout=1500) for process in started)
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert (folder / "killed.0.json").exists(), (folder / "said.0").read_text() + (folder / "said.1").read_text()
    return Job(folder, (codes[0], codes[1]))


@pytest.fixture(scope="module")
def alone(words, tmp_path_factory) -> Path:
    """Folder in which one process did the same search: `run` and `cache`."""
    folder = tmp_path_factory.mktemp("alone")
    done(*words, "--out", folder / "run", "--cache", folder / "cache", "-q")
    return folder


def test_exchanges(job):
    first, second = (job.step("exchanges", rank) for rank in range(2))
    assert (first["count"], first["local"]) == (2, 2)
    assert first["total"] == [[0.0, 2.0, 4.0, 6.0, 8.0]] * 2
    # A transposed tensor of ten float32.
    assert first["summed"] == 40
    assert first["of_all"] == [[3.0] * 3, [[30.0] * 2] * 2]
    assert [one["rank"] for one in first["gathered"]] == [0, 1]
    assert len(first["gathered"][1]["long"]) == 101
    assert first["told"] == [0, 1]
    assert first["merged"] == {"0": 0, "1": 1}
    assert (first["team"], first["by_writer"]) == (9.0, 0)
    assert (first["shared"], second["shared"]) == ([5.0, 3.0], [4.0, 3.0])
    own = ("shared",)
    assert {k: v for k, v in first.items() if k not in own} == {k: v for k, v in second.items() if k not in own}


def test_two_processes_end_as_one_does(job, alone):
    assert job.step("two")["code"] == 0
    one, two = (read(folder / "summary.json") for folder in (alone / "run", job.folder / "two"))
    assert two["used"] == one["used"]
    assert two["predicted"] == pytest.approx(one["predicted"], rel=0.05)
    assert two["dense"][0]["perplexity"] == pytest.approx(one["dense"][0]["perplexity"], rel=1e-4)
    assert two["compressed"][0]["kl"] == pytest.approx(one["compressed"][0]["kl"], rel=0.3)


@pytest.mark.parametrize("stage", ["grams", "labels"])
def test_moments_are_those_of_all_windows_and_the_same_labels(job, alone, stage):
    cache = alone / "cache"
    names = [path.relative_to(cache) for path in (cache / stage).rglob("*.safetensors")]
    assert names
    for name in names:
        expected, of_one = read_tensors(cache / name)
        found, of_two = read_tensors(job.folder / "cache" / name)
        assert of_two == of_one
        for part, value in expected.items():
            torch.testing.assert_close(found[part], value, rtol=1e-3, atol=1e-4 * float(value.abs().max()))


def test_one_process_speaks(job):
    first, second = (job.step("two", rank) for rank in range(2))
    assert "refine done" in first["stderr"]
    assert "KL" in first["stdout"]
    assert (second["code"], second["stdout"], second["stderr"]) == (0, "", "")


def test_verbose_shows_every_process(job):
    first, second = (job.step("site", rank) for rank in range(2))
    assert "process 0: evaluate done" in first["stderr"]
    assert "process 1: evaluate done" in second["stderr"]
    assert second["stdout"] == ""


def test_sites_one_after_the_other_and_model_matching(job):
    assert [job.step("site", rank)["code"] for rank in range(2)] == [0, 0]
    assert (job.folder / "site" / "summary.json").exists()


def test_eval_measures_what_the_run_did(job):
    assert job.step("evaluated")["code"] == 0
    summary, scores = (read(job.folder / "two" / f"{name}.json") for name in ("summary", "eval"))
    assert scores["model"]["metrics"][0]["kl"] == pytest.approx(summary["compressed"][0]["kl"], rel=1e-3)


def test_disks_that_are_not_shared_are_refused_by_one_line(job):
    ends = [job.step("refused", rank) for rank in range(2)]
    assert [end["code"] for end in ends] == [1, 1]
    (line,) = "".join(end["stderr"] for end in ends).splitlines()[-1:]
    assert "does not see what process 0" in line
    assert sum(end["stderr"].count("error:") for end in ends) == 1
    assert "--out and --cache" in line


def test_a_killed_process_ends_all_in_one_line_and_another_number_goes_on(job, words):
    assert job.codes == (0, -signal.SIGKILL)
    end = job.step("killed")
    assert end["code"] == 1
    assert end["stderr"].splitlines()[-1].startswith("error: Another process of this job has ended")
    assert end["stderr"].count("error:") == 1
    kept = len(list((job.folder / "other-cache").rglob("*.safetensors")))
    assert kept
    done(*words, "--out", job.folder / "killed", "--cache", job.folder / "other-cache", "-q")
    resumed, whole = (read(job.folder / name / "summary.json") for name in ("killed", "two"))
    assert resumed["used"] == whole["used"]
    assert resumed["predicted"] == pytest.approx(whole["predicted"], rel=0.05)


def test_variables_of_the_launcher_that_are_missing_are_named(monkeypatch, words, tmp_path):
    from tests.command import refused

    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    said = refused(2, *words, "--out", tmp_path / "run")
    assert "RANK, MASTER_ADDR, MASTER_PORT" in said
    assert not ranks.several()
