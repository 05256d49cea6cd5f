"""KL and perplexity of every contender of `allocation.py`, in a row for each, with the tokens it read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, geometric_mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports import formats
from reports.figures import COLOURS, named, plain, round_ticks, titled_figure

FAR = 2.0
"""A contender that loses more than this many times the best uniform one would press all others together."""

UNIFORM = "uniform"
"""Beginning of the names of the contenders that all others are compared with."""

LEAST = 1e-12
"""Nats per token that a KL of zero counts as, where contenders are ordered."""

ROW = 0.22
"""Inches between two contenders, enough for a line of text."""

KEY = "point: mean over seeds; {}dashed: the best uniform one; at the edge: a mean that is far above\n{}"
BARS = "bar: from the least to the most; "
TOKENS = "after each name: forward tokens of its analysis and its search"


@dataclass(frozen=True)
class Point:
    """A contender at a budget and a limit of tokens.

    Args:
        method: without its limit.
        tokens: forward tokens that it read.
        kl: by seed, nats per token; or their mean alone.
        perplexity: by seed; empty where it is not known.
        ratio: of KL to the best uniform contender.
    """

    budget: float
    method: str
    tokens: float
    kl: tuple[float, ...]
    perplexity: tuple[float, ...]
    ratio: float | None


def allocators_figure(points: Sequence[Point], model: str, title: str, tokens: str = TOKENS) -> Figure:
    """A column per budget, KL above and perplexity, if known, below; the contenders from the least KL to the most.

    A method at several limits of tokens has a row for each.

    Args:
        title: what was measured. tokens: says which tokens stand after the names.
    """
    losses = ("KL to the dense model, nats per token", "perplexity")[: 1 + any(point.perplexity for point in points)]
    rows = _rows(points)
    budgets = list(dict.fromkeys(point.budget for point in points))
    height = 1.7 + len(losses) * (0.5 + ROW * len(rows))
    figure = titled_figure(
        "Loss of every allocator", f"{named(model)}, {title}", height, max(8.0, 3 + 3.4 * len(budgets))
    )
    columns = figure.subplots(len(losses), len(budgets), squeeze=False, sharey=True).T
    for budget, panels in zip(budgets, columns, strict=True):
        here = {n: at[budget] for n, at in enumerate(rows.values()) if budget in at}
        for axes, loss in zip(panels, losses, strict=True):
            _panel(axes, here, {n: point.kl if loss == losses[0] else point.perplexity for n, point in here.items()})
            axes.set_xlabel(loss, fontsize=8)
        panels[0].set_title(f"kept {budget:g}", fontsize=10, loc="left")
    for axes in columns[0]:
        axes.set_yticks(range(len(rows)), list(rows), fontsize=7, parse_math=False)
        axes.set_ylim(len(rows) - 0.4, -0.6)
    several = any(len(point.kl) > 1 for point in points)
    figure.supxlabel(KEY.format(BARS if several else "", tokens), fontsize=7, color="0.4", x=0.01, ha="left")
    return figure


def _rows(points: Sequence[Point]) -> dict[str, dict[float, Point]]:
    """Points by the name of their row and by budget, the row with the least KL first."""
    found: dict[tuple[str, int], dict[float, Point]] = {}
    for budget in dict.fromkeys(point.budget for point in points):
        seen: dict[str, int] = {}
        for point in sorted((point for point in points if point.budget == budget), key=lambda point: point.tokens):
            limit = seen[point.method] = seen.get(point.method, -1) + 1
            found.setdefault((point.method, limit), {})[budget] = point
    least = {b: max(LEAST, min(fmean(p.kl) for p in points if p.budget == b)) for b in {p.budget for p in points}}

    def over_the_best(key: tuple[str, int]) -> float:
        return geometric_mean([max(LEAST, fmean(p.kl)) / least[budget] for budget, p in found[key].items()])

    order = sorted(found, key=over_the_best)
    named_rows: dict[str, dict[float, Point]] = {}
    for method, limit in order:
        at = found[method, limit]
        tokens = round(fmean(point.tokens for point in at.values()))
        named_rows[f"{method}  {formats.compact(tokens)}" if tokens else method] = at
    return named_rows


def _panel(axes: Axes, points: Mapping[int, Point], values: Mapping[int, Sequence[float]]) -> None:
    """Draw one loss of the contenders of a budget, by their rows."""
    near = {n: point for n, point in points.items() if point.ratio is None or point.ratio <= FAR}
    for n, point in near.items():
        mean = fmean(values[n])
        bars = [[mean - min(values[n])], [max(values[n]) - mean]] if len(values[n]) > 1 else None
        colour = COLOURS[-1] if point.method.startswith(UNIFORM) else COLOURS[0]
        style = {"marker": "o", "markersize": 4.5, "elinewidth": 1, "capsize": 2}
        axes.errorbar([mean], [n], xerr=bars, color=colour, **style)
    drawn = [value for n in near for value in values[n]]
    axes.set_xscale("log")
    if drawn:
        round_ticks(axes.xaxis, (min(drawn), max(drawn)))
    uniform = [fmean(values[n]) for n, point in near.items() if point.method.startswith(UNIFORM)]
    if uniform:
        axes.axvline(min(uniform), color="0.6", linewidth=0.8, linestyle="--", zorder=0)
    for n in points.keys() - near.keys():
        told = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "center"}
        axes.text(0.98, n, f"{formats.significant(fmean(values[n]))} →", fontsize=7, color="0.4", **told)
    plain(axes)
