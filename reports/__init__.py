"""Reports: what a run found, as tables, pictures and a page. They read summaries, no model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.padding import Padding

from globalopt.values.results import Details, Family, Summary, WindowLosses
from reports.budgets import budget_diff, budget_file
from reports.cache import cache_table
from reports.comparison import comparison, held_against_first
from reports.comparison_page import comparison_page
from reports.family_page import family_page
from reports.html import write_page
from reports.progress import LineProgress, LiveProgress, QuietProgress, make_progress
from reports.run_page import run_page
from reports.tables import metrics_table, render
from reports.tasks import render_scores

PAGE, COMPARISON_PAGE = "report.html", "comparison.html"

__all__ = [
    "LineProgress",
    "LiveProgress",
    "QuietProgress",
    "Written",
    "budget_diff",
    "budget_file",
    "cache_table",
    "comparison",
    "held_against_first",
    "make_progress",
    "metrics_table",
    "render",
    "render_scores",
    "report",
    "report_comparison",
    "report_family",
]


class Written(NamedTuple):
    """The page of a report, which holds its pictures too, and the pictures alone."""

    page: Path
    pictures: list[Path]


def report(
    summary: Summary, folder: Path, console: Console, verbose: bool = False, details: Details | None = None
) -> Written:
    """Print the report of a run, and write its pictures and `report.html` into `folder`.

    Args:
        details: what the pictures and the page show beside the summary.

    Raises:
        ArtefactError: a file cannot be written.
    """
    # Here, so that nothing draws, and takes matplotlib's 25 MiB, while a model is compressed.
    from reports.pictures import write_figures

    render(summary, console, verbose)
    pictures = write_figures(summary, folder, details)
    page = run_page(summary, details or Details(), pictures)
    return Written(write_page(page, folder / PAGE), pictures)


def report_family(family: Family, folder: Path, console: Console) -> Written:
    """Print the table of a family of budgets, and write its curve and `report.html` into `folder`.

    Raises:
        ArtefactError: a file cannot be written.
    """
    from reports.frontier import frontier_table, write_frontier

    sign = "+-" if console.options.ascii_only else "±"
    console.print(Padding(frontier_table(family, sign), (0, 0, 1, 0)))
    picture = write_frontier(family, folder)
    return Written(write_page(family_page(family, picture), folder / PAGE), [picture])


def report_comparison(
    summaries: Sequence[Summary], labels: Sequence[str], losses: Sequence[tuple[WindowLosses, ...]], folder: Path
) -> Written:
    """Write the pictures of several runs and `comparison.html` into `folder`; the tables are `comparison`.

    Raises:
        ArtefactError: a file cannot be written.
    """
    from reports.comparison_figure import write_comparison_figures

    pictures = write_comparison_figures(summaries, labels, folder)
    page = comparison_page(summaries, labels, losses, pictures)
    return Written(write_page(page, folder / COMPARISON_PAGE), pictures)
