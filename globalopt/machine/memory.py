"""Measure and parse amounts of memory, and keep hidden states in files where memory is short."""

from __future__ import annotations

import ctypes
import re
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import psutil
import torch
from torch import Tensor

from globalopt.errors import ArtefactError, UsageError
from globalopt.machine import ranks

UNITS = {"": 1, **{p: 1000**i for i, p in enumerate("kmgt", 1)}, **{f"{p}i": 1024**i for i, p in enumerate("kmgt", 1)}}
"""Bytes by unit prefix: powers of 1000 for k, m, g and t, of 1024 for ki, mi, gi and ti."""

WHOLE_COPIES = 3
"""Most copies of a model's weights at once in a run that loads it whole: in a search, the dense ones and those of
candidates beside the model's own."""


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
    """Return the bytes that can still be allocated on `device`; of main memory the part of one process of a job.

    >>> available(torch.device("cpu")) > 2**20
    True
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return main_memory()[1] // ranks.local_count()


def main_memory(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> tuple[int, int]:
    """Return the total and the free main memory in bytes, within the limits of a container (cgroup v1 and v2).

    Files in the page cache count as free, as the system drops them before it runs out.

    Args:
        groups: where the control groups are mounted.
        own: says in which of them this process is.

    >>> total, free = main_memory()
    >>> 0 < free <= total
    True
    """
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    for folder, limit_name, used_name in _control_groups(groups, own):
        try:
            limit = int((folder / limit_name).read_text())
            used = int((folder / used_name).read_text())
            lines = (folder / "memory.stat").read_text().splitlines()
            stat = {name: int(value) for name, _, value in (line.partition(" ") for line in lines)}
        except (OSError, ValueError):
            # There is no such group here, or it has no limit ("max").
            continue
        # In version 1 the usage is of the whole hierarchy, and so are these.
        cached = sum(stat.get(f"total_{name}", stat.get(name, 0)) for name in ("active_file", "inactive_file"))
        total, free = min(total, limit), min(free, limit - used + cached)
    return total, max(0, free)


def _control_groups(groups: Path, own: Path) -> Iterator[tuple[Path, str, str]]:
    """Yield the folders of the groups that limit this process, with the names of limit and usage in them."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            root, names = groups, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = groups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # A group is bound by all above it. In a container its path may be the host's, of which only the root is seen.
        folder = root / path.lstrip("/")
        for each in (folder, *folder.parents):
            yield each, *names
            if each == root:
                break


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
