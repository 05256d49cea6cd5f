"""Reports: what a run found, as tables in the terminal and heatmaps as pictures. They read summaries, no model."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.padding import Padding

from globalopt.summary import Family, Summary
from reports.budgets import budget_diff, budget_file
from reports.comparison import comparison, held_against_first
from reports.frontier import frontier_table, write_frontier
from reports.pictures import write_figures
from reports.progress import LineProgress, LiveProgress, QuietProgress, make_progress
from reports.tables import metrics_table, render
from reports.tasks import render_scores

__all__ = [
    "LineProgress",
    "LiveProgress",
    "QuietProgress",
    "budget_diff",
    "budget_file",
    "comparison",
    "held_against_first",
    "make_progress",
    "metrics_table",
    "render",
    "render_scores",
    "report",
    "report_family",
    "write_figures",
]


def report(summary: Summary, folder: Path, console: Console, verbose: bool = False) -> list[Path]:
    """Print the report of a run, write its pictures into `folder`, and return their paths.

    Raises:
        ArtefactError: a picture cannot be written.
    """
    render(summary, console, verbose)
    return write_figures(summary, folder)


def report_family(family: Family, folder: Path, console: Console) -> Path:
    """Print the table of a family of budgets, draw its curve into `folder`, and return its path.

    Raises:
        ArtefactError: the picture cannot be written.
    """
    sign = "+-" if console.options.ascii_only else "±"
    console.print(Padding(frontier_table(family, sign), (0, 0, 1, 0)))
    return write_frontier(family, folder)
