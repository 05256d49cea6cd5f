"""Show the estimates of a dry run as a terminal table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import RenderableType

from globalopt.values.dry_run import DryRun
from reports import formats
from reports.table_style import add_numbers, footed, model_name, report_table


def dry_run_table(plan: DryRun) -> RenderableType:
    """Make the table of parameters and coverage, then of memory, disk and time by their use.

    >>> from rich.console import Console
    >>> from reports.example import example_dry_run
    >>> Console(width=80, color_system=None).print(dry_run_table(example_dry_run()))
    Dry run: the bundled reference model
    parameters                            6,955,264
    compressible, 56 layers in 8 blocks   4,718,592
    of the block parameters                 99.95 %
    ...
    """
    model = model_name(plan.model)
    table = report_table(f"Dry run: {model}", show_header=False)
    table.add_column("")
    add_numbers(table, ("",))
    skipped = sum(plan.skipped.values())
    for what, value in (
        ("parameters", formats.count(plan.parameters)),
        (f"compressible, {plan.layers} layers in {plan.blocks} blocks", formats.count(plan.covered)),
        ("of the block parameters", formats.percent(plan.covered, plan.block_params)),
        ("left as they are", formats.count(skipped)),
    ):
        table.add_row(what, value)
    _add_section(table, "peak memory", plan.memory, formats.memory, plan.peak)
    at_once = "disk" if plan.most_disk == sum(plan.disk.values()) else "disk, most at once"
    _add_section(table, at_once, plan.disk, formats.memory, plan.most_disk)
    _add_section(table, "time, about", plan.seconds, formats.duration, sum(plan.seconds.values()))
    loaded = "one block of the model at a time" if plan.lazy else "the model is whole in memory"
    states = ", hidden states in files" if plan.states_in_files else ""
    return footed(
        table,
        f"Loaded: {loaded}{states}.",
        f"Time from a product at {plan.rate / 1e9:.0f} GFLOP/s and a fit in {plan.fit_seconds:.2g} s on this machine.",
        "Nothing was loaded or written.",
    )


def _add_section(table: Any, title: str, parts: Mapping[str, Any], text: Callable[[Any], str], whole: Any) -> None:
    """Add a section with the whole, and every part."""
    table.add_section()
    table.add_row(title, text(whole))
    for name, value in parts.items():
        table.add_row(f"  {name}", text(value), style="dim")
