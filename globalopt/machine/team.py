"""Let one process of a job decide what all compute next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from globalopt.machine import ranks

T = TypeVar("T")


class Team:
    """Let the writer decide what to compute next, and all processes compute it together.

    Args:
        jobs: what can be asked for, by name; each is a function that all processes call with the same arguments.

    >>> team = Team({"square": lambda x: x * x})
    >>> team.run(lambda: team.ask("square", 2) + team.ask("square", 3))
    13
    """

    def __init__(self, jobs: Mapping[str, Callable[..., Any]]) -> None:
        self._jobs = jobs
        self._running = False

    def ask(self, job: str, *arguments: Any) -> Any:
        """Have all processes do a job, and return what this one gets; to be called within `run`."""
        if ranks.several():
            assert self._running, "the others are listening"
            ranks.told((job, arguments))
        return self._jobs[job](*arguments)

    def run(self, work: Callable[[], T]) -> T:
        """Call `work` in the writer, whose jobs the others do meanwhile; return its result in all processes."""
        if not ranks.several():
            return work()
        if not ranks.writer():
            while (asked := ranks.told(None)) is not None:
                job, arguments = cast("tuple[str, Any]", asked)
                self._jobs[job](*arguments)
            return ranks.told(cast("T", None))
        self._running = True
        try:
            result = work()
        finally:
            self._running = False
        ranks.told(None)
        return ranks.told(result)
