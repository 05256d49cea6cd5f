"""The table of the cache: artefacts by stage."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from globalopt.machine.memory import size_text
from globalopt.runs.cache import Entry
from reports import formats


def cache_table(folder: Path, entries: Sequence[Entry]) -> Table:
    """Lay out the entries of a cache, with their sum.

    >>> from globalopt.runs.artefacts import Stage
    >>> table = cache_table(Path("cache"), [Entry(Path("cache/spans/0"), Stage.SPANS, "my-model", 2**20, time.time())])
    >>> table.row_count
    1
    """
    table = Table(title=f"Cache {folder}", title_justify="left", box=None, pad_edge=False, show_footer=True)
    total = size_text(sum(entry.bytes for entry in entries))
    table.add_column("stage", footer=f"{len(entries)} entries")
    table.add_column("size", justify="right", footer=total)
    table.add_column("last used", justify="right")
    table.add_column("model", overflow="fold")
    table.add_column("folder", overflow="fold", style="dim")
    for entry in entries:
        age = f"{formats.duration(max(0.0, time.time() - entry.used))} ago"
        table.add_row(entry.stage, size_text(entry.bytes), age, entry.model, entry.folder.name)
    return table
