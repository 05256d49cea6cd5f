from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from globalopt.values.error_unit import ErrorUnit
from globalopt.values.family import Family
from reports import formats, report_family
from reports.example import FAMILY_KEPT
from reports.frontier import frontier_figure, frontier_table
from tests.command import contents
from tests.reports.factory import make_family


def without_measurements(**changes) -> Family:
    points = tuple(
        replace(p, measured=None, stderr=None, uniform=replace(p.uniform, measured=None, stderr=None))
        for p in make_family().points
    )
    return make_family(points=points, candidates=None, **changes)


def shown(family: Family) -> list[str]:
    console = Console(file=StringIO(), width=80, color_system=None)
    console.print(frontier_table(family))
    assert isinstance(console.file, StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_a_row_per_point_within_eighty_columns() -> None:
    lines = shown(make_family())
    assert next(line.split() for line in lines if line.startswith("0.35")) == [
        "0.35", "2.45G", "0.0824", "10", "%", "0.0577", "±0.0041", "0.124", "±0.008"
    ]  # fmt: skip
    assert [line.split()[0] for line in lines if line.strip()[:1] in ("0", "1")] == [
        f"{kept:g}" for kept in FAMILY_KEPT
    ]
    # No footnote was folded.
    assert [line.split(":")[0] for line in lines[-4:]][::2] == ["predicted", "measured"]
    assert "of candidates made from anchors; nothing is refined" in lines[-1]


def test_without_measurements_predictions_are_compared() -> None:
    lines = shown(without_measurements(error_unit=ErrorUnit.OUTPUT_ERROR, left_out=(0.1, 0.2), pattern="2:4"))
    assert next(line.split() for line in lines if line.startswith("0.35"))[-1] == "0.165"
    assert not any("measured" in line for line in lines)
    assert lines[-1] == "left out: 2 budgets that pattern 2:4 does not reach"


def lines_of(axes) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): [tuple(point) for point in np.column_stack(line.get_data())] for line in axes.lines}


def test_the_curves_hold_the_values_and_the_dense_end_is_not_drawn() -> None:
    (axes,) = frontier_figure(make_family()).axes
    assert axes.get_yscale() == "log"
    assert "nats per token" in axes.get_ylabel()
    assert "compressible parameters" in axes.get_xlabel()
    drawn = lines_of(axes)
    points = make_family().points[:-1]
    assert drawn["nested, predicted"] == [(p.asked, p.predicted) for p in points]
    assert drawn["nested, measured"] == [(p.asked, p.measured) for p in points]
    assert drawn["uniform, predicted"] == [(p.asked, p.uniform.predicted) for p in points]
    assert drawn["uniform, measured"] == [(p.asked, p.uniform.measured) for p in points]
    assert [y for label, ys in drawn.items() if "bound" in label for _, y in ys] == [p.bound for p in points]
    # Who is told by colour, what by the kind of line.
    styles = {str(line.get_label()): (line.get_color(), line.get_linestyle()) for line in axes.lines}
    assert len(set(styles.values())) == 5
    assert styles["nested, predicted"][0] == styles["nested, measured"][0] != styles["uniform, measured"][0]


def test_units_that_differ_have_panels_of_their_own() -> None:
    predicted, measured = frontier_figure(make_family(error_unit=ErrorUnit.OUTPUT_ERROR, accounting="bytes")).axes
    assert "output error" in predicted.get_ylabel()
    assert "nats per token" in measured.get_ylabel()
    assert "bytes" in measured.get_xlabel()
    assert all("predicted" in label for label in lines_of(predicted))
    assert all("measured" in label for label in lines_of(measured))
    assert len(frontier_figure(without_measurements()).axes) == 1


def test_the_report_of_a_family_is_a_table_and_a_picture(tmp_path: Path) -> None:
    console = Console(file=StringIO(), width=80)
    page, (picture,) = report_family(make_family(), tmp_path, console)
    assert (page, picture) == (tmp_path / "report.html", tmp_path / "frontier.png")
    before = contents(tmp_path)
    report_family(make_family(), tmp_path, console)
    assert contents(tmp_path) == before
    # Nothing but the dense model has no place on a log axis at all.
    report_family(make_family(points=make_family().points[-1:]), tmp_path, console)


@pytest.mark.parametrize(
    ("fraction", "text"), [(0.0, "0 %"), (1e-10, "0 %"), (0.0123, "1.3 %"), (0.12, "12 %"), (0.121, "13 %")]
)
def test_a_gap_is_rounded_up(fraction: float, text: str) -> None:
    assert formats.at_most(fraction) == text
