"""Draw an allocation and its errors: heatmaps of block by kind, and predicted against actual errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter
from numpy.typing import NDArray

from globalopt.values.decomposition import Status
from globalopt.values.layer_results import LayerResult
from globalopt.values.results import Summary
from globalopt.values.storage import BITS, PLAIN, Storage
from reports import formats
from reports.bits import few_bits
from reports.figures import (
    COLOURS,
    MARKERS,
    OUTPUT_ERROR,
    WIDTH,
    error_unit,
    in_corner,
    new_figure,
    not_drawn,
    plain,
    round_ticks,
)
from reports.groups import Grid
from reports.shaded_grid import span
from reports.table_style import unit_name

LEAST_BITS = 2  # bits of the lowest colour; a layer that is dropped has it too
WRITTEN = 16  # most blocks, and most kinds, whose values are written into their cells
BITS_PER_WEIGHT = "bits per weight, scales and index counted"
LABELLED = 24  # most blocks that are all named on an axis


def allocation_figure(summary: Summary) -> Figure:
    """Draw heatmaps, block by kind: kept fraction, rank, rank share, cost, density, and relative error on a log scale.

    Where a layer is stored in fewer than 16 bits there is a third row: the bits of the values of `S`, those of the
    factors, and the bits of the whole layer per weight, with scales and index.

    >>> from reports.example import example_summary
    >>> [axes.get_title(loc="left") for axes in allocation_figure(example_summary()).axes][:2]
    ['kept fraction of the parameters', 'rank of L']
    """
    grid = Grid.of(summary.layers)
    width, height = panel_size(grid)
    few = few_bits(summary.layers)
    rows = 3 if few else 2
    figure = new_figure(summary, "What every layer keeps and loses", rows * height + 0.3, 3 * width)
    axes = figure.subplots(rows, 3)
    unit = unit_name(summary.accounting)
    relative = rf"relative error: {OUTPUT_ERROR} / tr$(WGW^\mathsf{{T}})$"
    heatmap(axes[0, 0], grid, lambda layer: layer.kept, f"kept fraction of the {unit}")
    heatmap(axes[0, 1], grid, lambda layer: layer.rank, "rank of L", whole=True)
    heatmap(axes[0, 2], grid, lambda layer: layer.rank_share, "rank share: low-rank / kept parameters")
    heatmap(axes[1, 0], grid, lambda layer: layer.cost, f"kept {unit}", whole=True)
    heatmap(axes[1, 1], grid, lambda layer: layer.density, "density: nonzeros of S / weights")
    heatmap(axes[1, 2], grid, lambda layer: layer.relative, relative, log=True)
    if few:
        bits_heatmap(axes[2, 0], grid, _value_bits, "bits of a value of S")
        bits_heatmap(axes[2, 1], grid, _factor_bits, "bits of an entry of U or V; hatched: rank 0")
        bits_heatmap(axes[2, 2], grid, bits_per_weight, BITS_PER_WEIGHT, decimals=1)
    return figure


def bits_heatmap(
    axes: Axes, grid: Grid[LayerResult], value: Callable[[LayerResult], float], title: str, decimals: int = 0
) -> None:
    """Draw bits of every layer as a heatmap; a layer that stores no such numbers is hatched.

    Args:
        value: computes the bits; NaN where there are none.
        decimals: written into the cells.

    >>> from reports.example import example_layers
    >>> axes = Figure().subplots()
    >>> layers = example_layers(storages=("8", "4"))
    >>> bits_heatmap(axes, Grid.of(layers), lambda layer: float(layer.storage), "bits of a value of S")
    >>> axes.texts[0].get_text()
    '8'
    """
    # On a log scale, as every bit less halves the levels: 4 and 5 bits would look the same beside 16.
    norm = LogNorm(LEAST_BITS, PLAIN.values, clip=True)
    heatmap(axes, grid, value, title, norm=norm, text=lambda bits: f"{bits:.{decimals}f}", ticks=(LEAST_BITS, *BITS))


def _value_bits(layer: LayerResult) -> float:
    """Return the bits of the values of `S`; NaN where it is empty."""
    return Storage.parse(layer.storage).values if layer.nnz else math.nan


def _factor_bits(layer: LayerResult) -> float:
    """Return the bits of the entries of the factors; NaN where there are none."""
    return Storage.parse(layer.storage).factors if layer.rank else math.nan


def bits_per_weight(layer: LayerResult) -> float:
    """Compute the bits of a packed layer, scales and index among them, per weight.

    >>> from reports.example import example_layers
    >>> bits_per_weight(example_layers()[2])
    16.0
    """
    return 8 * layer.bytes / (layer.d_out * layer.d_in)


def error_figure(summary: Summary) -> Figure:
    """Draw predicted against actual error of every layer, and a heatmap of the actual error, in the summary's unit.

    Where the predicted loss of the budget is in another unit than the errors, layers have no prediction, and only the
    heatmap is drawn.

    >>> from reports.example import example_summary
    >>> error_figure(example_summary()).axes[0].get_xlabel()
    'predicted error, nats per token'
    """
    grid = Grid.of(summary.layers)
    _, height = panel_size(grid)
    if any(layer.predicted is not None for layer in summary.layers):
        figure = new_figure(summary, "Predicted and actual error of every layer", max(height, 5.0))
        left, right = figure.subplots(1, 2)
        scatter(left, summary, grid.kinds)
    else:
        figure = new_figure(summary, "Actual error of every layer", height + 0.3)
        right = figure.subplots()
    heatmap(right, grid, lambda layer: layer.actual, _error_label("actual", summary), log=True)
    return figure


def heatmap(
    axes: Axes,
    grid: Grid[LayerResult],
    value: Callable[[LayerResult], float],
    title: str,
    log: bool = False,
    whole: bool = False,
    norm: Normalize | None = None,
    text: Callable[[float], str] | None = None,
    ticks: Sequence[float] = (),
) -> None:
    """Draw `value` of every layer as a heatmap, blocks down and kinds across; a place without a layer is hatched.

    Args:
        title: name of the value, with its unit.
        log: colour by the logarithm; zeros have the lowest colour.
        whole: the values are counts, coloured from zero on.
        norm: colour scale shared by several heatmaps; without, from the least to the largest value of this one.
        text: formats a value for its cell; without, by `log` and `whole`.
        ticks: values on the colour bar; empty: round ones.

    >>> from reports.example import example_layers
    >>> axes = Figure().subplots()
    >>> heatmap(axes, Grid.of(example_layers()), lambda layer: layer.rank, "rank of L", whole=True)
    >>> axes.images[0].get_array().shape
    (2, 7)
    """
    values = grid.values(value)
    norm = norm or colours(values, log, whole)
    axes.patch.set(facecolor="0.9", edgecolor="0.6", hatch="////")
    image = axes.imshow(np.ma.masked_invalid(values), norm=norm, cmap="viridis", aspect="auto", interpolation="none")
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02)
    if whole:
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda n, _: formats.prefixed(n)))
    if ticks:
        bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks], minor=False)
        bar.ax.minorticks_off()
    bar.ax.tick_params(which="both", labelsize=7)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xticks(range(len(grid.kinds)), grid.kinds, rotation=40 if len(grid.kinds) <= WRITTEN else 90, fontsize=7)
    if len(grid.kinds) <= WRITTEN:
        for tick in axes.get_xticklabels():
            tick.set(ha="right", rotation_mode="anchor")
    every = math.ceil(len(grid.blocks) / LABELLED)
    axes.set_yticks(range(0, len(grid.blocks), every), [str(b) for b in grid.blocks[::every]], fontsize=7)
    axes.set_ylabel("block", fontsize=8)
    axes.tick_params(length=2)
    if len(grid.blocks) <= LABELLED:
        axes.xaxis.set_minor_locator(FixedLocator([j - 0.5 for j in range(len(grid.kinds) + 1)]))
        axes.yaxis.set_minor_locator(FixedLocator([i - 0.5 for i in range(len(grid.blocks) + 1)]))
        axes.grid(which="minor", color="white", linewidth=1)
        axes.tick_params(which="minor", length=0)
    if len(grid.blocks) <= WRITTEN and len(grid.kinds) <= WRITTEN:
        written = text or (formats.prefixed if whole else _short if log else _fraction)
        for (i, j), cell in np.ndenumerate(values):
            if not math.isnan(cell):
                dark = float(norm(cell)) < 0.6
                shown = {"ha": "center", "va": "center", "fontsize": 7, "color": "white" if dark else "black"}
                axes.text(j, i, written(float(cell)), **shown)


def scatter(axes: Axes, summary: Summary, kinds: Sequence[str]) -> None:
    """Draw predicted (x) against actual (y) error of every layer on log axes, with a colour and marker per kind.

    Layers with an error of zero, or without a prediction, cannot be drawn on log axes; a line counts them. Layers whose
    solver did not converge have a red ring.

    >>> from reports.example import example_summary
    >>> axes = Figure().subplots()
    >>> scatter(axes, example_summary(), ["q_proj", "k_proj"])
    >>> [text.get_text() for text in axes.texts]
    ['not drawn: 1 at zero']
    """
    shown = [(la, la.predicted, la.actual) for la in summary.layers if la.predicted and la.actual]
    for n, kind in enumerate(kinds):
        points = [(predicted, actual) for layer, predicted, actual in shown if layer.kind == kind]
        if points:
            marker = MARKERS[(n // len(COLOURS) + n) % len(MARKERS)]
            colour = COLOURS[n % len(COLOURS)]
            axes.scatter(*zip(*points, strict=True), s=22, c=colour, marker=marker, alpha=0.8, linewidths=0, label=kind)
    ringed = [(predicted, actual) for la, predicted, actual in shown if Status(la.status) is not Status.CONVERGED]
    if ringed:
        rings = {"facecolors": "none", "edgecolors": "red", "linewidths": 1.2, "label": "not converged"}
        axes.scatter(*zip(*ringed, strict=True), s=80, **rings)
    if shown:
        axes.set(xscale="log", yscale="log")
        ends = [end for _, predicted, actual in shown for end in (predicted, actual)]
        low, high = min(ends) / 1.5, max(ends) * 1.5
        axes.plot([low, high], [low, high], color="0.5", linewidth=1, linestyle="--", label="equal", zorder=0)
        axes.set(xlim=(low, high), ylim=(low, high))
        for axis in (axes.xaxis, axes.yaxis):
            round_ticks(axis, (low, high))
        if len(kinds) <= WRITTEN:
            axes.legend(fontsize=7, frameon=False, loc="upper left")
    axes.set_box_aspect(1)
    axes.set_anchor("N")
    plain(axes)
    in_corner(axes, not_drawn({"at zero": len(summary.layers) - len(shown)}))
    axes.set_title("one point per layer", fontsize=10, loc="left")
    axes.set_xlabel(_error_label("predicted", summary), fontsize=8)
    axes.set_ylabel(_error_label("actual", summary), fontsize=8)


def panel_size(grid: Grid[LayerResult]) -> tuple[float, float]:
    """Choose width and height of a heatmap in inches, so that names of kinds fit and rows stay visible.

    >>> from reports.example import example_layers
    >>> panel_size(Grid.of(example_layers()))
    (4.0, 3.0)
    """
    return min(max(WIDTH / 3, 0.45 * len(grid.kinds)), 14.0), min(max(3.0, 1.2 + 0.24 * len(grid.blocks)), 8.0)


def colours(values: NDArray[np.float64], log: bool = False, whole: bool = False) -> Normalize:
    """Make a colour scale from the least to the largest of `values`, logarithmic, or from zero on.

    >>> norm = colours(np.array([3.0, 10.0]), whole=True)
    >>> float(norm.vmin), float(norm.vmax)
    (0.0, 10.0)
    """
    return _log_norm(values) if log else _count_norm(values) if whole else Normalize(*span(values))


def _log_norm(values: NDArray[np.float64]) -> Normalize:
    """Make a logarithmic colour scale over the values above zero."""
    positive = values[values > 0]
    if not positive.size:
        return Normalize(0, 1)
    low, high = float(positive.min()), float(positive.max())
    # Also one value, or equal values, need two different ends.
    return LogNorm(low, high if high > low else 10 * low, clip=True)


def _count_norm(values: NDArray[np.float64]) -> Normalize:
    """Make a colour scale from zero on."""
    return Normalize(0, max(1.0, float(np.nanmax(values))))


def _fraction(value: float) -> str:
    """Format a fraction with two decimals, zero without any."""
    return f"{value:.2f}" if value else "0"


def _short(value: float) -> str:
    """Format a number with two significant digits: 0, 0.12, 3.4e-5."""
    if value == 0:
        return "0"
    if 0.01 <= value < 1000:
        return f"{value:#.2g}".rstrip(".") if value < 100 else f"{value:.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _error_label(which: str, summary: Summary) -> str:
    """Label an axis with an error and its unit."""
    return f"{which} error, {error_unit(summary.error_unit)}"
