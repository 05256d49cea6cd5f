"""Draw several runs: KL to the dense model and perplexity of each, and the allocations of their layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from globalopt.values.layer_results import LayerResult
from globalopt.values.results import Summary
from reports.bits import few_bits
from reports.figures import COLOURS, MARKERS, in_corner, named, not_drawn, plain, round_ticks, save, titled_figure
from reports.groups import Grid
from reports.heatmaps import BITS_PER_WEIGHT, bits_heatmap, bits_per_weight, colours, heatmap, panel_size

DRAWN = 8
"""Most runs whose layers are drawn, as a picture of more would be too long to read."""

PANELS: Sequence[tuple[str, Callable[[LayerResult], float], bool]] = (
    ("kept fraction", lambda layer: layer.kept, False),
    ("rank share: low-rank / kept parameters", lambda layer: layer.rank_share, False),
    ("relative error", lambda layer: layer.relative, True),
)
"""Title, value, and whether its colours are logarithmic."""


def write_comparison_figures(summaries: Sequence[Summary], labels: Sequence[str], folder: Path) -> list[Path]:
    """Write `allocations.png` and, where a run was evaluated, `quality.png` into `folder`, each as SVG too.

    Raises:
        ArtefactError: a file cannot be written.

    >>> from reports.example import example_summary
    >>> runs = [example_summary(blocks=1, compressed=(), dense=())] * 2
    >>> write_comparison_figures(runs, ["a", "b"], Path("."))
    [PosixPath('allocations.png')]
    """
    figures = {"allocations.png": allocations_figure(summaries, labels)}
    if any(summary.compressed for summary in summaries):
        figures["quality.png"] = quality_figure(summaries, labels)
    return [save(figure, folder / name) for name, figure in figures.items()]


def quality_figure(summaries: Sequence[Summary], labels: Sequence[str]) -> Figure:
    """Draw KL to the dense model and perplexity of every run and split, with standard errors, on log axes.

    Short lines mark the perplexities of the dense model.

    >>> from reports.example import example_summary
    >>> left, right = quality_figure([example_summary(), example_summary()], ["a", "b"]).axes
    >>> [label.get_text() for label in left.get_yticklabels()]
    ['a', 'b']
    """
    figure = titled_figure("Loss of every run", _model(summaries), max(2.8, 1.9 + 0.36 * len(summaries)))
    left, right = figure.subplots(1, 2, sharey=True)
    splits = list(dict.fromkeys(metrics.split for summary in summaries for metrics in summary.compressed))
    drawn: list[float] = []
    for n, split in enumerate(splits):
        # Splits of one run lie below each other, so that none hides another.
        shift = 0.3 * (n / (len(splits) - 1) - 0.5) if len(splits) > 1 else 0.0
        rows = [
            (i + shift, dense, compressed)
            for i, summary in enumerate(summaries)
            for dense, compressed in zip(summary.dense, summary.compressed, strict=True)
            if compressed.split == split
        ]
        kl = [(y, of.kl, of.kl_stderr or 0.0) for y, _, of in rows if of.kl is not None and of.kl > 0]
        drawn += [x for _, x, _ in kl]
        _points(left, kl, n, split)
        # The delta method: the standard error of exp(nll).
        _points(right, [(y, of.perplexity, of.perplexity * of.nll_stderr) for y, _, of in rows], n, split)
        ends = {"ymin": [y - 0.13 for y, *_ in rows], "ymax": [y + 0.13 for y, *_ in rows]}
        right.vlines([dense.perplexity for _, dense, _ in rows], **ends, color=_colour(n), linewidth=1)
    left.set_yticks(range(len(summaries)), list(labels), fontsize=7, parse_math=False)
    left.set_ylim(len(summaries) - 0.5, -0.5)
    perplexities = [of.perplexity for summary in summaries for of in (*summary.dense, *summary.compressed)]
    for axes, values in ((left, drawn), (right, perplexities)):
        if values:
            axes.set_xscale("log")
            round_ticks(axes.xaxis, (min(values), max(values)))
        else:
            axes.xaxis.set_major_locator(NullLocator())
    titles = ("KL to the dense model, nats per token", "perplexity; line: of the dense model")
    for axes, title in zip((left, right), titles, strict=True):
        plain(axes)
        axes.set_title(title, fontsize=10, loc="left")
    known = sum(metrics.kl is not None for summary in summaries for metrics in summary.compressed)
    in_corner(left, not_drawn({"at zero": known - len(drawn)}))
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower left", ncols=4, fontsize=8, frameon=False)
    return figure


def allocations_figure(summaries: Sequence[Summary], labels: Sequence[str]) -> Figure:
    """Draw kept fraction, rank share and relative error, block by kind, in a row for each of the first `DRAWN` runs.

    A column has the same colours in every row. Where a run stores layers in fewer than 16 bits there is a column of the
    bits per weight.

    >>> from reports.example import example_summary
    >>> figure = allocations_figure([example_summary(), example_summary()], ["a", "b"])
    >>> sum(bool(axes.images) for axes in figure.axes)
    6
    """
    shown = summaries[:DRAWN]
    runs = (
        _model(summaries) if len(shown) == len(summaries) else f"{_model(summaries)}, {DRAWN} of {len(summaries)} runs"
    )
    grids = [Grid.of(summary.layers) for summary in shown]
    sizes = [panel_size(grid) for grid in grids]
    heights = [height + 0.3 for _, height in sizes]
    few = any(few_bits(summary.layers) for summary in shown)
    columns = len(PANELS) + few
    width = columns * max(width for width, _ in sizes)
    figure = titled_figure("What every layer keeps and loses, run by run", runs, sum(heights) + 0.3, width)
    panels = figure.subplots(len(shown), columns, squeeze=False, height_ratios=heights)
    norms = [colours(np.concatenate([grid.values(value).ravel() for grid in grids]), log) for _, value, log in PANELS]
    for row, grid, label in zip(panels, grids, labels, strict=False):
        for axes, (name, value, log), norm in zip(row, PANELS, norms, strict=False):
            heatmap(axes, grid, value, name, log=log, norm=norm)
        if few:
            bits_heatmap(row[-1], grid, bits_per_weight, BITS_PER_WEIGHT, decimals=1)
        # Above the first panel, where a long one has the width of all.
        row[0].set_title(f"{label}\n{PANELS[0][0]}", fontsize=10, loc="left", parse_math=False)
    return figure


def _model(summaries: Sequence[Summary]) -> str:
    """Name the model of the runs, or count the models."""
    models = dict.fromkeys(summary.model for summary in summaries)
    return named(next(iter(models))) if len(models) == 1 else f"{len(models)} models"


def _points(axes: Axes, rows: Sequence[tuple[float, float, float]], n: int, label: str) -> None:
    """Draw the points `(y, x, standard error)` of the n-th split."""
    ys, xs, errors = ([row[i] for row in rows] for i in range(3))
    style = {"markersize": 5, "elinewidth": 1, "capsize": 2, "linestyle": "none", "marker": MARKERS[n % len(MARKERS)]}
    axes.errorbar(xs, ys, xerr=errors, color=_colour(n), label=label, **style)


def _colour(n: int) -> str:
    """Return the colour of the n-th split."""
    return COLOURS[n % len(COLOURS)]
