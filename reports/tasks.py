"""Show the scores of models as terminal tables: perplexities and zero-shot tasks, with the dense model beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console, RenderableType
from rich.console import Group as Stack
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from globalopt.values.metrics import Metrics
from globalopt.values.scores import ACCURACIES, ModelScore, Score, Scorecard
from reports import formats
from reports.quality_tables import metrics_table, perplexity
from reports.table_style import add_numbers, footed, report_table

LARGE = 1e5
"""Least perplexity that is shown with an exponent."""


def render_scores(scores: Scorecard, console: Console) -> None:
    """Print the tables of a scorecard.

    >>> from reports.example import example_scores
    >>> render_scores(example_scores(), Console(width=80, color_system=None))
    Quality (± standard error over
    ...
    test    62.4 ±0.8  0.00300 ±0.00008
    ...
    arc_easy      acc     2,376  42.0 ±1.0  40.0 ±1.0  -2.0 ±0.5
    ...
    """
    sign = "+-" if console.options.ascii_only else "±"
    parts: list[RenderableType] = []
    if scores.model.metrics:
        parts.append(metrics_table(scores.model.metrics, sign))
    if scores.dense is not None and scores.dense.metrics:
        parts.append(dense_table(scores.dense.metrics, sign))
    if scores.model.tasks:
        parts.append(tasks_table(scores, sign))
    for part in parts:
        console.print(Padding(part, (0, 0, 1, 0)))


def dense_table(metrics: Sequence[Metrics], sign: str = "±") -> Table:
    """Make the table of perplexities of the dense model on the same windows.

    >>> from reports.example import example_metrics
    >>> Console(width=80, color_system=None).print(dense_table([example_metrics("test", 62.2, None)]))
    Quality of the
    dense model
    split  perplexity
    ─────────────────
    test    62.2 ±0.8
    """
    table = report_table("Quality of the dense model")
    table.add_column("split")
    add_numbers(table, ("perplexity",))
    for m in metrics:
        table.add_row(Text(m.split), perplexity(m, sign))
    return table


def tasks_table(scores: Scorecard, sign: str = "±") -> Stack:
    """Make the table of all metrics of all tasks: accuracies in percent, with standard errors over items, and averages.

    With a dense model beside it, `change` is the mean of the differences item by item.

    >>> from reports.example import example_scores
    >>> Console(width=80, color_system=None).print(tasks_table(example_scores()))
    Zero-shot tasks (± standard error over items)
    task          metric  items      dense      model     change
    ────────────────────────────────────────────────────────────
    arc_easy      acc     2,376  42.0 ±1.0  40.0 ±1.0  -2.0 ±0.5
    ────────────────────────────────────────────────────────────
    average of 1  acc            42.0 ±1.0  40.0 ±1.0  -2.0 ±0.5
    model: float32, weights 44444444; dense: float32, weights 44444444
    lm-eval 0.4.13: arc_easy 1.0
    """
    model, dense = scores.model, scores.dense
    table = report_table(f"Zero-shot tasks ({sign} standard error over items)")
    table.add_column("task", no_wrap=True)
    table.add_column("metric", no_wrap=True)
    columns = ("dense", "model", "change") if dense else ("score",)
    add_numbers(table, ("items", *columns))
    theirs = {task.name: task.scores for task in dense.tasks} if dense else {}
    for number, task in enumerate(model.tasks):
        rows = [
            (metric, *_cells(metric, task.scores, theirs.get(task.name), scores.changes.get(task.name, {}), sign))
            for metric in task.scores
        ]
        heads = ((Text(task.name), formats.count(task.items)), *[(Text(), "")] * (len(rows) - 1))
        for (name, items), (metric, *cells) in zip(heads, rows, strict=True):
            table.add_row(name, Text(metric), items, *cells)
        if number == len(model.tasks) - 1 and model.averages:
            table.add_section()
    for metric in model.averages:
        count = sum(metric in task.scores for task in model.tasks)
        cells = _cells(metric, model.averages, dense.averages if dense else None, scores.average_changes, sign)
        table.add_row(Text(f"average of {count}"), Text(metric), "", *cells)
    return footed(table, *_notes(scores))


def _cells(
    metric: str,
    mine: Mapping[str, Score],
    theirs: Mapping[str, Score] | None,
    changes: Mapping[str, Score],
    sign: str,
) -> list[str]:
    """Format the scores of both models and the change of a metric."""
    own = _shown(metric, mine[metric], sign)
    if theirs is None:
        return [own]
    change = _shown(metric, changes[metric], sign, plus=True) if metric in changes else "-"
    return [_shown(metric, theirs[metric], sign), own, change]


def _shown(metric: str, score: Score, sign: str, plus: bool = False) -> str:
    """Format a score; accuracies in percent."""
    if metric not in ACCURACIES:
        if score.value >= LARGE:
            return f"{score.value:.1e}" + (f" {sign}{score.stderr:.0e}" if score.stderr else "")
        return formats.measured(score.value, score.stderr, sign)
    value = f"{100 * score.value:{'+' if plus else ''}.1f}"
    return value if score.stderr is None else f"{value} {sign}{100 * score.stderr:.1f}"


def _notes(scores: Scorecard) -> list[str]:
    """Write footnotes on models, sources of the items, versions, and on what makes scores not comparable."""
    tasks = scores.model.tasks
    lines = [f"{_model('model', scores.model)}" + (f"; {_model('dense', scores.dense)}" if scores.dense else "")]
    local = [task for task in tasks if task.sha256]
    hub = [task for task in tasks if not task.sha256]
    if hub:
        which = ", ".join(f"{task.name} {task.version}" for task in hub)
        lines.append(f"lm-eval {scores.versions['lm-eval']}: {which}")
    if local:
        which = ", ".join(f"{task.source} {(task.sha256 or '')[:8]}" for task in local)
        lines.append(f"lm-eval {scores.versions['lm-eval']}, items from files: {which}")
    if scores.limit is not None:
        lines.append(f"at most {formats.count(scores.limit)} items of a task: not comparable with whole tasks")
    if scores.missing:
        lines.append(f"not in the folder, and not averaged: {', '.join(scores.missing)}")
    if scores.model.cut:
        lines.append(f"{formats.count(scores.model.cut)} requests were cut at the left to the model's context")
    return lines


def _model(role: str, model: ModelScore) -> str:
    """Describe a model in a footnote."""
    return f"{role}: {model.dtype}, weights {model.weights_sha256[:8]}"
