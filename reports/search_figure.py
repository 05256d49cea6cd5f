"""Draw a search on the true loss: predicted against measured losses, and measured losses over the tokens spent."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from globalopt.values.error_unit import ErrorUnit
from globalopt.values.results import Summary
from globalopt.values.search_record import Evaluation, Search
from reports import formats
from reports.figures import COLOURS, error_unit, in_corner, new_figure, not_drawn, plain, round_ticks
from reports.surrogate import FEWEST, Surrogate, chosen, whole

ROOM = 3.0  # the diagonal is drawn if the axes then span at most so many times the range of the points
RARE = 0.005  # share of partial evaluations at either end that may lie off the scale
MANY = 300  # dots, above which they shrink

_WHOLE, _PART, _FIT, _CHOSEN = COLOURS[0], "0.55", COLOURS[1], COLOURS[3]


def search_figure(summary: Summary, search: Search) -> Figure:
    """Draw predicted against measured loss of evaluations on the whole text, and the loss of all over tokens spent.

    >>> from reports.example import example_search, example_searched_summary
    >>> search = example_search()
    >>> len(search_figure(example_searched_summary(search), search).axes)
    2
    """
    figure = new_figure(summary, "Candidates of the search: predicted and measured loss", 5.2)
    left, right = figure.subplots(1, 2, width_ratios=[5.0, 6.6])
    agreement(left, summary, search)
    progress(right, summary, search)
    return figure


def agreement(axes: Axes, summary: Summary, search: Search) -> None:
    """Draw predicted (x) against measured (y) loss of evaluations on the whole text, with the least-squares line.

    Where both are in one unit, both log axes span the same range and the diagonal is drawn; where that would squeeze
    the points into a corner, a line of text gives their ratio instead.

    >>> from reports.example import example_search, example_searched_summary
    >>> axes, search = Figure().subplots(), example_search()
    >>> agreement(axes, example_searched_summary(search), search)
    >>> axes.get_xlabel()
    'predicted, nats per token'
    """
    found = whole(summary, search)
    shown = [e for e in found if e.predicted > 0 and e.loss > 0]
    choice = chosen(summary, search)
    surrogate = Surrogate.of(found)
    ratio = ""
    plain(axes)
    if shown:
        axes.set(xscale="log", yscale="log")
        predicted, measured = [e.predicted for e in shown], [e.loss for e in shown]
        axes.scatter(predicted, measured, s=_size(shown), c=_WHOLE, alpha=0.7, linewidths=0, label="on the whole text")
        across, up = (min(predicted), max(predicted)), (min(measured), max(measured))
        if summary.budget_unit == ErrorUnit.NATS:
            both = min(across[0], up[0]), max(across[1], up[1])
            if math.log(both[1] / both[0]) <= ROOM * max(math.log(across[1] / across[0]), math.log(up[1] / up[0])):
                across = up = both
                ends = _padded(both)
                axes.plot(ends, ends, color="0.5", linewidth=1, linestyle="--", label="equal", zorder=0)
            else:
                ratios = [e.loss / e.predicted for e in shown]
                ratio = f"measured / predicted: {formats.between(min(ratios), max(ratios))}"
        if surrogate.slope is not None and surrogate.intercept is not None:
            x = np.geomspace(min(predicted), max(predicted), 2)
            y = np.exp(surrogate.intercept) * x**surrogate.slope
            axes.plot(x, y, color=_FIT, linewidth=1.5, label=f"fit, slope {surrogate.slope:.2f}")
        if choice in shown:
            _mark(axes, choice.predicted, choice.loss)
        axes.set(xlim=_padded(across), ylim=_padded(up))
        round_ticks(axes.xaxis, across)
        round_ticks(axes.yaxis, up)
        _legend(axes)
    axes.set_box_aspect(1)
    few = "" if surrogate.count >= FEWEST else f"too few for a correlation or a line: {surrogate.count}"
    in_corner(axes, ratio, few, not_drawn({"at zero": len(found) - len(shown)}))
    rank = "" if surrogate.correlation is None else f", rank correlation {surrogate.correlation:.2f}"
    axes.set_title(f"measured over predicted loss{rank}", fontsize=10, loc="left")
    axes.set_xlabel(f"predicted, {error_unit(summary.budget_unit)}", fontsize=8)
    axes.set_ylabel("measured: KL to dense, nats per token", fontsize=8)


def progress(axes: Axes, summary: Summary, search: Search) -> None:
    """Draw the loss (log axis) of every evaluation over the tokens spent by then, and the least so far.

    The least is over evaluations on the whole text. Of many evaluations on parts, the share `RARE` of the highest and
    of the lowest does not widen the scale; a line counts those outside.

    >>> from reports.example import example_search, example_searched_summary
    >>> axes, search = Figure().subplots(), example_search()
    >>> progress(axes, example_searched_summary(search), search)
    >>> axes.get_yscale()
    'log'
    """
    found = whole(summary, search)
    solid = [e for e in found if e.loss > 0]
    asked = [e for e in search.evaluations if not e.whole]
    faint = [e for e in asked if e.loss > 0]
    plain(axes)
    if faint:
        tokens, losses = [e.tokens for e in faint], [e.loss for e in faint]
        label = "on part of the text"
        axes.scatter(tokens, losses, s=_size(faint), c=_PART, alpha=0.35, linewidths=0, label=label, zorder=1)
    if solid:
        tokens, losses = [e.tokens for e in solid], [e.loss for e in solid]
        axes.scatter(tokens, losses, s=_size(solid), c=_WHOLE, linewidths=0, label="on the whole text", zorder=2)
        least = np.minimum.accumulate(losses)
        steps = {"where": "post", "color": "black", "linewidth": 1.3, "label": "least on the whole text", "zorder": 3}
        axes.step([*tokens, max(search.tokens, tokens[-1])], [*least, least[-1]], **steps)
        choice = chosen(summary, search)
        if choice in solid:
            _mark(axes, choice.tokens, choice.loss)
    outside = 0
    if every := [e.loss for e in (*faint, *solid)]:
        ends = min(every), max(every)
        if len(faint) > MANY:
            kept = [*(e.loss for e in solid), *np.quantile([e.loss for e in faint], [RARE, 1 - RARE])]
            ends = min(kept), max(kept)
        low, high = _padded(ends)
        outside = sum(not low <= loss <= high for loss in every)
        axes.set(yscale="log", ylim=(low, high))
        round_ticks(axes.yaxis, ends)
        _legend(axes)
    axes.set_xlim(0, 1.02 * max(search.tokens, 1))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    zeros = len(found) - len(solid) + len(asked) - len(faint)
    in_corner(axes, not_drawn({"at zero": zeros, "off the scale": outside}))
    axes.set_title("measured loss over the tokens spent", fontsize=10, loc="left")
    axes.set_xlabel(f"forward tokens spent (limit {formats.count(search.limit)})", fontsize=8)
    axes.set_ylabel("KL to dense, nats per token", fontsize=8)


def _mark(axes: Axes, x: float, y: float) -> None:
    """Mark the chosen allocation."""
    star = {"marker": "*", "s": 150, "c": _CHOSEN, "edgecolors": "black", "linewidths": 0.8, "zorder": 4}
    axes.scatter([x], [y], label="chosen", **star)


def _legend(axes: Axes) -> None:
    """Put the legend below the axes, where it hides no point."""
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.11), "ncols": 4}
    axes.legend(fontsize=7, frameon=False, columnspacing=1.5, **below)


def _size(dots: Sequence[Evaluation]) -> float:
    """Choose the size of points by their number."""
    return 16.0 if len(dots) <= MANY else 6.0


def _padded(ends: tuple[float, float]) -> tuple[float, float]:
    """Widen the ends of a log axis by 6 % of its length at both ends, at least by 1 % of the value."""
    low, high = ends
    room = max((high / low) ** 0.06, 1.01)
    return low / room, high * room
