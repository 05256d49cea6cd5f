"""Work on one job in several processes, which `torchrun` or another launcher has started with the same command.

Every process has a number, its rank. Rank 0 is the writer: it alone decides, writes what has one owner, and speaks. All
call the functions of this module at the same places, in the same order; with one process each does nothing or returns
what it was given. Sums are added up in the order of the ranks, so that they are the same in every process, bit for bit,
and in every run with as many processes.

The processes talk over gloo, and the tensors of GPUs over NCCL where each process has a GPU of its own.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from globalopt.errors import ArtefactError, LostProcessError, one_line
from globalopt.machine import shares

T = TypeVar("T")
K = TypeVar("K")
AT_ONCE = 2**24
"""Numbers of a tensor that are summed at once."""
LOST = (
    "Another process of this job has ended, or the launcher ended it. Run the same command again to go on from the "
    "last finished artefact, with as many processes as you like."
)


@dataclass
class Traffic:
    """Count what the processes send each other, by what is done with it.

    Args:
        calls: number of exchanges.
        bytes: of what one process puts in: `summed` with that of the others, `gathered` by all, `told` by one.

    >>> Traffic().bytes
    {'summed': 0, 'gathered': 0, 'told': 0}
    """

    calls: dict[str, int] = field(default_factory=lambda: {"summed": 0, "gathered": 0, "told": 0})
    bytes: dict[str, int] = field(default_factory=lambda: {"summed": 0, "gathered": 0, "told": 0})

    def add(self, kind: str, size: int) -> None:
        """Count one exchange of so many bytes."""
        self.calls[kind] += 1
        self.bytes[kind] += size


@dataclass(frozen=True, eq=False)
class World:
    """Hold the place of this process among all, and the groups that it talks over.

    Args:
        number: of this process, from 0.
        count: of all processes.
        local_count: of those on this machine.
        control: the group of all, over gloo; None of one process.
        gpus: the group of their GPUs, over NCCL; None where not every process has one of its own.

    >>> World(0, 1, 1, None).count
    1
    """

    number: int
    count: int
    local_count: int
    control: dist.ProcessGroup | None
    gpus: dist.ProcessGroup | None = None


ALONE = World(0, 1, 1, None)
_world = ALONE
traffic = Traffic()
"""What this process has sent since it began."""


class _Folders(Protocol):
    def refresh(self) -> None: ...


# ------------------------------------------------------------------------------------------------- who there is


def enter(world: World) -> None:
    """Take a place among the processes of a job, which `launch.joined` has found.

    >>> enter(ALONE)
    """
    global _world
    _world = world


def count() -> int:
    """Count the processes of the job.

    >>> count()
    1
    """
    return _world.count


def number() -> int:
    """Return the number of this process, from 0.

    >>> number()
    0
    """
    return _world.number


def local_count() -> int:
    """Count the processes of the job on this machine, which share its memory.

    >>> local_count()
    1
    """
    return _world.local_count


def several() -> bool:
    """Tell whether the job has more than one process.

    >>> several()
    False
    """
    return _world.count > 1


def writer() -> bool:
    """Tell whether this process writes what has one owner, and speaks.

    >>> writer()
    True
    """
    return _world.number == 0


# ------------------------------------------------------------------------------------------------- work


def share(items: Sequence[T], cost: Callable[[T], float] = lambda item: 1.0) -> list[T]:
    """Return the items of this process, in their order, where items are divided into parts of about equal cost.

    Args:
        items: the same ones in every process.

    >>> share(["q_proj", "down_proj"], cost=len)
    ['q_proj', 'down_proj']
    """
    if not several():
        return list(items)
    owners = shares.bins([cost(item) for item in items], _world.count)
    return [item for item, owner in zip(items, owners, strict=True) if owner == _world.number]


def span(total: int) -> range:
    """Return the part of `range(total)` of this process, as many consecutive numbers as others have.

    >>> span(5)
    range(0, 5)
    """
    return shares.span(total, _world.number, _world.count)


def owns(index: int) -> bool:
    """Tell whether this process owns the item of this index, where items are dealt out in turn.

    >>> owns(3)
    True
    """
    return index % _world.count == _world.number


# ------------------------------------------------------------------------------------------------- exchanges


def barrier() -> None:
    """Wait until all processes have come to this place.

    >>> barrier()
    """
    if several():
        with _reaching():
            dist.all_reduce(torch.zeros(1), group=_world.control)


def written(folders: _Folders) -> None:
    """Wait until all processes have written what they own, and look into the folders again.

    On a disk of the network a file that another machine has written is seen only when its folder is read again.

    >>> from globalopt.runs.workspace import Workspace
    >>> from pathlib import Path
    >>> written(Workspace(Path("work")))
    """
    if several():
        barrier()
        folders.refresh()


def total(x: Tensor) -> Tensor:
    """Add up a tensor over all processes, in place, in the order of their numbers.

    Every process adds up a part of the numbers and sends the sums to the others: of `n` bytes it sends about
    `2 n (p - 1) / p`.

    Args:
        x: of the same shape and type in all.
    Returns:
        `x`.

    >>> total(torch.ones(2))
    tensor([1., 1.])
    """
    if not several():
        return x
    traffic.add("summed", x.numel() * x.element_size())
    group = _world.gpus if x.is_cuda else _world.control
    place = torch.device("cpu") if group is None or not x.is_cuda else x.device
    flat = x.detach().reshape(-1)
    with _reaching():
        for piece in flat.split(AT_ONCE):
            piece.copy_(_sum_in_order(piece.to(place), group or _world.control))
    if flat.data_ptr() != x.data_ptr():
        x.detach().copy_(flat.view(x.shape))
    return x


def _sum_in_order(piece: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Add up a vector over all processes; every one adds up a part, and all get all parts."""
    size = -(-len(piece) // _world.count)
    sent = piece.new_zeros(_world.count, size)
    sent.view(-1)[: len(piece)] = piece
    parts = torch.empty_like(sent)
    dist.all_to_all_single(parts, sent, group=group)
    own = parts[0].clone()
    for part in parts[1:]:
        own += part
    dist.all_gather(list(sent.unbind()), own, group=group)
    return sent.view(-1)[: len(piece)]


def total_of_all(tensors: Sequence[Tensor]) -> None:
    """Add up several tensors of one type and device over all processes, in place, in one exchange.

    >>> total_of_all([torch.ones(2), torch.ones(3)])
    """
    if not several():
        return
    whole = total(torch.cat([x.detach().reshape(-1) for x in tensors]))
    for x, part in zip(tensors, whole.split([x.numel() for x in tensors]), strict=True):
        x.detach().copy_(part.view(x.shape))


def gathered(value: T) -> list[T]:
    """Return the values of all processes, by their numbers.

    Args:
        value: can be pickled; tensors of it are on the CPU.

    >>> gathered("a")
    ['a']
    """
    if not several():
        return [value]
    packed = _packed(value)
    traffic.add("gathered", len(packed))
    with _reaching():
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(_world.count)]
        dist.all_gather(sizes, torch.tensor([len(packed)]), group=_world.control)
        found = torch.zeros(_world.count, int(max(sizes)), dtype=torch.uint8)
        own = torch.zeros(found.shape[1], dtype=torch.uint8)
        own[: len(packed)] = packed
        dist.all_gather(list(found.unbind()), own, group=_world.control)
    return [_unpacked(row[: int(size)]) for row, size in zip(found, sizes, strict=True)]


