"""Report the results of runs as terminal tables, pictures and HTML pages, from their summaries alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.padding import Padding

from globalopt.values.family import Family
from globalopt.values.metrics import WindowLosses
from globalopt.values.results import Details, Summary
from reports.budgets import budget_diff, budget_file
from reports.cache import cache_table
from reports.comparison import comparison, differences_to_first
from reports.comparison_page import comparison_page
from reports.family_page import family_page
from reports.html import write_page
from reports.menu import Menu
from reports.progress import LineProgress, LiveProgress, QuietProgress, make_progress
from reports.quality_tables import metrics_table
from reports.run_page import run_page
from reports.tables import render
from reports.tasks import render_scores

PAGE, COMPARISON_PAGE = "report.html", "comparison.html"

__all__ = [
    "LineProgress",
    "LiveProgress",
    "Menu",
    "QuietProgress",
    "Written",
    "budget_diff",
    "budget_file",
    "cache_table",
    "comparison",
    "differences_to_first",
    "make_progress",
    "metrics_table",
    "render",
    "render_scores",
    "report",
    "report_comparison",
    "report_family",
]


class Written(NamedTuple):
    """Hold the paths of a report's files: the page, which embeds the pictures, and the pictures.

    >>> Written(Path("report/report.html"), [Path("report/error.png")]).page.name
    'report.html'
    """

    page: Path
    pictures: list[Path]


def report(
    summary: Summary,
    folder: Path,
    console: Console,
    verbose: bool = False,
    details: Details | None = None,
    menu: Menu | None = None,
) -> Written:
    """Print the report of a run, and write its pictures and `report.html` into `folder`.

    Args:
        verbose: also print the layers one by one, the splits and the versions.
        details: curves, traces and samples, which pictures and page show beside the summary.
        menu: limits of what the search had on offer, where layers at one of them are to be named.
    Raises:
        ArtefactError: a file cannot be written.

    >>> from reports.example import example_summary
    >>> import io
    >>> written = report(example_summary(blocks=1), Path("report"), Console(file=io.StringIO()))
    >>> written.page.name, [path.name for path in written.pictures]
    ('report.html', ['allocation.png', 'error.png'])
    """
    # Imported here, as matplotlib takes 25 MiB, which are not there to spare while a model is compressed.
    from reports.pictures import write_figures

    render(summary, console, verbose, menu)
    pictures = write_figures(summary, folder, details)
    page = run_page(summary, details or Details(), pictures, menu)
    return Written(write_page(page, folder / PAGE), pictures)


def report_family(family: Family, folder: Path, console: Console) -> Written:
    """Print the table of a family of budgets, and write its curve and `report.html` into `folder`.

    Raises:
        ArtefactError: a file cannot be written.

    >>> from reports.example import example_family
    >>> import io
    >>> report_family(example_family(), Path("family"), Console(file=io.StringIO())).pictures[0].name
    'frontier.png'
    """
    from reports.frontier import frontier_table, write_frontier

    sign = "+-" if console.options.ascii_only else "±"
    console.print(Padding(frontier_table(family, sign), (0, 0, 1, 0)))
    picture = write_frontier(family, folder)
    return Written(write_page(family_page(family, picture), folder / PAGE), [picture])


def report_comparison(
    summaries: Sequence[Summary], labels: Sequence[str], losses: Sequence[tuple[WindowLosses, ...]], folder: Path
) -> Written:
    """Write the pictures of several runs and `comparison.html` into `folder`; `comparison` makes the terminal tables.

    Args:
        labels: names of the runs.
        losses: losses of the windows of each run, empty where they are not known.
    Raises:
        ArtefactError: a file cannot be written.

    >>> from reports.example import example_summary
    >>> runs = [example_summary(blocks=1, dense=(), compressed=())] * 2
    >>> report_comparison(runs, ["a", "b"], losses=[(), ()], folder=Path("both")).page.name
    'comparison.html'
    """
    from reports.comparison_figure import write_comparison_figures

    pictures = write_comparison_figures(summaries, labels, folder)
    page = comparison_page(summaries, labels, losses, pictures)
    return Written(write_page(page, folder / COMPARISON_PAGE), pictures)
