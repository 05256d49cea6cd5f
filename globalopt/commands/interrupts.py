"""End the program with one line on Ctrl-C, also while it still imports its libraries."""

# The standard library alone: this is imported before anything that takes time.
from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

INTERRUPTED = 130
MESSAGE = "Interrupted. Run the same command again to go on from the last finished artefact."

_caught = 0


def handle_interrupts() -> None:
    """Handle Ctrl-C in this process from here on: see `caught`.

    >>> before = signal.getsignal(signal.SIGINT)
    >>> handle_interrupts()
    >>> _ = signal.signal(signal.SIGINT, before)
    """
    signal.signal(signal.SIGINT, _interrupted)


@contextlib.contextmanager
def caught() -> Iterator[None]:
    """Raise `KeyboardInterrupt` on Ctrl-C while the context is open; outside of it the process ends at once.

    >>> with caught():
    ...     steps = sum(range(1000))
    """
    global _caught
    _caught += 1
    try:
        yield
    finally:
        _caught -= 1


def _interrupted(number: int, frame: FrameType | None) -> None:
    """Raise `KeyboardInterrupt` where a command catches it, else end the process."""
    if _caught and not _importing(frame):
        raise KeyboardInterrupt
    os.write(2, f"{MESSAGE}\n".encode())
    os._exit(INTERRUPTED)


def _importing(frame: FrameType | None) -> bool:
    """Tell whether a module is being imported: one that is left half imported fails in a way of its own."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
