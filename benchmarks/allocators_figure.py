"""KL and perplexity of every contender of `allocation.py` against the tokens it read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from reports.figures import COLOURS, MARKERS, named, plain, round_ticks, titled_figure

FAR = 2.0
"""A contender that loses more than this many times the best uniform one would press all others together."""


@dataclass(frozen=True)
class Point:
    """A contender at a budget and a limit of tokens.

    Args:
        method: without its limit; points of one method are joined.
        tokens: forward tokens of analysis and search.
        kl: by seed, nats per token.
        perplexity: by seed.
        ratio: of KL to the best uniform contender.
    """

    budget: float
    method: str
    tokens: float
    kl: tuple[float, ...]
    perplexity: tuple[float, ...]
    ratio: float | None


def allocators_figure(points: Sequence[Point], model: str, title: str) -> Figure:
    """A column per budget: means over seeds, with bars from the least to the most; far ones are named, not drawn."""
    budgets = list(dict.fromkeys(point.budget for point in points))
    methods = list(dict.fromkeys(point.method for point in points))
    figure = titled_figure(
        "Loss of every allocator over the tokens it read", f"{named(model)}, {title}", 7.3, 3 + 3.6 * len(budgets)
    )
    columns = figure.subplots(2, len(budgets), squeeze=False, sharex=True).T
    for budget, (kl, perplexity) in zip(budgets, columns, strict=True):
        here = [point for point in points if point.budget == budget]
        near = [point for point in here if point.ratio is None or point.ratio <= FAR]
        _panel(kl, [(point, point.kl) for point in near], methods)
        _panel(perplexity, [(point, point.perplexity) for point in near], methods)
        kl.set_title(f"kept {budget:g}", fontsize=10, loc="left")
        # Not in a corner: the lower ones are where the good contenders are.
        far = [f"{point.method} at {fmean(point.kl):.2g}" for point in here if point not in near]
        kl.set_title("\n".join(["far above:", *far]) if far else "", fontsize=7, loc="right", color="0.4")
        perplexity.set_xlabel("forward tokens of analysis and search", fontsize=8)
    columns[0][0].set_ylabel("KL to the dense model, nats per token", fontsize=8)
    columns[0][1].set_ylabel("perplexity", fontsize=8)
    handles = {
        label: handle for kl, _ in columns for handle, label in zip(*kl.get_legend_handles_labels(), strict=True)
    }
    shown = [method for method in methods if method in handles]
    figure.legend([handles[m] for m in shown], shown, loc="outside right center", fontsize=7, frameon=False)
    return figure


def _panel(axes: Axes, points: Sequence[tuple[Point, tuple[float, ...]]], methods: Sequence[str]) -> None:
    for n, method in enumerate(methods):
        # Rounds of the colours with ever other markers, so that no two methods look alike.
        style = {"color": COLOURS[n % len(COLOURS)], "marker": MARKERS[(n // len(COLOURS) + n) % len(MARKERS)]}
        line = sorted((point.tokens, values) for point, values in points if point.method == method)
        if line:
            means = [fmean(values) for _, values in line]
            below = [mean - min(values) for mean, (_, values) in zip(means, line, strict=True)]
            above = [max(values) - mean for mean, (_, values) in zip(means, line, strict=True)]
            bars = {"markersize": 6, "linewidth": 0.8, "elinewidth": 0.8, "capsize": 2, "alpha": 0.85}
            axes.errorbar([x for x, _ in line], means, yerr=[below, above], label=method, **style, **bars)
    axes.set(xscale="log", yscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_locator(NullLocator())
    drawn = [value for _, values in points for value in values]
    round_ticks(axes.yaxis, (min(drawn), max(drawn)))
    plain(axes)
