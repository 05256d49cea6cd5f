"""Show the progress of a run: a live display on a terminal, a line per stage and half minute elsewhere, or nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Display
from rich.table import Column
from rich.text import Text

from globalopt.machine.memory import in_use
from globalopt.protocols import Progress
from reports import formats

INTERVAL = 30.0
"""Seconds between two lines of a stage that is still at work, where the output is no terminal."""


def make_progress(console: Console, quiet: bool = False, name: str = "") -> Progress:
    """Choose how to show progress: live on a terminal that can move its cursor, as a few lines elsewhere.

    Args:
        name: begins every line, where several processes print theirs.

    >>> type(make_progress(Console())).__name__
    'LineProgress'
    """
    if quiet:
        return QuietProgress()
    if name:
        return LineProgress(console, name=name)
    return LiveProgress(console) if console.is_terminal and not console.is_dumb_terminal else LineProgress(console)


class QuietProgress:
    """Show no progress.

    >>> with QuietProgress().stage("refine", 2, "layers") as step:
    ...     step("up_proj")
    """

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[[str], None]]:
        """Open a stage; the value is called after each step with a text."""
        yield lambda detail: None

    def note(self, text: str) -> None:
        """Print nothing."""


class LineProgress:
    """Print a plain line when a stage ends, and one every `interval` seconds while it lasts.

    A log then shows that a run is alive, where it is and what each stage took, and has no line for every layer. The
    lines in between come also while a single long step is at work. Of stages that are open at once, the inner one has
    them.

    Args:
        console: to which the lines are printed.
        interval: seconds between two lines of an open stage.
        name: begins every line.

    >>> with LineProgress(Console()).stage("refine", 2, "layers") as step:
    ...     step("up_proj")
    refine done  1/2 layers  ...
    """

    def __init__(self, console: Console, interval: float = INTERVAL, name: str = "") -> None:
        self._console = console
        self._name = name
        self._interval = interval
        self._open: list[threading.Event] = []

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[[str], None]]:
        """Open a stage of `total` steps; the value is called after each with a text."""
        start = time.perf_counter()
        done, last = 0, ""
        ended = threading.Event()

        def step(detail: str) -> None:
            nonlocal done, last
            done, last = done + 1, detail

        def report() -> None:
            """Print a line per interval until the stage has ended."""
            while not ended.wait(self._interval):
                if self._open[-1:] == [ended]:
                    self._say(underway(name, done, total, unit, time.perf_counter() - start, last))

        reporting = threading.Thread(target=_until_closed, args=(report,), daemon=True)
        self._open.append(ended)
        reporting.start()
        finished = False
        try:
            yield step
            finished = True
        finally:
            ended.set()
            reporting.join()
            self._open.remove(ended)
            elapsed = time.perf_counter() - start
            self._say(ending(name, done, total, unit, elapsed, finished).plain)

    def note(self, text: str) -> None:
        """Print a line."""
        self._say(text)

    def _say(self, line: str) -> None:
        """Print a line."""
        # Logs are read by programs too: no wrapping and no markup.
        self._console.out(f"{self._name}: {line}" if self._name else line, highlight=False)


def _until_closed(report: Callable[[], None]) -> None:
    """Report until the output is closed; the line at the end of the stage meets the same error where it is handled."""
    with suppress(OSError, ValueError):
        report()


class LiveProgress:
    """Show one bar per open stage in a live display; a stage that ended leaves a line with its time.

    The display runs only while a stage is open, and is removed also where a stage ends with an error.

    >>> with LiveProgress(Console(width=80)).stage("refine", 1, "layers") as step:
    ...     step("up_proj")
    refine done  1/1 layers  ...
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._display = Display(
            # Minimal widths that hold the usual texts, so that columns do not move.
            TextColumn("{task.description}", style="bold", markup=False, table_column=Column(min_width=11)),
            BarColumn(bar_width=8),
            _Count(Column(min_width=12, no_wrap=True)),
            _Rate(Column(min_width=7, no_wrap=True)),
            _Times(Column(min_width=16, no_wrap=True)),
            _Memory(Column(min_width=4, no_wrap=True)),
            _Detail(Column(ratio=1, no_wrap=True)),
            console=console,
            transient=True,
            expand=True,
        )

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[[str], None]]:
        """Open a stage of `total` steps; the value is called after each with a text."""
        task = self._display.add_task(name, total=total, unit=unit, detail="")
        start = time.perf_counter()
        done = 0

        def step(detail: str) -> None:
            nonlocal done
            done += 1
            self._display.update(task, completed=done, detail=detail)

        finished = False
        try:
            self._display.start()
            yield step
            finished = True
        finally:
            self._display.remove_task(task)
            if not self._display.tasks:
                self._display.stop()
            self._console.print(ending(name, done, total, unit, time.perf_counter() - start, finished))

    def note(self, text: str) -> None:
        """Print a line."""
        self._console.print(Text(text))


