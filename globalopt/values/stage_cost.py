"""Record what a stage took."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StageCost:
    """Record the seconds and the peak memory of one stage.

    Args:
        name: of the stage.
        seconds: wall-clock time.
        peak_bytes: peak resident memory, or peak memory of the accelerator where one is used.

    >>> max((StageCost("capture", 12.0, 900), StageCost("fit", 80.0, 700)), key=lambda cost: cost.seconds).name
    'fit'
    """

    name: str
    seconds: float
    peak_bytes: int
