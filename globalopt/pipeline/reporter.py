"""Report the stages of a job on a display, and measure their time and memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from globalopt.machine.clock import StageClock
from globalopt.protocols import Progress
from globalopt.values.stage_cost import StageCost


@dataclass(frozen=True, eq=False)
class Reporter:
    """Show stages on a display, and measure their time and memory.

    Args:
        progress: the display.
        clock: measures time and peak memory.

    >>> from reports import QuietProgress
    >>> reporter = Reporter(QuietProgress())
    >>> with reporter.stage("refine", 2, "layers") as advance:
    ...     advance("q_proj")
    ...     advance("k_proj")
    >>> [cost.name for cost in reporter.costs]
    ['refine']
    """

    progress: Progress
    clock: StageClock = field(default_factory=StageClock)

    @property
    def costs(self) -> tuple[StageCost, ...]:
        """Return time and peak memory of the stages so far."""
        return self.clock.costs

    def note(self, text: str) -> None:
        """Show one line that stays on the display."""
        self.progress.note(text)

    @contextlib.contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[[str], None]]:
        """Open a stage of `total` units; calling the yielded function with a detail advances it by one."""
        with self.clock.stage(name), self.progress.stage(name, total, unit) as advance:
            yield advance
