"""Estimate what a run takes, before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class DryRun:
    """Estimate the memory, disk space and time that a run would take.

    Args:
        model: name of the model, as the user gave it.
        parameters, block_params, covered: parameters of the model, of its decoder blocks, and of its compressible
            layers.
        skipped: parameters outside the compressible layers, by what they are.
        blocks, layers: how many there are.
        lazy: whether decoder blocks would be read one at a time.
        states_in_files: whether hidden states would be kept in files instead of memory.
        memory, disk: bytes by purpose.
        most_disk: largest number of bytes on disk at once.
        seconds: by stage.
        rate: floating-point operations per second of a timed matrix product.
        fit_seconds: seconds that the solver took for a timed layer.

    >>> plan = DryRun(
    ...     "reference", 2_500_000, 2_000_000, 1_900_000, {"norms and biases": 100_000}, blocks=8, layers=56,
    ...     lazy=False, states_in_files=False, memory={"model": 3 * 10**7, "Gram": 10**6}, disk={"model": 10**7},
    ...     most_disk=10**7, seconds={"fit": 90.0, "search": 30.0}, rate=5e10, fit_seconds=0.5,
    ... )
    >>> plan.peak, plan.record()["all_seconds"], plan.record()["coverage"]
    (31000000, 120.0, 0.95)
    """

    model: str
    parameters: int
    block_params: int
    covered: int
    skipped: Mapping[str, int]
    blocks: int
    layers: int
    lazy: bool
    states_in_files: bool
    memory: Mapping[str, int]
    disk: Mapping[str, int]
    most_disk: int
    seconds: Mapping[str, float]
    rate: float
    fit_seconds: float

    @property
    def peak(self) -> int:
        """Sum the estimated bytes of memory."""
        return sum(self.memory.values())

    def record(self) -> dict[str, object]:
        """Return all fields and their totals as JSON values."""
        totals = {
            "coverage": self.covered / self.block_params,
            "peak_bytes": self.peak,
            "disk_bytes": self.most_disk,
            "all_seconds": sum(self.seconds.values()),
        }
        return {**{name: _plain(value) for name, value in vars(self).items()}, **totals}


def _plain(value: object) -> object:
    """Convert a read-only mapping to a dict, which JSON can write."""
    return dict(value) if isinstance(value, Mapping) else value
