"""The cache: addresses, entries, pruning, and runs that hold it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from globalopt.errors import ArtefactError
from globalopt.runs.artefacts import GRAM, Stage
from globalopt.runs.cache import FOLDER, RECORD, RUNNING, VARIABLE, Address, Cache, older_than
from globalopt.runs.files import write_json
from globalopt.runs.workspace import Workspace
from tests.command import no_partial_files

ADDRESS = Address(Stage.GRAMS, 1, {"model": "ab12", "batch_size": 8})


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(tmp_path / "cache")


# ------------------------------------------------------------------------------------------------- addresses


def test_an_address_depends_on_stage_version_and_every_input():
    others = [
        replace(ADDRESS, stage=Stage.SPANS),
        replace(ADDRESS, version=2),
        replace(ADDRESS, inputs={**ADDRESS.inputs, "model": "ab13"}),
        replace(ADDRESS, inputs={**ADDRESS.inputs, "batch_size": 4}),
        replace(ADDRESS, inputs={**ADDRESS.inputs, "seed": None}),
        replace(ADDRESS, inputs={"model": "ab12"}),
    ]
    assert len({address.digest for address in (ADDRESS, *others)}) == len(others) + 1
    assert Address(Stage.GRAMS, 1, {"batch_size": 8, "model": "ab12"}).digest == ADDRESS.digest


def test_a_folder_says_what_made_it(cache):
    folder = cache.open(ADDRESS, "my-model")
    assert folder == cache.path(ADDRESS)
    assert folder.parent == cache.folder / "grams"
    assert json.loads((folder / RECORD).read_text()) == {
        "stage": "grams",
        "digest": ADDRESS.digest,
        "model": "my-model",
        "version": 1,
        "inputs": dict(ADDRESS.inputs),
    }
    # The first run that makes it gives its name; a later one finds it.
    assert cache.open(ADDRESS, "the same elsewhere") == folder
    assert [entry.model for entry in cache.entries()] == ["my-model"]


def test_the_cache_is_beside_the_run_or_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert Cache.beside(tmp_path / "runs" / "half").folder == tmp_path / "runs" / FOLDER
    monkeypatch.chdir(tmp_path)
    assert Cache.beside(Path("half")).folder == tmp_path / FOLDER
    monkeypatch.setenv(VARIABLE, str(tmp_path / "shared"))
    assert Cache.beside(tmp_path / "runs" / "half").folder == tmp_path / "shared"
    monkeypatch.setenv(VARIABLE, "")
    assert Cache.beside(tmp_path / "half").folder == tmp_path / FOLDER


# ------------------------------------------------------------------------------------------------- entries


def test_entries_are_listed_by_stage_and_use_with_their_size(cache):
    old, new = (cache.open(Address(Stage.SPANS, 1, {"n": n}), "m") for n in range(2))
    cache.open(ADDRESS, "m")
    (new / "deep").mkdir()
    (new / "deep" / "x").write_bytes(b"x" * 1000)
    os.utime(old / RECORD, (1e9, 1e9))
    entries = cache.entries()
    assert [entry.folder for entry in entries] == [cache.path(ADDRESS), old, new]
    assert entries[2].bytes == 1000 + (new / RECORD).stat().st_size
    assert [entry.folder for entry in older_than(entries, 3600)] == [old]
    # To open one is to use it.
    cache.open(Address(Stage.SPANS, 1, {"n": 0}), "m")
    assert older_than(cache.entries(), 3600) == []


def test_files_of_others_are_passed_over_and_a_broken_record_is_listed(cache):
    folder = cache.open(ADDRESS, "m")
    (cache.folder / "notes.txt").touch()
    (cache.folder / "spans" / "unfinished").mkdir(parents=True)
    (cache.folder / "theirs" / "0").mkdir(parents=True)
    (cache.folder / "theirs" / "0" / RECORD).touch()
    for broken in ("", "{", "[]", "{}", "3"):
        (folder / RECORD).write_text(broken)
        assert [(entry.folder, entry.model) for entry in cache.entries()] == [(folder, "")]
    cache.prune(cache.entries())
    assert not folder.exists()
    assert (cache.folder / "theirs" / "0" / RECORD).exists()
    assert Cache(cache.folder / "nowhere").entries() == []


def test_leftovers_of_killed_processes_go_when_a_stage_is_opened_again(cache):
    script = (
        "import os, signal, sys; from pathlib import Path; from globalopt.runs.files import replacing\n"
        "with replacing(Path(sys.argv[1]) / 'x.json') as temporary:\n"
        "    temporary.touch(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    folder = cache.open(ADDRESS, "m")
    subprocess.run([sys.executable, "-c", script, str(folder)])
    assert not no_partial_files(folder)
    cache.open(ADDRESS, "m")
    assert sorted(os.listdir(folder)) == [RECORD]


# ------------------------------------------------------------------------------------------------- pruning


def test_prune_deletes_what_it_is_given_and_no_more(cache):
    cache.open(ADDRESS, "m")
    spans = cache.open(Address(Stage.SPANS, 1, {}), "m")
    entries = cache.entries()
    cache.prune(entries[:1])
    assert [entry.folder for entry in cache.entries()] == [spans]
    # Two that prune at the same time: what the other one deleted is gone, and no error.
    cache.prune(entries)
    assert cache.entries() == []


def test_prune_is_refused_while_a_run_holds_the_cache(cache):
    cache.open(ADDRESS, "m")
    with cache.used():
        with cache.used(), pytest.raises(ArtefactError, match="A run is using the cache"):
            cache.prune(cache.entries())
        with pytest.raises(ArtefactError, match="A run is using the cache"):
            cache.prune([])
        assert len(cache.entries()) == 1
    cache.prune(cache.entries())
    assert cache.entries() == []
    assert list((cache.folder / RUNNING).iterdir()) == []


def test_a_run_that_begins_while_others_prune_waits_for_them(cache, monkeypatch):
    folder = cache.open(ADDRESS, "m")
    beginning = []
    rmtree = shutil.rmtree

    def slow(path: Path) -> None:
        script = HOLDER.replace("with Cache", "print('ready', flush=True)\nwith Cache")
        command = [sys.executable, "-c", script, str(cache.folder)]
        run = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        beginning.append(run)
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
        time.sleep(0.3)
        assert not list((cache.folder / RUNNING).glob("*.lock"))
        rmtree(path)

    monkeypatch.setattr(shutil, "rmtree", slow)
    cache.prune(cache.entries())
    (run,) = beginning
    assert not folder.exists()
    assert run.stdout.readline() == "held\n"
    run.communicate("\n")


def test_a_run_that_fails_holds_the_cache_no_longer(cache):
    def fail() -> None:
        with cache.used():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    cache.prune([])


HOLDER = """
import sys
from pathlib import Path
from globalopt.runs.cache import Cache
with Cache(Path(sys.argv[1])).used():
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_another_process_holds_the_cache_until_it_ends_even_if_it_is_killed(cache):
    for ends in ("line", "kill"):
        command = [sys.executable, "-c", HOLDER, str(cache.folder)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout is not None
            assert holder.stdin is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(ArtefactError, match="A run is using the cache"):
                cache.prune([])
            if ends == "kill":
                holder.kill()
            else:
                holder.stdin.write("\n")
                holder.stdin.flush()
            holder.wait()
        cache.prune([])
    assert list((cache.folder / RUNNING).iterdir()) == []


OPENER = """
import sys
from pathlib import Path
import torch
from globalopt.runs.artefacts import GRAM, Stage
from globalopt.runs.cache import Address, Cache
from globalopt.runs.workspace import Workspace
from globalopt.values.metric import Gram
cache, gram = Cache(Path(sys.argv[1])), Gram(torch.eye(40), 7)
print("ready", flush=True)
sys.stdin.readline()
for n in range(30):
    with cache.used():
        work = Workspace(Path("unused"), {Stage.GRAMS: cache.open(Address(Stage.GRAMS, 1, {"n": n}), "m")})
        work.put(GRAM, "site", gram)
        assert torch.equal(work.get(GRAM, "site").matrix, gram.matrix)
"""


def test_two_processes_write_one_artefact_at_the_same_time(cache):
    command = [sys.executable, "-c", OPENER, str(cache.folder)]
    both = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for one in both:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
    for one in both:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    said = [one.communicate() for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    assert no_partial_files(cache.folder)
    assert len(cache.entries()) == 30
    assert all(sorted(os.listdir(entry.folder)) == ["site.safetensors", RECORD] for entry in cache.entries())
    assert list((cache.folder / RUNNING).iterdir()) == []


# ------------------------------------------------------------------------------------------------- unwritable caches


def test_a_file_in_the_place_of_the_cache_ends_in_one_line(tmp_path):
    (tmp_path / "cache").touch()
    cache = Cache(tmp_path / "cache")
    with pytest.raises(ArtefactError, match=r"Cannot write the cache .*Choose another with --cache\."), cache.used():
        pass
    with pytest.raises(ArtefactError, match=r"Cannot write .* --out or --cache\."):
        cache.open(ADDRESS, "m")
    assert cache.entries() == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_of_another_user_ends_in_one_line(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o500)
    with pytest.raises(ArtefactError, match="Permission denied"), Cache(folder).used():
        pass


def test_a_read_only_disk_ends_in_one_line(cache, monkeypatch):
    def refuse(self, *arguments, **options) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ArtefactError, match="Read-only file system"), cache.used():
        pass


def test_an_entry_that_cannot_be_deleted_is_named(cache, monkeypatch):
    folder = cache.open(ADDRESS, "m")

    def refuse(path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("shutil.rmtree", refuse)
    with pytest.raises(ArtefactError, match=f"Cannot delete {folder}: Permission denied"):
        cache.prune(cache.entries())


def test_a_pruned_artefact_is_made_again_at_the_same_place(cache):
    import torch

    from globalopt.values.metric import Gram

    folder = cache.open(ADDRESS, "m")
    work = Workspace(cache.folder, {Stage.GRAMS: folder})
    work.put(GRAM, "site", Gram(torch.eye(4), 7))
    before = (folder / "site.safetensors").read_bytes()
    cache.prune(cache.entries())
    assert cache.open(ADDRESS, "m") == folder
    assert work.missing(GRAM, ["site"]) == ["site"]
    work.put(GRAM, "site", Gram(torch.eye(4), 7))
    assert (folder / "site.safetensors").read_bytes() == before


def test_what_is_not_used_is_older_than(cache):
    write_json(cache.path(ADDRESS) / RECORD, {"model": "m"})
    then = time.time() - 100
    os.utime(cache.path(ADDRESS) / RECORD, (then, then))
    assert len(older_than(cache.entries(), 99)) == 1
    assert older_than(cache.entries(), 200) == []
