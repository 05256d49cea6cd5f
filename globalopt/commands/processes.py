"""Run a command in all processes of a job: the first one speaks, unless another has an error to tell."""

# Heavy imports are inside the functions: `globalopt --help` must not wait for torch.
from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from globalopt.commands.console import err, errors, out


@contextlib.contextmanager
def together(verbose: bool = False) -> Iterator[None]:
    """Join the processes that a launcher has started, if there are several; print errors as `errors` does.

    Args:
        verbose: whether every process shows what it does.
    """
    with errors():
        if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
            yield
            return
        from globalopt.machine import ranks
        from globalopt.machine.launch import joined

        quiet = out.quiet, err.quiet
        try:
            with joined():
                if not ranks.writer():
                    out.quiet, err.quiet = True, not verbose
                yield
        finally:
            # Also where an error is to be printed, which is done once the processes have parted.
            out.quiet, err.quiet = quiet
