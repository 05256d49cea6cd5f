"""A search with refinement and matching that is stopped at random ends with the bytes of an undisturbed one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from globalopt.runs.cache import Cache
from tests.command import WINDOWS, assert_alike, no_partial_files, read, results, write_text
from tests.tiny_models import save_tiny

ROOT = Path(__file__).parent.parent.parent
WORK = ("--budget", "0.4", "--set", "steps=4", "--search-tokens", "4000", "--batch-size", "4", "--quiet")
MATCHING = ("--match", "model", "--match-set", "epochs=2", "--distill-set", "epochs=3")


@pytest.mark.parametrize(
    ("how", "times", "code"),
    [
        pytest.param("kill", 3, -signal.SIGKILL, id="SIGKILL"),
        pytest.param("alone", 3, -signal.SIGKILL, id="SIGKILL, what is not read any more deleted"),
        pytest.param("kill", 20, -signal.SIGKILL, id="SIGKILL twenty times", marks=pytest.mark.slow),
        pytest.param("alone", 20, -signal.SIGKILL, id="SIGKILL twenty times, the same", marks=pytest.mark.slow),
        pytest.param("interrupt", 6, 130, id="Ctrl-C", marks=pytest.mark.slow),
        pytest.param("disk", 6, 1, id="full disk", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_stopped_at_random_ends_with_the_same(tmp_path, how, times, code):
    model, text = save_tiny(tmp_path / "model"), write_text(tmp_path / "text.txt")
    work = tmp_path / "runs"
    work.mkdir()
    command = ("search", model, "--calibration", text, *WINDOWS, *WORK, *MATCHING)
    report = tmp_path / "report.json"
    driver = [sys.executable, "-m", "tests.kill_driver", how, times, 7, work, report, *command]
    # One thread: a fork has only the thread that forked.
    environment = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [str(word) for word in driver],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = read(report)
    assert [stop["code"] for stop in found["stops"]] == [code] * times
    expected = results(work / "whole")
    for name in found["rounds"]:
        assert_alike(results(work / name), expected, name)
        assert no_partial_files(work / name)
        assert no_partial_files(work / f"{name}-cache")
        # Whoever was killed holds the cache no longer.
        Cache(work / f"{name}-cache").prune([])
    for stop in found["stops"]:
        if how == "interrupt":
            assert "Run the same command again" in stop["said"]
            assert stop["said"].count("\n") == 1
        if how == "disk":
            assert "the disk is full" in stop["said"]
            assert "run the same command again" in stop["said"]