def ending(name: str, done: int, total: int, unit: str, seconds: float, finished: bool) -> Text:
    """Format the last line of a stage: how many steps it did in which time, and whether it failed.

    >>> ending("refine", 14, 14, "layers", 82.4, finished=True).plain
    'refine done  14/14 layers  1 min 22 s'
    """
    outcome = ("done", "green") if finished else ("failed", "bold red")
    return Text.assemble((name, "bold"), " ", outcome, f"  {done}/{total} {unit}  {formats.duration(seconds)}")


def underway(name: str, done: int, total: int, unit: str, seconds: float, detail: str) -> str:
    """Format a line of a stage at work: its steps and time, the time left at this rate, and the text of the last step.

    >>> underway("refine", 7, 14, "layers", 60.0, "up_proj")
    'refine  7/14 layers  1 min 00 s, 1 min 00 s left  up_proj'
    """
    left = f", {formats.duration(remaining(done, total, seconds))} left" if done else ""
    return f"{name}  {done}/{total} {unit}  {formats.duration(seconds)}{left}  {detail}".rstrip()


def remaining(done: float, total: float, seconds: float) -> float:
    """Estimate the seconds until `total` steps are done, at the mean rate of the `done` ones.

    >>> remaining(1, 4, 10.0)
    30.0
    """
    return seconds * max(0.0, total / done - 1)


class _Count(ProgressColumn):
    """Show the steps done, and all of them."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.completed:.0f}/{task.total:.0f} {task.fields['unit']}")


class _Rate(ProgressColumn):
    """Show the mean rate of the stage, as Rich's estimate forgets steps older than half a minute."""

    def render(self, task: Task) -> Text:
        if not task.completed or not task.elapsed:
            return Text("")
        rate = task.completed / task.elapsed
        return Text(f"{rate:.1f}/s" if rate >= 1 else f"{formats.duration(1 / rate)} each", "dim")


class _Times(ProgressColumn):
    """Show the elapsed time, and the remaining time at the mean rate."""

    def render(self, task: Task) -> Text:
        elapsed = task.elapsed or 0.0
        if not task.completed or not task.total:
            return Text(formats.clock(elapsed))
        left = remaining(task.completed, task.total, elapsed)
        return Text(f"{formats.clock(elapsed)}, {formats.clock(left)} left")


class _Memory(ProgressColumn):
    """Show the memory in use, on the accelerator where one is used; the summary tells the peak."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        return Text(f"{in_use() / 2**30:.1f}G", "dim")


class _Detail(ProgressColumn):
    """Show the text of the last step."""

    def render(self, task: Task) -> _Tail:
        return _Tail(task.fields["detail"])


class _Tail:
    """Show text cut at its beginning, as names of layers differ at their end."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        cut = self._text if len(self._text) <= width else ".." + self._text[len(self._text) - max(0, width - 2) :]
        yield Text(cut, "dim", no_wrap=True)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, max(1, len(self._text)))
