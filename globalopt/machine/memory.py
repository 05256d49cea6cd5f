"""Measure and parse amounts of memory, and keep hidden states in files where memory is short."""

from __future__ import annotations

import ctypes
import re
import sys
import tempfile
from functools import cache
from pathlib import Path

import psutil
import torch
from torch import Tensor

from globalopt.errors import ArtefactError, UsageError

UNITS = {"": 1, **{p: 1000**i for i, p in enumerate("kmgt", 1)}, **{f"{p}i": 1024**i for i, p in enumerate("kmgt", 1)}}
"""Bytes by unit prefix: powers of 1000 for k, m, g and t, of 1024 for ki, mi, gi and ti."""

WHOLE_COPIES = 3
"""Copies of a model at the end of a run that loads it whole: the compressed, the original and the saved one."""


def parse_size(text: str) -> int:
    """Parse a size as users type it into bytes: 8GiB, 500MB, 1.5g, 1000000.

    Raises:
        UsageError: the text is no size, or zero.

    >>> parse_size("8GiB"), parse_size("1.5g")
    (8589934592, 1500000000)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", text.strip().lower())
    size = int(float(found[1]) * UNITS[found[2] or ""]) if found else 0
    if not size:
        raise UsageError(f"'{text}' is no amount of memory; write it as 8GiB or 500MB.")
    return size


def size_text(size: float) -> str:
    """Format bytes for reading, in three digits and powers of 1024.

    >>> size_text(512), size_text(1.5 * 2**30)
    ('512 B', '1.5 GiB')
    """
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    for unit in units:
        if size < 1024 or unit == units[-1]:
            return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
        size /= 1024
    raise AssertionError("the last unit takes everything")


def resident() -> int:
    """Return the resident memory of this process in bytes.

    >>> resident() > 2**20
    True
    """
    return psutil.Process().memory_info().rss


def in_use() -> int:
    """Return the bytes that this process has allocated on the accelerator if it uses one, else its resident memory.

    >>> in_use() > 2**10
    True
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.memory_allocated()
    return resident()


def available(device: torch.device) -> int:
    """Return the bytes that can still be allocated on `device`.

    >>> available(torch.device("cpu")) > 2**20
    True
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def trim_memory() -> None:
    """Return freed memory from the C library's allocator to the system.

    glibc keeps freed pieces between pieces in use: a walk over many blocks would end with as much memory as all blocks
    need together. On systems other than Linux nothing happens.

    >>> pieces = [torch.ones(2**16) for _ in range(8)]
    >>> del pieces
    >>> trim_memory()
    """
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)


@cache
def _libc() -> ctypes.CDLL | None:
    """Open the C library of this process; None on systems other than Linux."""
    return ctypes.CDLL(None) if sys.platform.startswith("linux") else None


def in_file(states: Tensor, folder: Path) -> Tensor:
    """Copy `states` into a file of `folder`, and return a tensor that is mapped to the file and read from it on use.

    The file is unlinked at once, and its space is freed together with the tensor, however the program ends.

    Raises:
        ArtefactError: the file cannot be written.

    >>> states = in_file(torch.arange(4.0), Path("scratch"))
    >>> states.tolist(), list(Path("scratch").iterdir())
    ([0.0, 1.0, 2.0, 3.0], [])
    """
    flat = states.detach().cpu().contiguous()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".states.") as file:
            file.write(flat.view(-1).view(torch.uint8).numpy().data)
            file.flush()
            mapped = torch.from_file(file.name, shared=True, size=flat.numel(), dtype=flat.dtype)
    except OSError as cause:
        raise ArtefactError(
            f"Cannot keep hidden states in {folder}: {cause.strerror or cause}. Free space, or raise --max-memory."
        ) from cause
    return mapped.view(flat.shape)