def merged(values: Mapping[K, T]) -> dict[K, T]:
    """Merge the mappings of all processes, of which each has keys of its own.

    >>> merged({"up": 0.5})
    {'up': 0.5}
    """
    return {key: value for each in gathered(dict(values)) for key, value in each.items()}


def told(value: T, by: int = 0) -> T:
    """Return the value of one process in all.

    Args:
        value: of any process but that one, it is dropped. It can be pickled; tensors of it are on the CPU.
        by: number of the process.

    >>> told([1, 2])
    [1, 2]
    """
    if not several():
        return value
    packed = _packed(value if number() == by else None)
    with _reaching():
        size = torch.tensor([len(packed)])
        dist.broadcast(size, by, group=_world.control)
        if number() != by:
            packed = torch.zeros(int(size), dtype=torch.uint8)
        dist.broadcast(packed, by, group=_world.control)
    traffic.add("told", len(packed))
    return value if number() == by else _unpacked(packed)


def by_writer(make: Callable[[], T]) -> T:
    """Call a function in the writer alone, and return its result in all processes, when it is done.

    >>> by_writer(lambda: 2 + 2)
    4
    """
    if not several():
        return make()
    return told(make() if writer() else cast("T", None))


def check_alike(value: Any, what: str) -> None:
    """Raise `ArtefactError` where a value differs between processes.

    Args:
        what: names the value in the message.

    >>> check_alike("0123", "model or text")
    """
    others = gathered((value, socket.gethostname()))
    if differing := [(i, host) for i, (other, host) in enumerate(others) if other != others[0][0]]:
        i, host = differing[0]
        raise ArtefactError(
            f"Process {i} (on {host}) has another {what} than process 0 (on {others[0][1]}). Give all processes the "
            "same command, files and versions of packages."
        )


class _Pickler(pickle.Pickler):
    """Pickle read-only mappings too, of which values are made."""

    def reducer_override(self, obj: Any) -> Any:
        return (_read_only, (dict(obj),)) if isinstance(obj, MappingProxyType) else NotImplemented


def _read_only(values: dict[Any, Any]) -> MappingProxyType[Any, Any]:
    return MappingProxyType(values)


def _packed(value: Any) -> Tensor:
    file = io.BytesIO()
    _Pickler(file, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return torch.frombuffer(bytearray(file.getbuffer()), dtype=torch.uint8)


def _unpacked(packed: Tensor) -> Any:
    # Of a process of the same job and user.
    return pickle.loads(packed.numpy().tobytes())


@contextlib.contextmanager
def _reaching() -> Iterator[None]:
    """Turn the error of a process that cannot be reached into ours."""
    try:
        yield
    except RuntimeError as cause:
        # Without the place in the sources of gloo that it begins with.
        said = RuntimeError(re.sub(r"^\[[^]]*] *", "", str(cause)))
        raise LostProcessError(f"{LOST} ({one_line(said, 160)})") from None
