"""One process of a job that `ranks.py` starts: search the bundled model, and write what every stage took here.

    python benchmarks/rank_worker.py REPORT search ...

REPORT is a folder; it gets RANK.json: by stage the wall and CPU seconds of this process, and the bytes that it sent.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from globalopt.cli import app
from globalopt.commands import compress, search
from globalopt.machine import ranks
from globalopt.pipeline.reporter import Reporter


class Measured:
    """Show nothing, and add up by stage the seconds of this process and what it sent."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stages: dict[str, dict[str, float]] = {}

    @contextlib.contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[[str], None]]:
        """Measure a stage."""
        sent, wall, cpu = dict(ranks.traffic.bytes), time.perf_counter(), time.process_time()
        try:
            yield lambda detail: None
        finally:
            found = self._stages.setdefault(name, dict.fromkeys(("wall", "cpu", *sent), 0.0))
            found["wall"] += time.perf_counter() - wall
            found["cpu"] += time.process_time() - cpu
            for kind, before in sent.items():
                found[kind] += ranks.traffic.bytes[kind] - before
            self._path.write_text(json.dumps(self._stages), encoding="utf-8")

    def note(self, text: str) -> None:
        """Show nothing."""


def main(folder: Path, arguments: list[str]) -> None:
    """Run the command with a reporter of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    measured = Measured(folder / f"{os.environ.get('RANK', '0')}.json")
    reporter = Reporter(measured)
    for command in (search, compress):
        command.reporter = lambda *_: reporter  # pyright: ignore[reportAttributeAccessIssue]
    sys.argv = ["globalopt", *arguments]
    app()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
