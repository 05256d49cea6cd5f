"""Run a command, and write what its process took: CPU seconds, wall seconds and peak resident bytes.

    python -IS measured.py OUT COMMAND ...

OUT becomes JSON. The exit code is that of the command. A process begins with the peak of the one that started it, so
this one stands between a program that may be large and what is measured, and imports the standard library alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

RSS_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes of a unit of `ru_maxrss`."""


def main(arguments: list[str]) -> int:
    """Run the command and write its costs."""
    out, *command = arguments
    started = time.perf_counter()
    child = subprocess.Popen(command)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    cost = {"cpu": usage.ru_utime + usage.ru_stime, "wall": seconds, "peak": usage.ru_maxrss * RSS_UNIT}
    Path(out).write_text(json.dumps(cost), encoding="utf-8")
    return child.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
