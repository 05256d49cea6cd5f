"""Helpers that all figures share: titles, colours, ticks, and writing them as PNG and SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
from matplotlib.transforms import Bbox

from globalopt.runs.files import replacing
from globalopt.values.error_unit import ErrorUnit
from globalopt.values.results import Summary
from reports import formats
from reports.table_style import unit_name

DPI = 150
WIDTH = 12.0
"""Inches: all figures are as wide, so that text and points have one size when they stand below each other."""

# Okabe and Ito's palette without yellow, which vanishes on white; purple and brown for more than seven.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#6A3D9A", "#7A4B1E")

# With the colours, 81 kinds differ.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "h")

OUTPUT_ERROR = r"tr$(EGE^\mathsf{T})$"


def new_figure(summary: Summary, title: str, height: float, width: float = WIDTH) -> Figure:
    """Make an empty figure of a run: titled by what it shows, and below it model, methods and budget of the run.

    >>> from reports.example import example_summary
    >>> print(new_figure(example_summary(), "Errors", 4.0).get_suptitle())
    Errors
    reference model, knapsack + 3basil, asked 0.5, used 0.457 of the parameters
    """
    used = f"used {formats.significant(summary.used / summary.total)} of the {unit_name(summary.accounting)}"
    made_of = f"{summary.allocator} + {summary.solver}, asked {summary.asked:g}, {used}"
    return titled_figure(title, f"{named(summary.model)}, {made_of}", height, width)


def titled_figure(title: str, made_of: str, height: float, width: float = WIDTH) -> Figure:
    """Make an empty figure in inches, with `title` and below it `made_of`, which says what was measured.

    >>> titled_figure("Quality", "reference model", 4.0).get_suptitle()
    'Quality\\nreference model'
    """
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    # Made without pyplot, so that the canvas does not depend on the backend that the user has set.
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}\n{made_of}", fontsize=11, x=0.01, ha="left", parse_math=False)
    return figure


def named(model: str) -> str:
    """Name a model in a title.

    >>> named("reference")
    'reference model'
    """
    return "reference model" if model == "reference" else model


def plain(axes: Axes) -> None:
    """Give axes a faint grid behind the points and small tick labels.

    >>> axes = titled_figure("Quality", "reference model", 4.0).subplots()
    >>> plain(axes)
    >>> axes.get_axisbelow()
    True
    """
    axes.grid(color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", labelsize=7)


def not_drawn(hidden: Mapping[str, int]) -> str:
    """Say how many points cannot be drawn on the axes, by the reason; empty where all are drawn.

    >>> not_drawn({"at zero": 3, "off the scale": 0})
    'not drawn: 3 at zero'
    """
    said = ", ".join(f"{count} {where}" for where, count in hidden.items() if count)
    return said and f"not drawn: {said}"


def in_corner(axes: Axes, *lines: str, left: bool = False) -> None:
    """Write small text into the lower right corner, legible over points; empty lines are left out.

    Args:
        left: into the lower left corner.

    >>> axes = titled_figure("Quality", "reference model", 4.0).subplots()
    >>> in_corner(axes, "", "not drawn: 3 at zero")
    >>> axes.texts[0].get_text()
    'not drawn: 3 at zero'
    """
    if text := "\n".join(filter(None, lines)):
        corner = {"transform": axes.transAxes, "ha": "left" if left else "right", "va": "bottom"}
        behind = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1}
        axes.text(0.02 if left else 0.98, 0.02, text, fontsize=7, color="0.4", bbox=behind, **corner)


def round_ticks(axis: Axis, ends: tuple[float, float]) -> None:
    """Set ticks at a few round numbers, where a log axis over `ends` has too few powers of ten to be legible.

    >>> axes = titled_figure("Quality", "reference model", 4.0).subplots()
    >>> axes.set(yscale="log", ylim=(2, 30))
    [...]
    >>> round_ticks(axes.yaxis, (2, 30))
    >>> [round(tick) for tick in axes.get_yticks() if 2 <= tick <= 30]
    [2, 5, 10, 20]
    """
    decades = math.log10(ends[1] / ends[0])
    if decades < 3:
        subs = (1, 1.5, 2, 3, 5, 7) if decades < 1 else (1, 2, 5)
        axis.set_major_locator(MaxNLocator(5) if decades < 0.4 else LogLocator(subs=subs))
        axis.set_major_formatter(StrMethodFormatter("{x:.4g}"))
        axis.set_minor_locator(NullLocator())


def error_unit(unit: ErrorUnit) -> str:
    """Return a unit of errors for a figure, with its formula where it has one.

    >>> error_unit(ErrorUnit.NATS).upper()
    'NATS PER TOKEN'
    """
    return f"{unit} {OUTPUT_ERROR}" if unit == ErrorUnit.OUTPUT_ERROR else unit


def save(figure: Figure, path: Path) -> Path:
    """Write `path`, a PNG, and the same as SVG beside it, each whole or not at all; return `path`.

    The same figure gives the same bytes.

    Raises:
        ArtefactError: a file cannot be written.

    >>> save(titled_figure("Quality", "reference model", 1.0), Path("quality.png")).with_suffix(".svg").is_file()
    True
    """
    # Laid out once for both files: the layout is most of the work, and `savefig` would draw everything twice.
    if figure.axes and (layout := figure.get_layout_engine()) is not None:
        layout.execute(figure)
    figure.set_layout_engine("none")
    for axes in figure.axes:
        # The layout is solved in no fixed order: without rounding, the same figure would not give the same bytes.
        axes.set_position(Bbox(axes.get_position(original=True).get_points().round(6)))
    # Without versions, dates and random names in the files, the same run gives the same bytes.
    with replacing(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary, metadata={"Software": None})
    with replacing(path.with_suffix(".svg")) as temporary, rc_context({"svg.hashsalt": path.stem}):
        FigureCanvasSVG(figure).print_svg(temporary, metadata={"Creator": None, "Date": None})
    return path
