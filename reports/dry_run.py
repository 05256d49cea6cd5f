"""What a run would take, as a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import RenderableType

from globalopt.values.results import DryRun
from reports import formats
from reports.tables import add_numbers, footed, model_name, report_table


def dry_run_table(plan: DryRun) -> RenderableType:
    """Parameters and coverage, then memory, disk and time by what they are for."""
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
    _section(table, "peak memory", plan.memory, formats.memory)
    _section(table, "disk", plan.disk, formats.memory)
    _section(table, "time, about", plan.seconds, formats.duration)
    loaded = "one block of the model at a time" if plan.lazy else "the model is whole in memory"
    states = ", hidden states in files" if plan.states_in_files else ""
    return footed(
        table,
        f"Loaded: {loaded}{states}.",
        f"Time from a product at {plan.rate / 1e9:.0f} GFLOP/s and a fit in {plan.fit_seconds:.2g} s on this machine.",
        "Nothing was loaded or written.",
    )


def _section(table: Any, title: str, parts: Mapping[str, Any], text: Callable[[Any], str]) -> None:
    table.add_section()
    table.add_row(title, text(sum(parts.values())))
    for name, value in parts.items():
        table.add_row(f"  {name}", text(value), style="dim")
