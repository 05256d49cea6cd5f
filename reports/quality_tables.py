"""Lay out the quality of models: perplexity, KL to the dense model, per split."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group as Stack
from rich.text import Text

from globalopt.values.metrics import Metrics
from globalopt.values.results import Summary
from reports import formats
from reports.table_style import add_numbers, footed, report_table

NOT_MEASURED = "not measured; `globalopt eval` on the run does it"
"""Said of a run that left the evaluation out."""


def quality(summary: Summary, sign: str = "±") -> Stack:
    """Make the table of dense and compressed perplexity and KL per split, with standard errors over windows.

    The standard error of a perplexity is `perplexity * stderr(nll)`. `sign` is put before every standard error.

    >>> from rich.console import Console
    >>> from reports.example import example_summary
    >>> Console(width=80, color_system=None).print(quality(example_summary()))
    Quality (± standard error over windows)
                     dense  compressed              KL to dense,
    split       perplexity  perplexity  change    nats per token
    ────────────────────────────────────────────────────────────
    validation   60.9 ±0.8   61.0 ±0.8  +0.2 %  0.00291 ±0.00007
    test         62.2 ±0.8   62.4 ±0.8  +0.4 %  0.00302 ±0.00008
    validation: 64 windows of 512 tokens, 32,704 predicted, float32, text 22222222
    test: 64 windows of 512 tokens, 32,704 predicted, float32, text 11111111
    """
    if not summary.compressed:
        return Stack(Text(f"Quality: {NOT_MEASURED}", "bold"))
    lines = [windows_line(m) for m in summary.compressed]
    table = report_table(f"Quality ({sign} standard error over windows)")
    table.add_column("\nsplit")
    add_numbers(table, ("dense\nperplexity", "compressed\nperplexity", "\nchange", "KL to dense,\nnats per token"))
    for dense, compressed in zip(summary.dense, summary.compressed, strict=True):
        table.add_row(
            Text(compressed.split),
            perplexity(dense, sign),
            perplexity(compressed, sign),
            formats.change(dense.perplexity, compressed.perplexity),
            divergence(compressed, sign),
        )
    return footed(table, *lines)


def metrics_table(metrics: Sequence[Metrics], sign: str = "±") -> Stack:
    """Make the table of perplexity, and KL where it was measured, of one model per split.

    >>> from rich.console import Console
    >>> from reports.example import example_metrics
    >>> Console(width=80, color_system=None).print(metrics_table([example_metrics("test", 62.4, 0.003)]))
    Quality (± standard error over
    windows)
                               KL to dense,
    split  perplexity    nats per token
    ───────────────────────────────────
    test    62.4 ±0.8  0.00300 ±0.00008
    test: 64 windows of 512 tokens, 32,704 predicted, float32, text 11111111
    """
    table = report_table(f"Quality ({sign} standard error over windows)")
    table.add_column("\nsplit")
    add_numbers(table, ("\nperplexity", "KL to dense,\nnats per token"))
    for m in metrics:
        table.add_row(Text(m.split), perplexity(m, sign), "-" if m.kl is None else divergence(m, sign))
    return footed(table, *(windows_line(m) for m in metrics))


def windows_line(m: Metrics) -> str:
    """Write a line on the windows and the text of metrics.

    >>> from reports.example import example_metrics
    >>> windows_line(example_metrics("test", 62.4, 0.003))
    'test: 64 windows of 512 tokens, 32,704 predicted, float32, text 11111111'
    """
    return (
        f"{m.split}: {formats.count(m.windows)} windows of {formats.count(m.seqlen)} tokens, "
        f"{formats.count(m.tokens)} predicted, {m.dtype}, text {m.text_sha256[:8]}"
    )


def perplexity(metrics: Metrics, sign: str = "±") -> str:
    """Format the perplexity with its standard error, by the delta method from that of the mean loss.

    >>> from reports.example import example_metrics
    >>> perplexity(example_metrics("test", 62.4, 0.003))
    '62.4 ±0.8'
    """
    return formats.measured(metrics.perplexity, metrics.perplexity * metrics.nll_stderr, sign)


def divergence(metrics: Metrics, sign: str = "±") -> str:
    """Format the KL to the dense model with its standard error, in nats per token; "-" for the dense model itself.

    >>> from reports.example import example_metrics
    >>> divergence(example_metrics("test", 62.4, 0.003))
    '0.00300 ±0.00008'
    """
    return "-" if metrics.kl is None else formats.measured(metrics.kl, metrics.kl_stderr, sign)
