"""Draw the solver's objective over its iterations, for every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from globalopt.values.decomposition import Trace
from globalopt.values.results import Summary
from reports.curves_figure import label
from reports.figures import COLOURS, MARKERS, in_corner, new_figure, not_drawn, plain
from reports.groups import typical

MANY = 100  # layers, above which their lines are thinner


def convergence_figure(summary: Summary, traces: Mapping[str, Trace]) -> Figure:
    """Draw the objective relative to that of keeping nothing (log axis) over iterations: a few layers by name.

    All other layers are grey. A layer's objective is the damped one that its solver minimises. The last point of a line
    is that of the returned decomposition.

    Args:
        traces: by layer name.

    >>> from reports.example import example_details, example_summary
    >>> summary = example_summary()
    >>> convergence_figure(summary, example_details(summary).traces).axes[0].get_xlabel()
    'iterations of 3basil'
    """
    figure = new_figure(summary, "How the objective of the solver fell, layer by layer", 5.6)
    axes = figure.subplots()
    plain(axes)
    lines = {}
    for layer in summary.layers:
        trace = traces.get(layer.name, ())
        if trace and trace[0][1] > 0:
            lines[layer.name] = [(step, objective / trace[0][1]) for step, objective in trace if objective > 0]
    width, alpha = (0.8, 0.5) if len(lines) <= MANY else (0.5, 0.25)
    for points in lines.values():
        steps, shares = zip(*points, strict=True)
        axes.plot(steps, shares, color="0.45", linewidth=width, alpha=alpha)
    drawn = [layer for layer in summary.layers if layer.name in lines]
    for n, layer in enumerate(typical(drawn)):
        points = lines[layer.name]
        style: dict[str, Any] = {"color": COLOURS[n], "marker": MARKERS[n], "markersize": 5 if len(points) <= 20 else 3}
        steps, shares = zip(*points, strict=True)
        axes.plot(steps, shares, linewidth=1.8, label=label(layer), **style)
    axes.set_yscale("log")
    axes.set_xlabel(f"iterations of {summary.solver}", fontsize=8)
    axes.set_ylabel("objective / objective of keeping nothing", fontsize=8)
    in_corner(axes, not_drawn({"without iterations": len(summary.layers) - len(lines)}))
    axes.set_title(f"{len(lines)} layers, a few of them by name", fontsize=10, loc="left")
    figure.legend(loc="outside lower left", fontsize=8, frameon=False)
    return figure
