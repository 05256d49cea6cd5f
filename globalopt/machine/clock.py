"""Time and peak memory per stage."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import psutil
import torch

from globalopt.values.results import StageCost

INTERVAL = 0.05  # seconds between samples of the resident memory


class StageClock:
    """Collects a `StageCost` per stage; a stage that is entered twice adds its seconds and keeps the higher peak."""

    def __init__(self) -> None:
        self._costs: dict[str, StageCost] = {}

    @property
    def costs(self) -> tuple[StageCost, ...]:
        return tuple(self._costs.values())

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the body: wall seconds, and the peak of resident (on an accelerator: allocated) memory in bytes."""
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        process = psutil.Process()
        peak = process.memory_info().rss
        done = threading.Event()

        def sample() -> None:
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
