"""Say the result of a run in a few lines."""

from __future__ import annotations

from globalopt.values.results import Summary
from reports import formats, quality_tables
from reports.table_style import unit_name


def brief(summary: Summary) -> list[tuple[str, object]]:
    """List labels and values of a run's result: what is kept, and how good the model is on every split, if measured.

    >>> from reports.example import example_summary
    >>> for label, text in brief(example_summary()):
    ...     print(f"{label}: {text}")
    kept: 0.457 of the parameters, asked 0.5, by knapsack + 3basil
    validation: KL to dense 0.00291 ±0.00007 nats per token, perplexity 61.0 ±0.8 (+0.2 %)
    test: KL to dense 0.00302 ±0.00008 nats per token, perplexity 62.4 ±0.8 (+0.4 %)
    """
    kept = formats.significant(summary.used / summary.total)
    by = f"{summary.allocator} + {summary.solver}"
    rows: list[tuple[str, object]] = [
        ("kept", f"{kept} of the {unit_name(summary.accounting)}, asked {summary.asked:g}, by {by}")
    ]
    if not summary.compressed:
        rows.append(("quality", quality_tables.NOT_MEASURED))
    for dense, compressed in zip(summary.dense, summary.compressed, strict=True):
        change = formats.change(dense.perplexity, compressed.perplexity)
        quality = f"KL to dense {quality_tables.divergence(compressed)} nats per token"
        rows.append((compressed.split, f"{quality}, perplexity {quality_tables.perplexity(compressed)} ({change})"))
    return rows
