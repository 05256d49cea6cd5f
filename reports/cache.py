"""The table of the cache: artefacts by stage."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path, PurePath

from rich.table import Table

from globalopt.machine.memory import size_text
from globalopt.runs.cache import Entry
from reports import formats

SHOWN = 12
"""Characters of an entry's folder that are shown, of the hash that names it: enough to tell entries apart."""


def cache_table(folder: Path, entries: Sequence[Entry]) -> Table:
    """Lay out the entries of a cache, one per line, with their sum.

    >>> from globalopt.runs.artefacts import Stage
    >>> entry = Entry(Path("cache/spans/0123456789abcdef"), Stage.SPANS, "models/llama", 2**20, time.time())
    >>> table = cache_table(Path("cache"), [entry])
    >>> [list(column.cells)[0] for column in table.columns][-2:]
    ['llama', '0123456789ab']
    """
    table = Table(title=f"Cache {folder}", title_justify="left", box=None, pad_edge=False, show_footer=True)
    total = size_text(sum(entry.bytes for entry in entries))
    table.add_column("stage", footer=f"{len(entries)} entries", no_wrap=True)
    table.add_column("size", justify="right", footer=total, no_wrap=True)
    table.add_column("last used", justify="right", no_wrap=True)
    # The one column that gives way on a narrow terminal: a name without spaces is cut, not folded.
    table.add_column("model", overflow="ellipsis")
    table.add_column("folder", style="dim", no_wrap=True)
    for entry in entries:
        age = f"{formats.duration(max(0.0, time.time() - entry.used))} ago"
        # A model is named by a path or by a hub id; both are told by their last part.
        model = PurePath(entry.model).name or entry.model
        table.add_row(entry.stage, size_text(entry.bytes), age, model, entry.folder.name[:SHOWN])
    return table
