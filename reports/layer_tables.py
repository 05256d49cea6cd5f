"""Lay out layers: by kind, by block, and one by one."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group as Stack
from rich.table import Table
from rich.text import Text

from globalopt.values.decomposition import Status
from globalopt.values.layer_results import LayerPlan
from globalopt.values.results import Summary
from reports import formats
from reports.bits import NOTE, bits_text, few_bits
from reports.groups import Group, by_block, by_kind
from reports.table_style import GAP, add_numbers, common_prefix, errors_unit, footed, report_table, unit_name


def by_kind_table(summary: Summary) -> Stack:
    """Make the table of targets and errors pooled by kind of layer (`Group`), with a total row.

    >>> from rich.console import Console
    >>> from reports.example import example_summary
    >>> Console(width=80, color_system=None).print(by_kind_table(example_summary()))
    Allocation by kind
                                              mean   rank  predicted    actual ...
    kind       layers   kept  density         rank  share      error     error ...
    ...
    """
    return group_table("Allocation by kind", "kind", by_kind(summary.layers), summary.layers, errors_unit(summary))


def by_block_table(summary: Summary) -> Stack:
    """Make the table of targets and errors pooled by block (`Group`), with a total row.

    >>> from rich.console import Console
    >>> from reports.example import example_summary
    >>> Console(width=80, color_system=None).print(by_block_table(example_summary()))
    Allocation by block
    ...
    rank, relative: size-weighted means
    """
    return group_table("Allocation by block", "block", by_block(summary.layers), summary.layers, errors_unit(summary))


def group_table(title: str, label: str, groups: Sequence[Group], layers: Sequence[LayerPlan], unit: str) -> Stack:
    """Make a table of pooled layers, with a row for all of them; errors are in `unit`.

    >>> from rich.console import Console
    >>> from globalopt.budgets.example import example_budget
    >>> plans = example_budget().plans
    >>> shown = group_table("By kind", "kind", by_kind(plans), plans, "nats per token")
    >>> Console(width=80, color_system=None).print(shown)
    By kind
                                       mean   rank
    kind       layers   kept  density  rank  share
    ──────────────────────────────────────────────
    up_proj         1  0.500    0.125   1.0  0.750
    down_proj       1  0.500    0.500   0.0  0.000
    ──────────────────────────────────────────────
    all             2  0.500    0.312   0.5  0.375
    rank: size-weighted means
    """
    rows = [*groups, Group.pool("all", layers)]
    errors: dict[str, list[float]] = {}
    # Columns with a missing value are left out: predictions in another unit, layers that are not refined yet.
    for name in ("predicted", "actual", "relative"):
        values = [getattr(row, name) for row in rows]
        if None not in values:
            errors[name] = values
    few = few_bits(layers)
    # The column of bits would not fit into 80 otherwise.
    table = report_table(title, gap=1 if few else GAP)
    table.add_column(f"\n{label}", overflow="fold")
    add_numbers(table, ("\nlayers", "\nkept", "\ndensity", "mean\nrank", "rank\nshare", *(["\nbits"] if few else [])))
    add_numbers(table, [f"{name}\nerror" for name in errors])
    cells = list(zip(*map(formats.aligned, errors.values()), strict=True)) or [()] * len(rows)
    for row, texts in zip(rows, cells, strict=True):
        last = row is rows[-1]
        if last:
            table.add_section()
        table.add_row(
            Text(row.label),
            str(row.layers),
            f"{row.kept:.3f}",
            f"{row.density:.3f}",
            f"{row.rank:.1f}",
            f"{row.rank_share:.3f}",
            *([bits_text(row.bits)] if few else []),
            *texts,
            style="bold" if last else "",
        )
    summed = [name for name in errors if name != "relative"]
    means = ["rank", *(["relative"] if "relative" in errors else [])]
    parts = [f"{', '.join(summed)}: sums in {unit}"] if summed else []
    lines = ["; ".join([*parts, f"{', '.join(means)}: size-weighted means"]), *([NOTE] if few else [])]
    return footed(table, *lines)


def layer_allocation(summary: Summary) -> Table:
    """Make the table of the targets of all layers: shape, rank, nonzeros, pattern, bits, cost and dense cost.

    >>> from reports.example import example_summary
    >>> layer_allocation(example_summary()).row_count
    14
    """
    patterns = any(layer.pattern for layer in summary.layers)
    table = report_table(f"Layers: allocation (cost in {unit_name(summary.accounting)})", gap=1)
    table.add_column("\nblock", justify="right")
    table.add_column("\nkind", overflow="fold")
    few = few_bits(summary.layers)
    add_numbers(table, ("d_out x\nd_in", "\nrank", "\nnnz", *(["\nN:M"] if patterns else [])))
    add_numbers(table, (*(["\nbits"] if few else []), "\ncost"))
    add_numbers(table, ("dense\ncost", "\nkept", "\ndensity", "rank\nshare"))
    for layer in summary.layers:
        table.add_row(
            str(layer.block),
            Text(layer.kind),
            f"{layer.d_out}x{layer.d_in}",
            str(layer.rank),
            formats.compact(layer.nnz),
            *([layer.pattern or "-"] if patterns else []),
            *([layer.storage] if few else []),
            formats.compact(layer.cost),
            formats.compact(layer.dense_cost),
            f"{layer.kept:.3f}",
            f"{layer.density:.3f}",
            f"{layer.rank_share:.3f}",
        )
    return table


def layer_results(summary: Summary) -> Stack:
    """Make the table of the results of all layers: errors, status of the solver, damping and time.

    >>> from reports.example import example_summary
    >>> layer_results(example_summary()).renderables[0].row_count
    14
    """
    prefix = common_prefix([layer.name for layer in summary.layers])
    under = f"names under {prefix}; " if prefix else ""
    table = report_table("Layers: result")
    table.add_column("\nlayer", overflow="fold")
    add_numbers(table, ("predicted\nerror", "actual\nerror", "relative\nerror"))
    table.add_column("\nstatus", no_wrap=True)
    add_numbers(table, ("\ndamping", "\ntime"))
    for layer in summary.layers:
        table.add_row(
            Text(layer.name.removeprefix(prefix)),
            "-" if layer.predicted is None else formats.scientific(layer.predicted),
            formats.scientific(layer.actual),
            formats.scientific(layer.relative),
            Text(layer.status, "" if Status(layer.status) is Status.CONVERGED else "red"),
            f"{layer.damping:g}",
            formats.duration(layer.seconds),
        )
    return footed(table, f"{under}predicted, actual error: {errors_unit(summary)}")
