"""Work on several layers at once, each with one thread, where layers are too small to occupy all threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

ENTRIES_AT_ONCE = 2**22
"""Entries of the weights that are worked on at once, so that memory does not grow with the number of threads."""


def at_once(largest: int, device: torch.device) -> int:
    """Count the items that `in_threads` works on at once, where the `largest` has so many entries.

    >>> at_once(2**22, torch.device("cpu"))
    1
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    return max(1, min(threads, ENTRIES_AT_ONCE // max(1, largest)))


def in_threads(
    work: Callable[[T], R], items: Sequence[T], entries: Callable[[T], int], device: torch.device
) -> Iterator[R]:
    """Apply `work` to all items and yield the results in their order.

    On a CPU with several threads, as many items are worked on at once as there are threads, with one thread each, but
    no more than have `ENTRIES_AT_ONCE` entries together: products of small matrices gain little from a second thread.
    The result of an item depends on the number of threads only where it is worked on with several.

    Args:
        work: must not change what the work on another item reads.
        entries: of the weight of an item.
        device: on which the work is done.
    Raises:
        Exception: the first that `work` raises, in the order of the items; what has not begun is left out.

    >>> list(in_threads(lambda x: 2 * x, [1, 2, 3], lambda x: x, torch.device("cpu")))
    [2, 4, 6]
    """
    workers = min(at_once(max(map(entries, items), default=1), device), len(items))
    if workers < 2:
        yield from map(work, items)
        return
    threads, graded = torch.get_num_threads(), torch.is_grad_enabled()

    def begin() -> None:
        """Set what every thread has of its own."""
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)

    def one(item: T) -> R:
        with torch.set_grad_enabled(graded):
            return work(item)

    waiting: deque[Future[R]] = deque()
    try:
        with ThreadPoolExecutor(workers, initializer=begin) as pool:
            try:
                for item in items:
                    # One more than there are workers: none of them waits for the reader.
                    if len(waiting) > workers:
                        yield waiting.popleft().result()
                    waiting.append(pool.submit(one, item))
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()
    finally:
        # The number of threads of some libraries is one for the process.
        torch.set_num_threads(threads)
