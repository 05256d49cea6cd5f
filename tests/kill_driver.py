"""Run the command line again and again in forked children that are stopped at random moments, until it has finished.

    python -m tests.kill_driver HOW TIMES SEED FOLDER REPORT ARGUMENT...

HOW is `kill` (SIGKILL), `alone` (the same with `--no-cache`), `interrupt` (SIGINT) or `disk` (every write of an
artefact fails from a random one on). A child that finishes before it is stopped ends a round, and the next round starts
in another folder, with a cache of its own: nothing of one round is found by another. REPORT gets, as JSON, the folders
of all finished rounds and how every stopped child ended. Children are forked from a process that has imported
everything already, so that random moments fall into the work and not into imports.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import globalopt.pipeline.search  # noqa: F401
from globalopt.cli import main
from globalopt.runs import files


def child(arguments: list[str], said: Path, writes: int | None) -> int:
    """Run the command in a fork, with what it says in a file; the process id."""
    if pid := os.fork():
        return pid
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if writes is not None:
        fill_disk_after(writes)
    sys.argv = ["globalopt", *arguments]
    code = 70
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def fill_disk_after(writes: int) -> None:
    """Let so many artefacts be written, and fail all later ones as a full disk does."""
    replace, left = os.replace, writes

    def replaced(source: object, target: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)  # pyright: ignore[reportArgumentType]

    files.os.replace = replaced  # pyright: ignore[reportAttributeAccessIssue]


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def drive(how: str, times: int, seed: int, folder: Path, arguments: list[str]) -> dict[str, object]:
    draw = random.Random(seed)
    said = folder / "said.txt"

    def command(name: str) -> list[str]:
        kept = ["--no-cache"] if how == "alone" else ["--cache", str(folder / f"{name}-cache")]
        return [*arguments, "--out", str(folder / name), *kept]

    started = time.monotonic()
    assert ended(child(command("whole"), said, None)) == 0, said.read_text()
    seconds = time.monotonic() - started
    # Results that are links into the cache were written once, and their links as often.
    writes = sum(1 for name in ("whole", "whole-cache") for path in (folder / name).rglob("*") if path.is_file())

    rounds, stops = [], []
    name = "round0"
    while len(stops) < times:
        # A third of the whole at most: most rounds are stopped several times.
        pid = child(command(name), said, draw.randrange(writes // 3) if how == "disk" else None)
        if how != "disk":
            time.sleep(draw.uniform(0, seconds / 3))
            os.kill(pid, signal.SIGINT if how == "interrupt" else signal.SIGKILL)
        if (code := ended(pid)) == 0:
            rounds.append(name)
            name = f"round{len(rounds)}"
        else:
            stops.append({"code": code, "said": said.read_text()})
    assert ended(child(command(name), said, None)) == 0, said.read_text()
    return {"rounds": [*rounds, name], "stops": stops, "seconds": seconds}


if __name__ == "__main__":
    how, times, seed, folder, report, *arguments = sys.argv[1:]
    found = drive(how, int(times), int(seed), Path(folder), arguments)
    Path(report).write_text(json.dumps(found), encoding="utf-8")
