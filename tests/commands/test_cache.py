"""The cache from the command line: listed, pruned, shared by commands that run at the same time, and broken."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock
from safetensors.torch import load

from globalopt.runs.cache import FOLDER, RECORD, VARIABLE, Cache
from globalopt.runs.folder import LOCK
from tests.command import assert_alike, contents, done, no_partial_files, read, refused, results, run
from tests.tiny_models import save_tiny

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def quick(tiny_llama: Path, tiny_text: Path) -> tuple[object, ...]:
    """A search of a second, all but its `--out`."""
    texts = ("--calibration", tiny_text, "--nsamples", 8, "--seqlen", 16, "--eval-windows", 2)
    options = ("--solver", "wanda", "--allocator", "knapsack", "--predict-from", "span", "--match", "none", "-q")
    return ("search", tiny_llama, *texts, *options)


@pytest.fixture(scope="module")
def shared(quick: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, `half`, and the cache beside it; not to be changed."""
    folder = tmp_path_factory.mktemp("shared")
    done(*quick, "--out", folder / "half")
    return folder


@pytest.fixture
def place(shared: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    return shutil.copytree(shared, tmp_path / "place")


def used_before(folder: Path, seconds: float) -> None:
    """Make an entry that was used so many seconds ago."""
    then = time.time() - seconds
    os.utime(folder / RECORD, (then, then))


def stages(cache: Path) -> set[str]:
    return {entry.stage.value for entry in Cache(cache).entries()}


# ------------------------------------------------------------------------------------------------- where it is


def test_it_lies_beside_the_run_or_where_it_is_said(quick, shared, tmp_path, monkeypatch):
    expected = {
        "grams",
        "spectra",
        "profiles",
        "spans",
        "labels",
        "predictions",
        "corrections",
        "objective",
        "allocation",
        "refinement",
    }
    assert {path.name for path in shared.iterdir()} == {"half", FOLDER}
    assert stages(shared / FOLDER) == expected
    done(*quick, "--out", tmp_path / "a" / "run", "--cache", tmp_path / "named")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "variable"))
    done(*quick, "--out", tmp_path / "b" / "run")
    assert stages(tmp_path / "named") == stages(tmp_path / "variable") == expected
    done(*quick, "--out", tmp_path / "c" / "run", "--no-cache")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c", "named", "variable"}
    assert all({path.name for path in (tmp_path / name).iterdir()} == {"run"} for name in "abc")
    assert "not both" in refused(2, *quick, "--out", tmp_path / "d", "--no-cache", "--cache", tmp_path / "named")
    assert_alike(results(tmp_path / "a" / "run"), results(shared / "half"))
    assert_alike(results(tmp_path / "c" / "run"), results(shared / "half"))


# ------------------------------------------------------------------------------------------------- list


