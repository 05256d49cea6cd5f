"""Files appear whole or not at all, and a broken one is told in one line."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import save_file

from globalopt.errors import ArtefactError
from globalopt.runs.files import (
    PARTIAL,
    advising,
    digest,
    is_there,
    link_or_copy,
    read_json,
    read_tensors,
    read_text,
    remove_abandoned,
    remove_abandoned_beside,
    replacing,
    write_json,
    write_tensors,
    write_text,
)


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == path.parent
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["file.txt"]


@pytest.mark.parametrize("cause", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_leaves_what_was_there(tmp_path, cause):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise cause

    with pytest.raises(cause):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_a_folder_replaces_a_folder(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()
    with replacing(path) as temporary:
        temporary.mkdir()
        (temporary / "new").touch()
    assert os.listdir(path) == ["new"]
    assert os.listdir(tmp_path) == ["folder"]


def test_system_errors_are_ours(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ArtefactError, match="Choose a writable --out"):
        write_json(tmp_path / "file" / "x.json", {})


def test_json_round_trip_is_bytes_for_bytes(tmp_path):
    value = {"b": [1, 0.1, None, True], "a": "ü"}
    write_json(tmp_path / "1.json", value)
    assert read_json(tmp_path / "1.json") == value
    write_json(tmp_path / "2.json", read_json(tmp_path / "1.json"))
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()


def test_json_is_strict(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "file.json", {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 10**5, b"1" * 10**4])
def test_what_is_no_json(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ArtefactError, match="not valid JSON"):
        read_json(tmp_path / "x.json")


def test_tensors_round_trip(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.arange(6.0).reshape(2, 3).mT, "b": torch.zeros(2, 0)}
    write_tensors(path, tensors, {"n": 1})
    found, facts = read_tensors(path)
    assert facts == {"n": 1}
    assert set(found) == {"a", "b"}
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_tensors_begin_where_those_of_a_computation_do(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {f"x{size}": torch.arange(float(size)) for size in range(1, 20)}
    write_tensors(path, tensors)
    found, _ = read_tensors(path)
    assert [name for name, value in found.items() if value.data_ptr() % 64] == []
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_broken_tensors(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(ArtefactError, match="There is no file"):
        read_tensors(path)
    write_tensors(path, {"a": torch.ones(3)})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtefactError, match="is broken"):
        read_tensors(path)
    save_file({"a": torch.ones(3)}, path, metadata={"facts": "{"})
    with pytest.raises(ArtefactError, match="is broken"):
        read_tensors(path)


def test_digest_ignores_the_order_of_keys():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_what_to_do_with_broken_json_is_said_by_the_caller(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ArtefactError, match=r"x\.json is not valid JSON .* Delete it\."):
        read_json(tmp_path / "x.json", "Delete it.")


# ------------------------------------------------------------------------------------------------- leftovers


def partial(name: str, machine: str, pid: int | str) -> str:
    return f".{name}.{machine}.{pid}.0123abcd{PARTIAL}"


def machine_of(tmp_path) -> str:
    """How this machine is named in a temporary file."""
    with replacing(tmp_path / "probe") as temporary:
        temporary.touch()
        found = temporary.name.removesuffix(PARTIAL).split(".")[-3]
    (tmp_path / "probe").unlink()
    return found


def test_leftovers_of_killed_processes_of_this_machine_are_removed(tmp_path):
    here = machine_of(tmp_path)
    dead = next(pid for pid in range(2**22 - 1, 0, -1) if not psutil.pid_exists(pid))
    left = [partial("x.json", here, dead), partial("model", here, dead)]
    kept = [
        partial("x.json", here, os.getpid()),
        partial("x.json", "another0", dead),
        partial("x.json", here, "noid"),
        f".theirs{PARTIAL}",
        f".a.b{PARTIAL}",
        "x.json",
    ]
    inner = tmp_path / "deep"
    inner.mkdir()
    for name in (left[0], *kept):
        (inner / name).touch()
    (inner / left[1]).mkdir()
    (inner / left[1] / "weights").touch()
    remove_abandoned(tmp_path)
    assert sorted(os.listdir(inner)) == sorted(kept)


def test_a_process_that_is_killed_while_it_settles_permissions_leaves_nothing_for_good(tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path; from globalopt.runs.files import write_json\n"
        "Path.unlink = lambda path, missing_ok=False: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_json(Path(sys.argv[1]) / 'x.json', 'new')"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)]).returncode == -9
    assert len(os.listdir(tmp_path)) == 2
    remove_abandoned(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_killed_write_leaves_the_old_file_and_a_leftover_that_is_removed(tmp_path):
    write_json(tmp_path / "x.json", "old")
    script = (
        "import os, signal, sys; from pathlib import Path; from globalopt.runs.files import replacing\n"
        "with replacing(Path(sys.argv[1]) / 'x.json') as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)]).returncode == -9
    assert len(os.listdir(tmp_path)) == 2
    remove_abandoned(tmp_path)
    assert os.listdir(tmp_path) == ["x.json"]
    assert read_json(tmp_path / "x.json") == "old"


# ------------------------------------------------------------------------------------------------- two writers


WRITER = """
import sys
import time
from pathlib import Path
import torch
from globalopt.runs.files import read_tensors, write_json, read_json, write_tensors
folder, tensor = Path(sys.argv[1]), torch.arange(5000.0)
sys.stdin.readline()
for round in range(60):
    write_tensors(folder / "x.safetensors", {"x": tensor}, {"n": 1})
    write_json(folder / "x.json", list(range(300)))
    assert torch.equal(read_tensors(folder / "x.safetensors")[0]["x"], tensor)
    assert read_json(folder / "x.json") == list(range(300))
