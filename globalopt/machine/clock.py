"""Measure time and peak memory of every stage of a run."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import psutil
import torch

from globalopt.values.stage_cost import StageCost

INTERVAL = 0.05  # seconds between samples of the resident memory


class StageClock:
    """Measure the cost of every stage; a stage that is entered twice adds its seconds and keeps the higher peak.

    >>> clock = StageClock()
    >>> with clock.stage("square"):
    ...     product = torch.ones(8, 8) @ torch.ones(8, 8)
    >>> [cost.name for cost in clock.costs], clock.costs[0].seconds > 0, clock.costs[0].peak_bytes > 2**20
    (['square'], True, True)
    """

    def __init__(self) -> None:
        self._costs: dict[str, StageCost] = {}

    @property
    def costs(self) -> tuple[StageCost, ...]:
        """Return the costs of all stages, in the order in which they were first entered."""
        return tuple(self._costs.values())

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the wall seconds and the peak resident bytes of the body; peak allocated bytes on an accelerator."""
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        process = psutil.Process()
        peak = process.memory_info().rss
        done = threading.Event()

        def sample() -> None:
            """Sample the resident memory until the stage is done."""
            nonlocal peak
            while not done.wait(INTERVAL):
                peak = max(peak, process.memory_info().rss)

        sampler = threading.Thread(target=sample, daemon=True)
        started = time.perf_counter()
        sampler.start()
        try:
            yield
        finally:
            done.set()
            sampler.join()
            peak = max(peak, process.memory_info().rss)
            if cuda:
                peak = max(peak, torch.cuda.max_memory_allocated())
            before = self._costs.get(name, StageCost(name, 0.0, 0))
            seconds = before.seconds + time.perf_counter() - started
            self._costs[name] = StageCost(name, seconds, max(before.peak_bytes, peak))
