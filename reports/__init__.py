"""Reports: what a run found, as tables in the terminal and heatmaps as pictures. They read summaries, no model."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from globalopt.summary import Summary
from reports.comparison import comparison
from reports.heatmaps import write_figures
from reports.progress import LineProgress, LiveProgress, QuietProgress, make_progress
from reports.tables import budget_file, metrics_table, render

__all__ = [
    "LineProgress",
    "LiveProgress",
    "QuietProgress",
    "budget_file",
    "comparison",
    "make_progress",
    "metrics_table",
    "render",
    "report",
    "write_figures",
]


def report(summary: Summary, folder: Path, console: Console, verbose: bool = False) -> list[Path]:
    """Print the report of a run, write its pictures into `folder`, and return their paths.

    Raises:
        ArtefactError: a picture cannot be written.
    """
    render(summary, console, verbose)
    return write_figures(summary, folder)