def test_list_shows_one_line_per_entry_on_a_narrow_terminal(place, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = done("cache", "list", "--cache", place / FOLDER).stdout.splitlines()
    entries = Cache(place / FOLDER).entries()
    # After the title, which may be long, and the names of the columns; a sum is below.
    lines = shown[-len(entries) - 1 :]
    for entry, line in zip(entries, lines, strict=False):
        stage, *_, model, folder = line.split()
        assert (stage, model, folder) == (entry.stage, "llama", entry.folder.name[:12])
        assert "ago" in line
    assert lines[-1].split()[:2] == [str(len(entries)), "entries"]
    assert all(len(line) <= 80 for line in lines)


def test_list_names_an_age_of_days_and_a_long_model_on_one_line(place, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    entry = Cache(place / FOLDER).entries()[0]
    record = read(entry.folder / RECORD)
    (entry.folder / RECORD).write_text(json.dumps({**record, "model": "some-org/" + "long-name-" * 10}))
    used_before(entry.folder, 30 * 86400)
    shown = done("cache", "list", "--cache", place / FOLDER, "--older-than", "7d").stdout.splitlines()
    (line,) = [line for line in shown if line.startswith("grams")]
    assert "long-name" in line
    assert line.rstrip().endswith(entry.folder.name[:12])


def test_list_as_json(place):
    found = json.loads(done("cache", "list", "--cache", place / FOLDER, "--json").stdout)
    assert [(one["stage"], one["folder"]) for one in found] == [
        (entry.stage, str(entry.folder)) for entry in Cache(place / FOLDER).entries()
    ]
    assert all(one["bytes"] > 0 and one["used"] <= time.time() for one in found)
    assert json.loads(done("cache", "list", "--cache", place / "nowhere", "--json").stdout) == []
    assert "0 entries" in done("cache", "list", "--cache", place / "nowhere").stdout


def test_without_a_folder_it_is_where_runs_are(place, tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    place.rename(tmp_path / "runs")
    assert len(json.loads(done("cache", "list", "--json").stdout)) == 10
    monkeypatch.setenv(VARIABLE, str(tmp_path / "elsewhere"))
    assert json.loads(done("cache", "list", "--json").stdout) == []


# ------------------------------------------------------------------------------------------------- prune


def test_prune_takes_a_stage_and_an_age(place):
    cache = place / FOLDER
    before = stages(cache)
    assert done("cache", "prune", "--cache", cache, "--stage", "spans").stdout.startswith("Deleted 1 entries (")
    assert stages(cache) == before - {"spans"}
    assert "Deleted 0 entries" in done("cache", "prune", "--cache", cache, "--older-than", "1h").stdout
    entry = Cache(cache).entries()[0]
    used_before(entry.folder, 7200)
    assert "Deleted 1 entries" in done("cache", "prune", "--cache", cache, "--older-than", "1.5h").stdout
    assert stages(cache) == before - {"spans", entry.stage.value}
    assert "Deleted 8 entries" in done("cache", "prune", "--cache", cache).stdout
    assert stages(cache) == set()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--stage", "span"), "spans"),
        (("--older-than", "soon"), "--older-than takes a number with s, m, h, d or w"),
        (("--older-than", "-1d"), "--older-than takes a number with s, m, h, d or w"),
        (("--older-than", "7"), "--older-than takes a number with s, m, h, d or w"),
    ],
)
def test_words_that_are_none_are_refused(place, arguments, said):
    before = contents(place)
    for command in ("list", "prune"):
        assert said in refused(2, "cache", command, "--cache", place / FOLDER, *arguments)
    assert contents(place) == before


def test_prune_is_refused_while_a_run_holds_the_cache(place):
    before = stages(place / FOLDER)
    with Cache(place / FOLDER).used():
        said = refused(1, "cache", "prune", "--cache", place / FOLDER)
        assert "A run is using the cache" in said
        # To look is always allowed.
        done("cache", "list", "--cache", place / FOLDER)
    assert stages(place / FOLDER) == before


def test_a_run_survives_the_cache_and_the_cache_is_made_again(quick, place, shared, tmp_path):
    half = place / "half"
    done("cache", "prune", "--cache", place / FOLDER)
    shutil.rmtree(place / FOLDER)
    before = results(half)
    done("report", half)
    done("export", half, "--out", tmp_path / "dense", "--format", "factors", "-q")
    assert_alike(results(half), before)
    # Made again: the same.
    done(*quick, "--out", place / "again")
    assert_alike(results(place / "again"), before)
    again, first = contents(place / FOLDER), contents(shared / FOLDER)
    assert again.keys() == first.keys()
    # Those of a refinement tell the seconds that it took.
    for name in (name for name in first if name.endswith(".safetensors") and not name.startswith("refinement")):
        assert_alike(load(again[name]), load(first[name]), name)


# ------------------------------------------------------------------------------------------------- what is broken


def test_a_broken_artefact_ends_in_one_line_that_names_it(quick, place):
    for stage, name in (("grams", "*.safetensors"), ("corrections", "*.json"), ("predictions", "*.safetensors")):
        path = sorted((place / FOLDER).glob(f"{stage}/*/{name}"))[0]
        whole = path.read_bytes()
        if stage == "grams":
            done("cache", "prune", "--cache", place / FOLDER, "--stage", "predictions")
        done("cache", "prune", "--cache", place / FOLDER, "--stage", "allocation")
        path.write_bytes(whole[: len(whole) // 2])
        said = refused(1, *quick, "--out", place / stage)
        assert str(path) in said
        assert "Delete it and run the " in said
        # As it says.
        path.unlink()
        done(*quick, "--out", place / stage)
        assert_alike(results(place / stage), results(place / "half"))


def test_a_cache_that_cannot_be_written_ends_in_one_line(quick, tmp_path):
    (tmp_path / "file").touch()
    said = refused(1, *quick, "--out", tmp_path / "run", "--cache", tmp_path / "file")
    assert said == f"Cannot write the cache {tmp_path / 'file'}: Not a directory. Choose another with --cache."
    assert "Cannot write the cache" in refused(1, *quick, "--out", tmp_path / "run", "--cache", tmp_path / "file" / "x")
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "grams").touch()
    said = refused(1, *quick, "--out", tmp_path / "run", "--cache", cache)
    assert "Cannot write" in said
    assert "--cache" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_cache_ends_in_one_line(quick, tmp_path):
    (tmp_path / "cache").mkdir(mode=0o500)
    said = refused(1, *quick, "--out", tmp_path / "run", "--cache", tmp_path / "cache")
    assert "Permission denied" in said


def test_an_edited_model_is_refused_in_the_folder_and_named(quick, place, tmp_path):
    model = save_tiny(tmp_path / "llama", seed=1)
    said = refused(1, quick[0], model, *quick[2:], "--out", place / "half")
    assert f"{place / 'half'} holds another run (different model)." in said


# ------------------------------------------------------------------------------------------------- at the same time


TOGETHER = """
import json, sys
from pathlib import Path
from tests.kill_driver import child, ended
folder, *commands = json.loads(sys.argv[1])
running = []
for number, arguments in enumerate(commands):
    said = Path(folder) / f"said{number}.txt"
    running.append((child(arguments, said, None), said))
print(json.dumps([[ended(pid), said.read_text()] for pid, said in running]))
"""


def together(folder: Path, *commands: tuple[object, ...]) -> list[tuple[int, str]]:
    """Run commands at the same time; their exit codes and what they say."""
    words = [str(folder), *([str(word) for word in typed] for typed in commands)]
    # One thread: a fork has only the thread that forked.
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    ended = subprocess.run(
        [sys.executable, "-c", TOGETHER, json.dumps(words)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **threads},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    return [(code, said) for code, said in json.loads(ended.stdout)]


def test_two_searches_at_the_same_time_on_one_cache(quick, shared, tmp_path):
    runs = tmp_path / "runs"
    first, second = (*quick, "--out", runs / "first"), (*quick, "--budget", 0.4, "--out", runs / "second")
    assert [code for code, _ in together(tmp_path, first, second)] == [0, 0]
    assert_alike(results(runs / "first"), results(shared / "half"))
    done(*quick, "--budget", 0.4, "--out", tmp_path / "alone", "--no-cache")
    assert_alike(results(runs / "second"), results(tmp_path / "alone"))
    assert no_partial_files(runs)
    done("cache", "prune", "--cache", runs / FOLDER)


def test_a_run_and_a_cache_that_another_holds_are_refused_in_a_line(quick, tmp_path):
    """Held from here for as long as the commands take: another search could end before they come to it."""
    folder, cache = tmp_path / "run", tmp_path / FOLDER
    folder.mkdir()
    with FileLock(folder / LOCK):
        assert refused(1, *quick, "--out", folder) == (
            f"Another process is writing the run in {folder}. Wait until it has ended, or choose another --out."
        )
    with Cache(cache).used():
        said = refused(1, "cache", "prune", "--cache", cache)
    assert said.startswith(f"A run is using the cache {cache}.")
    done("cache", "prune", "--cache", cache)
    done(*quick, "--out", folder)


def test_a_killed_search_leaves_nothing_that_the_next_one_does_not_clean(quick, shared, tmp_path, monkeypatch):
    leftover = tmp_path / "runs" / FOLDER
    script = (
        "import os, signal, sys\n"
        "from globalopt.runs import files\n"
        "replace, left = os.replace, [40]\n"
        "def killed(source, target):\n"
        "    left[0] -= 1\n"
        "    if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    replace(source, target)\n"
        "files.os.replace = killed\n"
        "sys.argv[0] = 'globalopt'\n"
        "from globalopt.cli import main\n"
        "main()\n"
    )
    command = (*quick, "--out", tmp_path / "runs" / "half")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", script, *map(str, command)], env=environment, capture_output=True)
    assert killed.returncode == -9, killed.stderr
    assert not no_partial_files(leftover)
    done(*command)
    assert no_partial_files(tmp_path / "runs")
    assert_alike(results(tmp_path / "runs" / "half"), results(shared / "half"))
    # It holds the cache no longer either.
    assert run("cache", "prune", "--cache", leftover).exit_code == 0