"""


def test_two_processes_write_one_file_at_the_same_time(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write(b"go\n")
        writer.stdin.flush()
    ended = [writer.communicate() for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], ended
    assert sorted(os.listdir(tmp_path)) == ["x.json", "x.safetensors"]


# ------------------------------------------------------------------------------------------------- second names


def test_a_second_name_outlives_the_first(tmp_path):
    write_text(tmp_path / "one", "text")
    link_or_copy(tmp_path / "one", tmp_path / "deep" / "other")
    # Once more: both names are of one file now, which leaves no temporary one.
    link_or_copy(tmp_path / "one", tmp_path / "deep" / "other")
    write_text(tmp_path / "one", "changed")
    assert read_text(tmp_path / "deep" / "other") == "text"
    assert os.listdir(tmp_path / "deep") == ["other"]


def test_where_there_are_no_links_there_is_a_copy(tmp_path, monkeypatch):
    def refuse(source, target) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    write_text(tmp_path / "one", "text")
    link_or_copy(tmp_path / "one", tmp_path / "other")
    assert read_text(tmp_path / "other") == "text"


def left_behind(path, pid, machine=None, age=0.0):
    """A temporary file of `path` as a process that was killed leaves it."""
    with replacing(path) as temporary:
        words = temporary.name.removesuffix(PARTIAL).rsplit(".", 3)
        temporary.touch()
    path.unlink()
    left = path.with_name(f"{words[0]}.{machine or words[1]}.{pid}.{words[3]}{PARTIAL}")
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    written = time.time() - age
    for each in (left / "model.safetensors", left):
        os.utime(each, (written, written))
    return left


def test_what_the_dead_left_is_removed_and_what_the_living_write_stays(tmp_path):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    out = tmp_path / "out"
    gone = [
        left_behind(out, int(dead.stdout)),
        # The number of a process is given again, in a container at every start.
        left_behind(out, os.getpid(), age=10 * 24 * 3600),
        left_behind(out, os.getpid(), machine="0123abcd", age=2 * 24 * 3600),
    ]
    kept = [
        left_behind(out, os.getpid()),
        left_behind(out, 1, machine="0123abcd"),
        left_behind(tmp_path / "out2", int(dead.stdout)),
    ]
    remove_abandoned_beside(out)
    assert [path.exists() for path in gone] == [False] * 3
    assert [path.exists() for path in kept] == [True] * 3
    remove_abandoned(tmp_path)
    assert [path.exists() for path in kept] == [True, True, False]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_permissions_that_the_umask_says(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "one.safetensors", {"x": torch.ones(2)})
        write_json(tmp_path / "one.json", 1)
        with replacing(tmp_path / "model") as temporary:
            (temporary / "inner").mkdir(parents=True)
            save_file({"x": torch.ones(2)}, temporary / "inner" / "x.safetensors")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.stat().st_mode & 0o777 for path in files] == [mode] * 3
    folders = [tmp_path / "model", tmp_path / "model" / "inner"]
    assert [path.stat().st_mode & 0o777 for path in folders] == [0o777 & ~umask] * 2


def test_a_name_as_long_as_the_disk_takes_can_be_written(tmp_path):
    path = tmp_path / ("x" * 250 + ".json")
    write_json(path, 1)
    assert read_json(path) == 1
    assert os.listdir(tmp_path) == [path.name]


def test_an_error_of_writing_names_the_options_of_its_command(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ArtefactError, match=r"File exists\.$"), advising(""):
        write_json(tmp_path / "file" / "x.json", {})
    with (
        pytest.raises(ArtefactError, match=r"File exists\. Choose another --folder\.$"),
        advising("Choose another --folder."),
    ):
        write_json(tmp_path / "file" / "x.json", {})
    with pytest.raises(ArtefactError, match="--out or --cache"):
        write_json(tmp_path / "file" / "x.json", {})


def test_names_that_the_system_refuses_are_one_line(tmp_path):
    assert is_there(tmp_path)
    (tmp_path / "file").touch()
    assert not is_there(tmp_path / "file" / "inner")
    with pytest.raises(ArtefactError, match="xxx: File name too long"):
        is_there(tmp_path / ("x" * 300))
