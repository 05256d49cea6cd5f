"""Draw the singular values and saliencies of layers, with the rank and the number of nonzeros that they keep."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from globalopt.values.curves import Curve, LayerCurves
from globalopt.values.layer_results import LayerResult
from globalopt.values.results import Summary
from reports import formats
from reports.figures import COLOURS, MARKERS, new_figure, plain
from reports.groups import typical


def curves_figure(summary: Summary, curves: Mapping[str, LayerCurves]) -> Figure:
    """Draw singular values (left) and saliencies (right) in descending order, on log axes, of a few `typical` layers.

    A curve is bold up to the rank, or to the number of nonzeros, of its layer. The kept entries need not be the largest
    ones here, as solvers use the whole Gram; the mark shows how far down the curve the budget reaches.

    Args:
        curves: by layer name.

    >>> from reports.example import example_details, example_summary
    >>> summary = example_summary()
    >>> left, right = curves_figure(summary, example_details(summary).curves).axes
    >>> left.get_xlabel()
    'direction, the largest first; marked: the rank of L'
    """
    figure = new_figure(summary, "Singular values and saliencies, up to what is kept of them", 5.6)
    left, right = figure.subplots(1, 2)
    shown = typical([layer for layer in summary.layers if layer.name in curves])
    lows: dict[Axes, list[float]] = {left: [], right: []}
    for n, layer in enumerate(shown):
        found = curves[layer.name]
        lows[left] += _descent(left, found.singular, layer.rank, n, label(layer))
        lows[right] += _descent(right, found.saliency, layer.nnz, n)
    for axes, low in lows.items():
        if low:
            axes.set(xscale="log", yscale="log")
            # The last values are near zero, and would leave no room for the others.
            axes.set_ylim(bottom=min(low) / 2)
        plain(axes)
        axes.set_ylabel("root mean square of the output", fontsize=8)
    left.set_title(r"singular values of $W D$, $D$ the root mean squares of the inputs", fontsize=10, loc="left")
    left.set_xlabel("direction, the largest first; marked: the rank of L", fontsize=8)
    right.set_title(r"saliencies $|W_{ij}|\, d_j$", fontsize=10, loc="left")
    right.set_xlabel("weight, the largest first; marked: the nonzeros of S", fontsize=8)
    figure.legend(loc="outside lower left", fontsize=8, frameon=False)
    return figure


def label(layer: LayerResult) -> str:
    """Describe a layer in a legend: its block and kind, its shape, and its target.

    >>> from reports.example import example_layers
    >>> label(example_layers()[2])
    'block 0 v_proj, 128 x 256: keeps 1.000, rank 0, 32.8k nonzeros'
    """
    return (
        f"block {layer.block} {layer.kind}, {layer.d_out} x {layer.d_in}: keeps {layer.kept:.3f}, "
        f"rank {layer.rank}, {formats.compact(layer.nnz)} nonzeros"
    )


def _descent(axes: Axes, curve: Curve, kept: int, n: int, name: str | None = None) -> list[float]:
    """Draw one curve, bold up to the place `kept`, which is marked; zeros cannot be drawn on log axes.

    Returns:
        Heights that the axes must include: that of the mark, and the one that nine tenths of the values exceed.
    """
    places, values = np.array(curve.places, dtype=float), np.array(curve.values)
    places, values = places[values > 0], values[values > 0]
    bold = {"color": COLOURS[n], "marker": MARKERS[n], "markersize": 7, "markeredgecolor": "white", "linewidth": 2.4}
    if not len(places):
        axes.plot([], [], label=name, **bold)
        return []

    def height(place: float) -> float:
        # Between two places the logarithms are nearly straight.
        return float(np.exp(np.interp(np.log(place), np.log(places), np.log(values))))

    axes.plot(places, values, color=COLOURS[n], linewidth=1.0, alpha=0.6)
    sight = [height(max(1.0, 0.9 * places[-1]))]
    xs, ys = [], []
    if kept:
        end = min(float(kept), places[-1])
        inside = places < end
        xs, ys = [*places[inside], end], [*values[inside], height(end)]
        sight.append(ys[-1])
    axes.plot(xs, ys, label=name, markevery=[-1], **bold)
    return sight
