"""Shape tables alike: headers, numbers, footnotes, units and labels."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group as Stack
from rich.table import Table
from rich.text import Text

from globalopt.values.error_unit import ErrorUnit
from globalopt.values.layer_results import LayerResult
from globalopt.values.results import Summary

GAP = 2  # spaces between columns

_RULES = box.Box("    \n    \n ── \n    \n ── \n    \n    \n    \n")


def model_name(model: str) -> str:
    """Name a model as reports do.

    >>> model_name("reference")
    'the bundled reference model'
    """
    return "the bundled reference model" if model == "reference" else model


def facts(title: str, rows: Sequence[tuple[str, str]]) -> Table:
    """Make a table of labels and values.

    >>> from rich.console import Console
    >>> Console(width=80, color_system=None).print(facts("Size", [("of the layers", "45 %")]))
    Size
    of the layers  45 %
    """
    table = report_table(title, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(label, Text(value))
    return table


def _some_names(layers: Sequence[LayerResult]) -> str:
    """List the names of up to three layers, and count the others."""
    shown = ", ".join(layer.name for layer in layers[:3])
    return f"{shown} and {len(layers) - 3} more" if len(layers) > 3 else shown


def common_prefix(names: Sequence[str]) -> str:
    """Find the dotted path that all names share; empty for one name alone.

    >>> common_prefix(["model.layers.0.q", "model.layers.1.q"])
    'model.layers.'
    """
    first, *others = (name.split(".")[:-1] for name in names)
    shared = []
    for i, part in enumerate(first if others else ()):
        if any(other[i : i + 1] != [part] for other in others):
            break
        shared.append(f"{part}.")
    return "".join(shared)


def errors_unit(summary: Summary) -> str:
    """Return the unit of the layers' errors in plain text.

    >>> from reports.example import example_summary
    >>> errors_unit(example_summary(error_unit=ErrorUnit.OUTPUT_ERROR))
    'tr(E G E^T)'
    """
    return "tr(E G E^T)" if summary.error_unit == ErrorUnit.OUTPUT_ERROR else summary.error_unit


def unit_name(accounting: str) -> str:
    """Name the unit of an accounting.

    >>> unit_name("params")
    'parameters'
    """
    return "parameters" if accounting == "params" else accounting


def report_table(title: str, show_header: bool = True, gap: int = GAP) -> Table:
    """Make an empty table in the style of all reports, with `gap` spaces between its columns.

    >>> report_table("Size").title.plain
    'Size'
    """
    return Table(
        title=Text(title, "bold"),
        title_justify="left",
        show_header=show_header,
        header_style="dim",
        box=_RULES,
        show_edge=False,
        pad_edge=False,
        # The box's blank divider is the last space of the gap.
        padding=(0, gap - 1, 0, 0),
    )


def add_numbers(table: Table, headers: Sequence[str]) -> None:
    """Add right-aligned columns that never break a number.

    >>> table = report_table("Size")
    >>> add_numbers(table, ("rank", "kept"))
    >>> [column.justify for column in table.columns]
    ['right', 'right']
    """
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)


def footed(table: Table, *lines: str) -> Stack:
    """Put footnotes, which may be wider than the table, below it.

    >>> len(footed(report_table("Size"), "kept: of the dense size").renderables)
    2
    """
    return Stack(table, *(Text(line, "dim") for line in lines))
