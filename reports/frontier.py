"""Show a family of budgets: predicted and measured loss over the kept fraction, as a table and as a figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Group as Stack

from globalopt.values.error_unit import ErrorUnit
from globalopt.values.family import Family, FamilyPoint
from globalopt.values.search_record import Outcome
from reports import formats
from reports.family_page import measured_note
from reports.figures import COLOURS, error_unit, named, plain, save, titled_figure
from reports.table_style import add_numbers, footed, report_table, unit_name

NESTED, UNIFORM = COLOURS[0], COLOURS[3]


def frontier_table(family: Family, sign: str = "±") -> Stack:
    """Make the table of a family: kept fraction, cost, losses and gap of every budget, beside uniform allocation.

    >>> from rich.console import Console
    >>> from reports.example import example_family
    >>> Console(width=80, color_system=None).print(frontier_table(example_family()))
    Family of 4 nested budgets, predicted for 3basil
                                              measured      measured KL
    kept  parameters  predicted   gap      KL to dense       of uniform
    ───────────────────────────────────────────────────────────────────
     0.1        700M      0.219  10 %     0.153 ±0.011     0.328 ±0.022
    0.35       2.45G     0.0824  10 %   0.0577 ±0.0041     0.124 ±0.008
    ...
    """
    points = family.points
    measured = family.candidates is not None
    table = report_table(f"Family of {len(points)} nested budgets, predicted for {family.solver}")
    columns = {
        "\nkept": [f"{point.asked:g}" for point in points],
        f"\n{unit_name(family.accounting)}": [formats.compact(point.used) for point in points],
        "\npredicted": [formats.significant(point.predicted) for point in points],
        "\ngap": [formats.at_most(point.gap) for point in points],
    }
    if measured:
        columns["measured\nKL to dense"] = [_measured(point, sign) for point in points]
        columns["measured KL\nof uniform"] = [_measured(point.uniform, sign) for point in points]
    else:
        columns["predicted\nof uniform"] = [formats.significant(point.uniform.predicted) for point in points]
    add_numbers(table, list(columns))
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    lines = [
        f"predicted: {family.error_unit}, summed over layers; gap: the share of it that lies",
        "above a proved bound on every allocation of this budget, nested or not",
    ]
    if measured:
        lines += measured_note(family)
    if family.left_out:
        lines.append(f"left out: {len(family.left_out)} budgets that pattern {family.pattern} does not reach")
    return footed(table, *lines)


def _measured(outcome: Outcome, sign: str) -> str:
    """Format the measured loss with its standard error; with exponents below 1e-4, where decimals would not fit."""
    value, stderr = outcome.measured, outcome.stderr
    if value is None or stderr is None:
        return "-"
    return f"{value:.2e} {sign}{stderr:.0e}" if abs(value) < 1e-4 else formats.measured(value, stderr, sign)


def write_frontier(family: Family, folder: Path) -> Path:
    """Write `frontier.png` into `folder`, and the same as SVG, each whole or not at all.

    Raises:
        ArtefactError: a file cannot be written.

    >>> from reports.example import example_family
    >>> write_frontier(example_family(), Path("."))
    PosixPath('frontier.png')
    """
    return save(frontier_figure(family), folder / "frontier.png")


def frontier_figure(family: Family) -> Figure:
    """Draw predicted loss, its lower bound and measured loss over the kept fraction, on a log scale.

    The uniform allocation of each budget is drawn beside it. Colours tell the allocations apart, kinds of lines the
    quantities. Predictions in another unit than nats have a panel of their own.

    >>> from reports.example import example_family
    >>> (axes,) = frontier_figure(example_family()).axes
    >>> axes.get_ylabel()
    'KL to dense: predicted and measured, nats per token'
    """
    measured = family.candidates is not None
    together = measured and family.error_unit == ErrorUnit.NATS
    panels = 2 if measured and not together else 1
    pattern = "" if family.pattern == "unstructured" else f", pattern {family.pattern}"
    made_of = f"{named(family.model)}, {len(family.points)} nested budgets, predicted for {family.solver}{pattern}"
    figure = titled_figure("Loss over the fraction kept", made_of, 5.0)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    _predictions(axes[0], family.points)
    axes[0].set_ylabel(f"predicted error, {error_unit(family.error_unit)}", fontsize=8)
    if measured:
        _measurements(axes[-1], family.points)
        label = "KL to dense: predicted and measured" if together else "measured KL to dense"
        axes[-1].set_ylabel(f"{label}, nats per token", fontsize=8)
    for panel in axes:
        if any(len(line.get_xydata()) for line in panel.lines):
            panel.set_yscale("log")
        panel.set_xlabel(f"fraction kept of the compressible {unit_name(family.accounting)}", fontsize=8)
        plain(panel)
        panel.legend(fontsize=7, frameon=False)
    return figure


def _predictions(axes: Axes, points: Sequence[FamilyPoint]) -> None:
    """Draw the predicted losses, and the gap to the proved bound."""
    _line(axes, points, lambda point: point.uniform.predicted, UNIFORM, "uniform, predicted", "--")
    _line(axes, points, lambda point: point.predicted, NESTED, "nested, predicted", "--")
    _line(axes, points, lambda point: point.bound, NESTED, "proved bound of any allocation, predicted", ":")
    shown = [point for point in points if point.bound > 0]
    bounds, predicted = [point.bound for point in shown], [point.predicted for point in shown]
    axes.fill_between([point.asked for point in shown], bounds, predicted, color=NESTED, alpha=0.15, linewidth=0)


def _measurements(axes: Axes, points: Sequence[FamilyPoint]) -> None:
    """Draw the measured losses."""
    _line(axes, points, lambda point: point.uniform.measured, UNIFORM, "uniform, measured", "-", "s")
    _line(axes, points, lambda point: point.measured, NESTED, "nested, measured", "-", "o")


def _line(
    axes: Axes,
    points: Sequence[FamilyPoint],
    value: Callable[[FamilyPoint], float | None],
    colour: str,
    label: str,
    style: str,
    marker: str = "",
) -> None:
    """Draw a line through the values above zero; the dense model, which loses nothing, has no place on a log axis."""
    shown = [(point.asked, y) for point in points if point.predicted > 0 and (y := value(point))]
    xs, ys = [x for x, _ in shown], [y for _, y in shown]
    axes.plot(xs, ys, color=colour, linestyle=style, marker=marker, markersize=4, linewidth=1.4, label=label)
