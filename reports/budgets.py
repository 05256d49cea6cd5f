"""Show budget files as terminal tables: one by itself, or the differences between two."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group as Stack
from rich.text import Text

from globalopt.budgets.budget_file import BudgetFile
from globalopt.budgets.diff import BudgetDiff, Move
from globalopt.values.embeddings import stored_bytes
from globalopt.values.layer_results import LayerPlan
from reports import formats
from reports.bits import bits_text, compressible, embedding_facts, few_bits, mean_bits, stored_facts
from reports.groups import by_kind
from reports.layer_tables import group_table
from reports.shaded_grid import bits_grid, change_grid, kept_grid
from reports.table_style import GAP, add_numbers, common_prefix, facts, footed, report_table, unit_name
from reports.tables import prediction


def budget_file(file: BudgetFile) -> Stack:
    """Make the tables of a budget file: its totals, its layers by kind, and the grids of kept fractions and of bits.

    >>> from rich.console import Console
    >>> from globalopt.budgets.example import example_budget
    >>> Console(width=80, color_system=None).print(budget_file(example_budget()).renderables[0])
    Budget by example
    asked      keep 0.5 of the compressible parameters
    used       32 of 32 parameters
    predicted  nothing: the budget was not found by a search
    seed       0
    """
    plans = file.plans
    rows = [
        ("asked", f"keep {file.asked:g} of {compressible(unit_name(file.accounting), file.matrices)}"),
        ("used", f"{formats.count(file.used)} of {formats.count(file.limit)} {unit_name(file.accounting)}"),
        *stored_facts(plans),
        *embedding_facts(file.matrices),
        *prediction("predicted", file.predicted, file.bound, file.error_unit),
        ("seed", str(file.seed)),
    ]
    table = facts(f"Budget by {file.allocator}", rows)
    kinds = group_table("Allocation by kind", "kind", by_kind(plans), plans, file.error_unit)
    bits = bits_grid(plans)
    return Stack(table, Text(), kinds, Text(), kept_grid(plans), *([] if bits is None else [Text(), bits]))


def budget_diff(found: BudgetDiff, files: tuple[BudgetFile, BudgetFile], labels: tuple[str, str], most: int) -> Stack:
    """Make the tables of a comparison of budgets: totals, grid of changes, by kind, by depth, and the largest changes.

    Args:
        files: that were compared.
        labels: their names.
        most: of the layers with the largest changes, so many are listed.

    >>> from pathlib import Path
    >>> from rich.console import Console
    >>> from globalopt.budgets.budget_file import without_rank
    >>> from globalopt.budgets.diff import diff
    >>> from globalopt.budgets.example import example_budget
    >>> files = example_budget(), without_rank(example_budget())
    >>> found = diff(*files, (Path("a.json"), Path("b.json")))
    >>> Console(width=80, color_system=None).print(budget_diff(found, files, ("a.json", "b.json"), most=1))
    Budgets
    ...
    1 of 2 layers differ: 0 keep more, 0 parameters in all; 0 keep less, 0.
    ...
    """
    parts = [_totals(found, files, labels), Text(), Text(_moved(found), "bold")]
    if found.whole.changed:
        parts += [
            Text(),
            change_grid(found.before, found.after),
            Text(),
            _moves_table("By kind", "kind", found.by_kind(), found),
            Text(),
            _moves_table("By depth", "blocks", found.by_depth(), found),
        ]
        if largest := found.largest(most):
            parts += [Text(), _largest(found, largest)]
    return Stack(*parts)


def _totals(found: BudgetDiff, files: tuple[BudgetFile, BudgetFile], labels: tuple[str, str]) -> Stack:
    """Make the table of the totals of both files."""
    table = report_table("Budgets")
    table.add_column("")
    for header in ("before", "after", "change"):
        table.add_column(header, justify="right", overflow="fold")

    def row(label: str, values: Sequence[str], change: str = "") -> None:
        table.add_row(Text(label, "dim"), *map(Text, (*values, change)))

    row("allocator", [file.allocator for file in files])
    row("seed", [str(file.seed) for file in files])
    row("asked to keep", [f"{file.asked:g}" for file in files])
    whole = found.whole
    beside = any(found.embeddings)
    used = f"used{' by the layers' if beside else ''}, {unit_name(found.accounting)}"
    row(used, [formats.count(n) for n in whole.cost], _signed(whole.change))
    if beside:
        row("bits of embeddings", [" and ".join(str(each.bits) for each in some) or "-" for some in found.embeddings])
        sizes = [stored_bytes(some) for some in found.embeddings]
        row("used by embeddings, bytes", [formats.count(n) for n in sizes], _signed(sizes[1] - sizes[0]))
    row("of the dense size", [f"{kept:.3f}" for kept in whole.kept], _change(whole.kept))
    if few_bits([*found.before, *found.after]):
        row("mean bits of a number", [bits_text(mean_bits(plans)) for plans in (found.before, found.after)])
    row("share in low rank", [f"{share:.3f}" for share in whole.rank_share], _change(whole.rank_share))
    lines = [f"before: {labels[0]}", f"after: {labels[1]}"]
    units = {file.error_unit for file in files}
    predicted = [file.predicted for file in files if file.predicted is not None]
    if len(units) == 1 and len(predicted) == len(files):
        row("predicted", [formats.significant(value) for value in predicted])
        lines.append(f"predicted: {units.pop()}")
    elif len(units) > 1:
        lines.append(f"predictions do not compare: {files[0].error_unit}, and {files[1].error_unit}")
    if files[0].accounting != files[1].accounting:
        lines.append(f"before counts {files[0].accounting}, after {files[1].accounting}: compared in parameters")
    return footed(table, *lines)


def _moved(found: BudgetDiff) -> str:
    """Say how many layers differ, and how much they gained and lost."""
    whole = found.whole
    bits = [[(each.name, each.bits) for each in some] for some in found.embeddings]
    embeddings = " The embeddings differ." if bits[0] != bits[1] else ""
    if not whole.changed:
        nothing = "No layer moved" if embeddings else "Nothing moved"
        return f"{nothing}: both give all {whole.layers} layers the same.{embeddings}"
    gained = sum(after.cost > before.cost for before, after in found.pairs)
    lost = sum(after.cost < before.cost for before, after in found.pairs)
    said = f"{whole.changed} of {whole.layers} layers differ: "
    said += f"{gained} keep more, {formats.compact(found.given)} {unit_name(found.accounting)} in all; "
    said += f"{lost} keep less, {formats.compact(found.taken)}."
    return said + (f" {found.restored} are stored in other bits." if found.restored else "") + embeddings


def _moves_table(title: str, label: str, moves: dict[str, Move], found: BudgetDiff) -> Stack:
    """Make the table of pooled comparisons, with a total row."""
    table = report_table(title)
    table.add_column(f"\n{label}", overflow="fold")
    add_numbers(table, ("\nlayers", "\nchanged", "kept\nbefore", "\nafter", "\nchange", "cost,\nchange"))
    add_numbers(table, ("rank share\nbefore", "\nafter"))
    for name, move in moves.items():
        table.add_row(Text(name), *_cells(move))
    table.add_section()
    table.add_row("all", *_cells(found.whole), style="bold")
    return footed(table, f"cost: {unit_name(found.accounting)}; rank share: of the kept parameters")


def _cells(move: Move) -> list[str]:
    """Format the row of a pooled comparison."""
    return [
        str(move.layers),
        str(move.changed),
        *(f"{kept:.3f}" for kept in move.kept),
        _change(move.kept),
        _signed_compact(move.change),
        *(f"{share:.3f}" for share in move.rank_share),
    ]


def _largest(found: BudgetDiff, largest: Sequence[tuple[LayerPlan, LayerPlan]]) -> Stack:
    """Make the table of the layers with the largest changes."""
    prefix = common_prefix([before.name for before in found.before])
    few = few_bits([plan for pair in largest for plan in pair])
    table = report_table("Largest moves", gap=1 if few else GAP)
    table.add_column("\nlayer", overflow="fold")
    heads = "cost,\nchange", "kept\nbefore", "\nafter", "rank\nbefore", "\nafter", "density\nbefore", "\nafter"
    add_numbers(table, [*heads, *(["bits\nbefore", "\nafter"] if few else [])])
    for before, after in largest:
        table.add_row(
            Text(before.name.removeprefix(prefix)),
            _signed_compact(after.cost - before.cost),
            f"{before.kept:.3f}",
            f"{after.kept:.3f}",
            str(before.rank),
            str(after.rank),
            f"{before.density:.3f}",
            f"{after.density:.3f}",
            *([before.storage, after.storage] if few else []),
        )
    rest = found.whole.changed - len(largest)
    under = f"names under {prefix}; " if prefix else ""
    return footed(table, f"{under}{rest} more layers changed" if rest else f"{under}these are all")


def _signed(change: int) -> str:
    """Format a change of a count with all digits."""
    return f"{change:+,}" if change else "0"


def _signed_compact(change: int) -> str:
    """Format a change of a count with a decimal prefix."""
    return ("-" if change < 0 else "+") + formats.compact(abs(change)) if change else "0"


def _change(values: tuple[float, float], decimals: int = 3) -> str:
    """Format the change between two fractions."""
    change = values[1] - values[0]
    return f"{change:+.{decimals}f}" if change else "0"
