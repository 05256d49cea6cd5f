"""Make the page of a family of budgets."""

from __future__ import annotations

from pathlib import Path

from globalopt.values.family import Family, FamilyPoint
from globalopt.values.search_record import Outcome
from reports import formats
from reports.html import Card, Cell, Code, Facts, Page, Picture, Section, Table
from reports.run_page import MISSING, columns, stage_table
from reports.table_style import model_name, unit_name


def family_page(family: Family, picture: Path) -> Page:
    """Make the page of a finished family.

    Args:
        picture: the PNG of its curve, with an SVG beside it.

    >>> from reports.example import example_family
    >>> from reports.frontier import write_frontier
    >>> family_page(example_family(), write_frontier(example_family(), Path("."))).title
    'the bundled reference model, a family of budgets'
    """
    model = model_name(family.model)
    points, unit = family.points, unit_name(family.accounting)
    ends = " to ".join(dict.fromkeys(f"{end([point.asked for point in points]):g}" for end in (min, max)))
    cards = [
        Card("Budgets", str(len(points)), f"{ends} kept of {formats.compact(family.total)} {unit}"),
        Card("Predicted for", family.solver, f"pattern {family.pattern}, seed {family.seed}"),
        Card("Largest gap", formats.at_most(max(point.gap for point in points)), "to the bound of the free knapsack"),
    ]
    options = ", ".join(f"{name}={value}" for name, value in family.solver_options.items())
    made = [("seed", str(family.seed)), *([("solver options", options)] if options else []), *family.versions.items()]
    curve = Picture.read(picture, "Predicted and measured loss over the kept fraction")
    return Page(
        title=f"{model}, a family of budgets",
        lede=f"{len(points)} nested budgets from one analysis; nothing is refined yet",
        cards=cards,
        sections=[
            Section("frontier", "Frontier", [curve, _points(family)]),
            Section("cost", "Cost", [stage_table(family.stages)]),
            Section("reproduce", "Reproduce", [Code(family.command, "Command"), Facts(made, "Versions")]),
        ],
        version=family.versions.get("globalopt", ""),
    )


def _points(family: Family) -> Table:
    """Make the table of all budgets of the family."""
    heads = columns("kept", unit_name(family.accounting), "predicted", "bound", "gap", "measured KL to dense")
    heads += columns("predicted of uniform", "measured KL of uniform", "file'")
    notes = [
        f"predicted, bound: {family.error_unit}, summed over layers; gap: the share of the prediction above the bound"
    ]
    if family.candidates is not None:
        notes.append(" ".join(measured_note(family)))
    if family.left_out:
        left = ", ".join(f"{kept:g}" for kept in family.left_out)
        notes.append(f"left out, as pattern {family.pattern} does not reach them: {left}")
    rows = [_row(point) for point in family.points]
    return Table("Every budget", heads, rows, notes=notes, tall=len(rows) > 20)


def measured_note(family: Family) -> tuple[str, str]:
    """Write the footnote on the measured losses of a family, in two lines.

    >>> from reports.example import example_family
    >>> measured_note(example_family())[1]
    'of candidates made from anchors; nothing is refined'
    """
    text = f"{formats.count(family.windows)} windows of {formats.count(family.seqlen)} tokens"
    return (
        f"measured: nats per token on the selection text, {text},",
        f"of candidates made from {family.candidates}; nothing is refined",
    )


def _row(point: FamilyPoint) -> list[Cell]:
    """Make the row of a budget."""
    return [
        Cell(f"{point.asked:g}", point.asked),
        Cell(formats.count(point.used), point.used),
        Cell(formats.significant(point.predicted), point.predicted),
        Cell(formats.significant(point.bound), point.bound),
        Cell(formats.at_most(point.gap), point.gap),
        _measured(point),
        Cell(formats.significant(point.uniform.predicted), point.uniform.predicted),
        _measured(point.uniform),
        Cell(point.file),
    ]


def _measured(outcome: Outcome) -> Cell:
    """Make the cell of a measured loss."""
    if outcome.measured is None:
        return MISSING
    return Cell(formats.measured(outcome.measured, outcome.stderr), outcome.measured)
