"""Terminal output of every command: its two streams, one line per error, and the exit codes.

0 done, 1 failed, 2 usage, 3 budget infeasible, 4 finished with fallbacks, 130 interrupted and resumable.
"""

# Heavy imports are inside the functions: `globalopt --help` must not wait for torch.
from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import warnings
from collections.abc import Iterator, Sequence

import typer
from rich.console import Console

from globalopt.commands.interrupts import INTERRUPTED, MESSAGE, caught

FAILED = 1
DONE_WITH_FALLBACKS = 4

ADVICE = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ImportWarning, ResourceWarning, SyntaxWarning)
"""Kinds of warnings that are for programmers."""

ADVISERS = r"(transformers|tokenizers|huggingface_hub|datasets|accelerate|peft|lm_eval|evaluate|torch|optuna)\b"
"""Packages whose own warnings are hints on their use; those of numpy and scipy are about numbers."""

_UNUSABLE = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP)

out = Console()
err = Console(stderr=True)


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """Turn the errors of this package, exhausted memory and Ctrl-C into one line and an exit code."""
    from globalopt.errors import GlobalOptError

    try:
        with caught(), _warnings_on_one_line():
            yield
    except GlobalOptError as cause:
        raise _exit(str(cause), cause.exit_code) from None
    except OSError as cause:
        # Whatever option a name was given for: it is too long for the disk, or in a folder that may not be entered.
        if cause.filename is None or cause.errno not in _UNUSABLE:
            raise
        raise _exit(f"Cannot use {_text(cause.filename)}: {cause.strerror}.", FAILED) from None
    except _out_of_memory() as cause:
        raise _exit(
            f"Out of memory ({cause}). Lower --batch-size, --seqlen or --nsamples, or use --dtype bfloat16 or "
            "--max-memory.",
            FAILED,
        ) from None
    except KeyboardInterrupt:
        err.out(MESSAGE, highlight=False)
        raise typer.Exit(INTERRUPTED) from None


def _text(name: str | bytes | int) -> str:
    return os.fsdecode(name) if isinstance(name, bytes) else str(name)


@contextlib.contextmanager
def _warnings_on_one_line() -> Iterator[None]:
    """Print each different warning once, on one line; the advice of libraries to programmers is left out.

    Numerical warnings (an overflow, an ill-conditioned matrix, an optimisation that did not converge) are shown.
    """

    def show(message: Warning | str, *place: object, **more: object) -> None:
        """Print one warning, of which the place in the code tells a user nothing."""
        if (text := str(message)) not in shown:
            shown.add(text)
            _say("warning: ", "bold yellow", text)

    shown: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        for category in ADVICE:
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("ignore", category=UserWarning, module=ADVISERS)
        warnings.showwarning = show
        yield


def _say(label: str, style: str, message: str) -> None:
    """Print a message on one line of stderr, however many it has."""
    from rich.text import Text

    line = re.sub(r"\s*[\r\n]\s*", " ", message.strip())
    err.print(Text.assemble((label, style), line), soft_wrap=True)


def _exit(message: str, code: int) -> typer.Exit:
    _say("error: ", "bold red", message)
    return typer.Exit(code)


def _out_of_memory() -> tuple[type[Exception], ...]:
    """Return the exceptions that mean too little memory."""
    import torch

    return MemoryError, torch.OutOfMemoryError


def print_json(value: object) -> None:
    """Print a value as JSON, the same on a terminal of any width."""
    out.out(json.dumps(value, indent=1, allow_nan=False), highlight=False)


def say(lines: Sequence[tuple[str, object]]) -> None:
    """Print labelled texts, one per line, unbroken so that they can be copied."""
    for label, text in lines:
        out.out(f"{label:>8}  {text}", highlight=False)
