"""Sizes as people write them."""

from __future__ import annotations

import pytest
import torch

from globalopt.errors import UsageError
from globalopt.machine.memory import available, parse_size, resident, size_text, trim_memory


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
