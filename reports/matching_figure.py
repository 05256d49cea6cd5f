"""Draw the losses of every block before and after matching."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from globalopt.values.error_unit import ErrorUnit
from globalopt.values.layer_results import MatchResult
from globalopt.values.results import Summary
from reports import formats
from reports.figures import COLOURS, in_corner, new_figure, not_drawn, plain, round_ticks
from reports.tables import mean_change

BEFORE, AFTER = COLOURS[3], COLOURS[0]

UNITS = {
    "nats": ErrorUnit.NATS.value,
    "sum": "squared error of the block's output per token",
    "token": "squared error relative to the token",
    "both": "mean of both losses, 1 without matching",
}


def matching_figure(summary: Summary) -> Figure:
    """Draw the held-out loss of every matched block before and after (log axis); model matching is a line of text.

    >>> from reports.example import example_matching, example_summary
    >>> matching_figure(example_summary(matching=example_matching())).axes[0].get_ylabel()
    'held-out loss, nats per token'
    """
    blocks = [match for match in summary.matching if match.block is not None]
    figure = new_figure(summary, "Held-out loss of every block before and after matching", 4.9)
    axes = figure.subplots()
    plain(axes)
    shown = [match for match in blocks if match.before > 0 and match.after > 0]
    size = 34 if len(shown) <= 40 else 16
    if shown:
        places = [float(match.block or 0) for match in shown]
        before, after = [match.before for match in shown], [match.after for match in shown]
        axes.vlines(places, after, before, color="0.6", linewidth=1.2, zorder=2)
        hollow = {"facecolors": "white", "edgecolors": BEFORE, "linewidths": 1.5, "marker": "s"}
        axes.scatter(places, before, s=size, label="before", zorder=3, **hollow)
        axes.scatter(places, after, s=size, c=AFTER, label="after", zorder=4)
        axes.set_yscale("log")
        round_ticks(axes.yaxis, (min(after + before), max(after + before)))
        axes.legend(fontsize=8, frameon=False, ncols=2, loc="upper left", bbox_to_anchor=(0, -0.12))
    _title(axes, blocks)
    losses = dict.fromkeys(match.loss for match in blocks)
    axes.set_ylabel(f"held-out loss, {' or '.join(UNITS.get(loss, loss) for loss in losses)}", fontsize=8)
    axes.set_xlabel("block", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    whole = [
        f"whole model, {match.loss}: {formats.significant(match.before)} to {formats.significant(match.after)}"
        for match in summary.matching
        if match.block is None
    ]
    in_corner(axes, *whole, not_drawn({"at zero": len(blocks) - len(shown)}))
    return figure


def _title(axes: Axes, blocks: list[MatchResult]) -> None:
    """Title the axes with the mean change of the loss."""
    mean = mean_change(blocks)
    on_average = f", {mean} on average" if mean is not None else ""
    axes.set_title(f"{len(blocks)} blocks{on_average}", fontsize=10, loc="left")
