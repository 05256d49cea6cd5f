"""Write the pictures of a run."""

from __future__ import annotations

from pathlib import Path

from globalopt.values.results import Details, Summary
from reports.convergence_figure import convergence_figure
from reports.curves_figure import curves_figure
from reports.figures import save
from reports.heatmaps import allocation_figure, error_figure
from reports.matching_figure import matching_figure
from reports.search_figure import search_figure


def write_figures(summary: Summary, folder: Path, details: Details | None = None) -> list[Path]:
    """Write the pictures of a run into `folder`, as PNG, and as SVG beside it.

    They are `allocation.png` and `error.png`, `search.png` of a search, `matching.png` of matched blocks, and
    `curves.png` and `convergence.png` where the `details` have curves and traces.

    Returns:
        Paths of the PNGs.
    Raises:
        ArtefactError: a file cannot be written.

    >>> from reports.example import example_summary
    >>> [path.name for path in write_figures(example_summary(blocks=1), Path("."))]
    ['allocation.png', 'error.png']
    """
    details = details or Details()
    figures = {"allocation.png": allocation_figure(summary), "error.png": error_figure(summary)}
    if any(layer.name in details.curves for layer in summary.layers):
        figures["curves.png"] = curves_figure(summary, details.curves)
    if summary.search is not None:
        figures["search.png"] = search_figure(summary, summary.search)
    if any(layer.name in details.traces for layer in summary.layers):
        figures["convergence.png"] = convergence_figure(summary, details.traces)
    if any(match.block is not None for match in summary.matching):
        figures["matching.png"] = matching_figure(summary)
    return [save(figure, folder / name) for name, figure in figures.items()]
