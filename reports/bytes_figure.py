"""Draw the loss of compressed models over the bytes that they keep, method by method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from globalopt.values.storage import PLAIN
from reports.figures import COLOURS, MARKERS, WIDTH, in_corner, not_drawn, plain, round_ticks, save, titled_figure

ALONE = ("rtn", "gptq")
"""Beginnings of the names of methods that round alone, and keep every weight; their lines are dashed."""

BITS_SHOWN = (0.25, 0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 16)
"""Bits per weight that are written on the upper axis."""

MARGIN = 1.1  # beside the first and the last point, as a factor


@dataclass(frozen=True)
class BytesPoint:
    """Give the loss of one compressed model.

    Args:
        method: what made it; points of one method are joined.
        kept: bytes of the covered layers, as a fraction of the dense ones in 16 bits.
        kl: mean KL to the dense model, nats per token.
        stderr: its standard error, or None.

    >>> BytesPoint("sparse + low rank, 4 bits", kept=0.2, kl=0.012, stderr=0.001).kept
    0.2
    """

    method: str
    kept: float
    kl: float
    stderr: float | None = None


def draw_bytes(points: Sequence[BytesPoint], path: Path, made_of: str = "") -> Path:
    """Write `path`, a PNG of `bytes_figure`, and the same as SVG beside it; return `path`.

    Args:
        made_of: the line below the title, which says what was measured.
    Raises:
        ArtefactError: a file cannot be written.

    >>> draw_bytes([BytesPoint("rtn", 0.25, 0.1)], Path("bytes.png"))
    PosixPath('bytes.png')
    """
    return save(bytes_figure(points, made_of), path)


def bytes_figure(points: Sequence[BytesPoint], made_of: str = "") -> Figure:
    """Draw the KL over the fraction of the bytes kept, both on log axes, with a line per method in the order given.

    The axis above has the bits per weight. Methods that round alone (`ALONE`) have dashed lines. Points that lose
    nothing, or were not finite, cannot be drawn; a line counts them.

    >>> (axes,) = bytes_figure([BytesPoint("rtn", 0.25, 0.1), BytesPoint("ours", 0.25, 0.01, 0.001)]).axes
    >>> [text.get_text() for text in axes.get_legend().get_texts()]
    ['rtn', 'ours']
    """
    figure = titled_figure("Loss over the bytes kept", made_of, 5.5, 0.75 * WIDTH)
    axes = figure.subplots()
    shown = [point for point in points if point.kl > 0 and math.isfinite(point.kl) and point.kept > 0]
    for n, method in enumerate(dict.fromkeys(point.method for point in shown)):
        line = sorted((point for point in shown if point.method == method), key=lambda point: point.kept)
        xs, ys = [point.kept for point in line], [point.kl for point in line]
        colour = COLOURS[n % len(COLOURS)]
        # The errors by themselves, so that the legend shows only line and marker.
        axes.errorbar(xs, ys, [point.stderr or 0.0 for point in line], fmt="none", ecolor=colour, elinewidth=1)
        marker, dashes = MARKERS[n % len(MARKERS)], "--" if _alone(method) else "-"
        axes.plot(xs, ys, marker=marker, linestyle=dashes, color=colour, markersize=5, linewidth=1.4, label=method)
    if shown:
        axes.set(xscale="log", yscale="log")
        kept, losses = [point.kept for point in shown], [point.kl for point in shown]
        ends = min(kept) / MARGIN, max(kept) * MARGIN
        axes.set_xlim(ends)
        round_ticks(axes.xaxis, ends)
        round_ticks(axes.yaxis, (min(losses), max(losses)))
        above = axes.secondary_xaxis("top", functions=(_bits, _fraction))
        above.xaxis.set_major_locator(FixedLocator(BITS_SHOWN))
        above.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        above.xaxis.set_minor_locator(NullLocator())
        above.tick_params(which="both", labelsize=7)
        above.set_xlabel("bits per weight", fontsize=8)
        axes.legend(fontsize=8, frameon=False)
    plain(axes)
    axes.set_xlabel("fraction kept of the bytes of the compressible layers, scales and index counted", fontsize=8)
    axes.set_ylabel("KL to dense, nats per token", fontsize=8)
    zero = sum(point.kl <= 0 for point in points)
    in_corner(axes, not_drawn({"not above zero": zero, "not finite": len(points) - len(shown) - zero}), left=True)
    return figure


def _alone(method: str) -> bool:
    """Tell whether a method rounds alone."""
    return method.lower().startswith(ALONE)


def _bits(kept: Any) -> Any:
    """Compute bits per weight from a fraction of the bytes of 16 bits a weight; a number or an array."""
    return kept * PLAIN.values


def _fraction(bits: Any) -> Any:
    """Compute the fraction of the bytes from bits per weight; a number or an array."""
    return bits / PLAIN.values
