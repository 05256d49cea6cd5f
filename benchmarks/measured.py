"""Run a command, and write what its process took: CPU seconds, wall seconds and peak resident bytes.

    python -IS measured.py OUT MARK COMMAND ...

OUT becomes JSON, `{"whole": ..., "marked": ...}`. `marked` is what it had taken when the path MARK appeared, up to a
twentieth of a second later; it is null where MARK is "-" or never appeared, or where there is no /proc. The exit code
is that of the command. A process begins with the peak of the one that started it, so this one stands between a program
that may be large and what is measured, and imports the standard library alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

EVERY = 0.05
"""Seconds between two looks at the mark."""

RSS_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes of a unit of `ru_maxrss`."""


def so_far(pid: int, seconds: float) -> dict[str, float] | None:
    """Read what a running process has taken; None where the system does not say or the process is over."""
    try:
        # The name of the program, in brackets, may hold spaces.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        peak = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None
    # User and system time, of the process and of its children that have ended.
    ticks = sum(int(field) for field in fields[11:15])
    return {"cpu": ticks / os.sysconf("SC_CLK_TCK"), "wall": seconds, "peak": int(peak.split()[1]) * 1024}


def main(arguments: list[str]) -> int:
    """Run the command and write its costs."""
    out, mark, *command = arguments
    marked = None
    started = time.perf_counter()
    child = subprocess.Popen(command)
    while True:
        pid, status, usage = os.wait4(child.pid, 0 if mark == "-" or marked else os.WNOHANG)
        seconds = time.perf_counter() - started
        if pid:
            break
        if os.path.exists(mark):
            marked = so_far(child.pid, seconds)
        time.sleep(EVERY)
    child.returncode = os.waitstatus_to_exitcode(status)
    whole = {"cpu": usage.ru_utime + usage.ru_stime, "wall": seconds, "peak": usage.ru_maxrss * RSS_UNIT}
    Path(out).write_text(json.dumps({"whole": whole, "marked": marked}), encoding="utf-8")
    return child.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
