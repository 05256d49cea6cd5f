"""How much memory there is and may be used, and hidden states kept in files where it does not suffice."""

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

WHOLE_COPIES = 3
"""Models in memory at the end of a run that loads them whole: the changed one, the original, and the saved one."""


def parse_size(text: str) -> int:
    """Bytes of a size as it is typed: 8GiB, 500MB, 1.5g, 1000000.

    Raises:
        UsageError: it is no size, or nothing.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", text.strip().lower())
    size = int(float(found[1]) * UNITS[found[2] or ""]) if found else 0
    if not size:
        raise UsageError(f"'{text}' is no amount of memory; write it as 8GiB or 500MB.")
    return size


def size_text(size: float) -> str:
    """Bytes as they are read: 512 B, 1.5 GiB."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    for unit in units:
        if size < 1024 or unit == units[-1]:
            return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
        size /= 1024
    raise AssertionError("the last unit takes everything")


def resident() -> int:
    """Bytes of this process in memory."""
    return psutil.Process().memory_info().rss


def in_use() -> int:
    """Bytes of this process on the accelerator that it uses, else in memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.memory_allocated()
    return resident()


def available(device: torch.device) -> int:
    """Bytes that can still be had on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def give_back() -> None:
    """Return to the system what the allocator keeps of freed memory.

    glibc keeps free pieces between pieces in use: walks over many blocks end with as much as the blocks themselves.
    """
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)


@cache
def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform.startswith("linux") else None


def in_file(states: Tensor, folder: Path) -> Tensor:
    """A copy of `states` that is backed by a file in `folder` and read from it when it is used.

    The file loses its name at once and its space when the tensor goes, however the program ends.

    Raises:
        ArtefactError: the file cannot be written.
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
