"""Join the processes of a job at its beginning, and end all of them where one ends."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta
from functools import cache
from typing import Any, cast

import torch
import torch.distributed as dist

from globalopt.errors import LostProcessError, UsageError, one_line
from globalopt.machine import ranks

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables by which a launcher tells every process its number and where to meet the others."""

LONGEST = timedelta(days=7)
"""Time that processes wait for each other: one that ends is noticed at once, and one may work on a layer for hours."""

MEETING = timedelta(minutes=10)
"""Time within which all processes must have started."""

_meetings = itertools.count()


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the processes that were started together, where there are several; all leave together at the end.

    A process that ends with an error ends all others, and the first of them says why.

    Raises:
        UsageError: not all variables of the launcher are set, or the other processes are not there.
        LostProcessError: another process has ended.
        SystemExit: another process has ended, and another one says so.

    >>> with joined():
    ...     ranks.count()
    1
    """
    asked = os.environ.get("WORLD_SIZE", "1")
    if ranks.several() or asked in ("", "1"):
        yield
        return
    world, store = _join(asked)
    ranks.enter(world)
    try:
        with _ending():
            yield
            ranks.barrier()
    except BaseException:
        if not _speaks(world, store):
            raise SystemExit(1) from None
        raise
    else:
        dist.destroy_process_group()
    finally:
        if dist.is_initialized() and world.gpus is None:
            # Where GPUs talk, that waits for processes that have ended; the system takes it apart.
            dist.destroy_process_group()
        ranks.enter(ranks.ALONE)


def _join(asked: str) -> tuple[ranks.World, Any]:
    """Meet the other processes."""
    if missing := [name for name in VARIABLES if not os.environ.get(name)]:
        raise UsageError(
            f"WORLD_SIZE is {asked}, and {', '.join(missing)} is not set. Start the command with torchrun, or set "
            f"{', '.join(VARIABLES)} for every process; without WORLD_SIZE there is one process."
        )
    if not dist.is_available():
        raise UsageError("This build of torch cannot talk to other processes. Run the command without a launcher.")
    try:
        store, rank, size = _meet()
        # A store keeps what was written into it: of every meeting of these processes the names are others.
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        own = dist.PrefixStore(f"globalopt {restarts} {next(_meetings)}", store)  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("gloo", store=own, rank=rank, world_size=size, timeout=LONGEST)
    except (RuntimeError, ValueError) as cause:
        raise UsageError(
            f"The other processes of the job cannot be reached at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} ({one_line(cause, 160)}). Start all of them with the same launcher."
        ) from None
    everyone: list[Any] = [None] * size
    host = socket.gethostname()
    dist.all_gather_object(everyone, host)
    local = everyone[:rank].count(host)
    world = ranks.World(rank, size, everyone.count(host), dist.group.WORLD, _gpus(local, size))
    return world, own


@cache
def _meet() -> tuple[Any, int, int]:
    """Open the store by which the processes of the launcher find each other; return it with the place of this one."""
    return next(iter(dist.rendezvous("env://", timeout=MEETING)))  # pyright: ignore[reportPrivateImportUsage]


def _gpus(local: int, size: int) -> dist.ProcessGroup | None:
    """Take the GPU of this process, and return the group that talks between GPUs; None where two share one."""
    own = None
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
        own = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, own)
    if None in everyone or len(set(everyone)) < size:
        return None
    return cast("dist.ProcessGroup", dist.new_group(backend="nccl", timeout=LONGEST))


@contextlib.contextmanager
def _ending() -> Iterator[None]:
    """Raise `LostProcessError` where the launcher ends this process, as it does when another one has ended."""

    def ended(*_: object) -> None:
        raise LostProcessError(ranks.LOST)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, ended)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _speaks(world: ranks.World, store: Any) -> bool:
    """Tell whether this process is the first to end with an error, and so the one that says why."""
    try:
        return store.add("ended", 1) == 1
    except RuntimeError:
        # The store was in process 0, which has ended: one of the others speaks.
        return world.number == 1
