"""Sizes as people write them, and the memory that there is."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest
import torch

from globalopt.errors import UsageError
from globalopt.machine.memory import available, main_memory, parse_size, resident, size_text, trim_memory


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * 2**30),
        ("500MB", 500 * 10**6),
        ("1.5g", 1_500_000_000),
        (" 2 TiB ", 2 * 2**40),
        ("64kb", 64_000),
        ("12345", 12345),
        ("7 b", 7),
    ],
)
def test_a_size_is_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GB", "0", "0.0GB", "8 apples", "8GiBs", "1e9", "8,5GB", "inf", "0.1"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"is no amount of memory; write it as 8GiB or 500MB"):
        parse_size(text)


def test_a_size_is_written() -> None:
    texts = [size_text(size) for size in (0, 512, 1010, 1536, 1000 * 2**20, 2.5 * 2**30, 5000 * 2**40)]
    assert texts == ["0 B", "512 B", "1010 B", "1.5 KiB", "1000 MiB", "2.5 GiB", "5000 TiB"]


def test_what_was_freed_is_given_back() -> None:
    pieces = [torch.ones(2**16) for _ in range(400)]
    kept = pieces[::2]
    del pieces
    trim_memory()
    assert all(bool(piece.all()) for piece in kept)


def test_this_process_takes_memory_and_leaves_some() -> None:
    assert resident() > 2**20
    assert available(torch.device("cpu")) > 2**20


GB = 10**9
V2 = ("memory.max", "memory.current")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


@pytest.mark.parametrize(
    ("own", "limits", "names", "total", "free"),
    [
        ("0::/\n", {"": (4 * GB, 1 * GB, 0)}, V2, 4, 3),
        ("0::/\n", {"": ("max", 1 * GB, 0)}, V2, 100, 50),
        ("0::/\n", {"": (4 * GB, 3 * GB, 2 * GB)}, V2, 4, 3),
        ("0::/\n", {"": (4 * GB, 5 * GB, 0)}, V2, 4, 0),
        ("0::/job/task\n", {"job": (8 * GB, 7 * GB, 0), "job/task": ("max", GB, 0)}, V2, 8, 1),
        ("0::/job/task\n", {"job": (8 * GB, 2 * GB, 0), "job/task": (4 * GB, GB, 0)}, V2, 4, 3),
        ("0::/seen/by/the/host/alone\n", {"": (4 * GB, 1 * GB, 0)}, V2, 4, 3),
        ("5:cpu,cpuacct:/\n4:memory:/docker/1f\n0::/\n", {"memory": (2 * GB, 1 * GB, 0)}, V1, 2, 1),
        ("4:memory:/docker/1f\n", {"memory/docker/1f": (2 * GB, 1 * GB, GB // 2)}, V1, 2, 1.5),
        ("4:memory:/\n", {"memory": (2**63 - 4096, 1 * GB, 0)}, V1, 100, 50),
        (None, {"": (4 * GB, 1 * GB, 0)}, V2, 100, 50),
    ],
)
def test_main_memory_is_what_a_container_may_use(tmp_path, monkeypatch, own, limits, names, total, free):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=100 * GB, available=50 * GB))
    for folder, (limit, used, cached) in limits.items():
        group = tmp_path / "cgroup" / folder
        group.mkdir(parents=True, exist_ok=True)
        (group / names[0]).write_text(f"{limit}\n")
        (group / names[1]).write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\nactive_file 0\n")
    if own is not None:
        (tmp_path / "own").write_text(own)
    assert main_memory(tmp_path / "cgroup", tmp_path / "own") == (total * GB, free * GB)
