"""What models score: perplexities and tasks, the one value that `globalopt eval` shows, prints and writes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from globalopt.values.results import Metrics


@dataclass(frozen=True)
class Score:
    """A mean and its standard error, or None where the metric has none."""

    value: float
    stderr: float | None

    @classmethod
    def mean(cls, values: Sequence[float]) -> Score:
        """The mean of values and its standard error, None for a single one."""
        n = len(values)
        mean = math.fsum(values) / n
        if n < 2:
            return cls(mean, None)
        variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
        return cls(mean, math.sqrt(variance / n))


@dataclass(frozen=True)
class TaskScore:
    """What a model scores on one task.

    Args:
        version: the task's.
        source: "lm-eval", or the name of the file its items are from, whose `sha256` it is.
        items: how many were asked.
        scores: by metric; `acc` is accuracy, `acc_norm` that of likelihoods per character of a choice.
    """

    name: str
    version: str
    source: str
    sha256: str | None
    items: int
    scores: Mapping[str, Score]


@dataclass(frozen=True)
class ModelScore:
    """What one model scores.

    Args:
        model: as it was named.
        weights_sha256: of its compressible layers, as they are in memory.
        dtype: what it computed in.
        metrics: one per split or text.
        averages: by accuracy, over the tasks that have it.
        cut: requests whose beginning did not fit into the model's context and was left out.
    """

    model: str
    weights_sha256: str
    dtype: str
    metrics: tuple[Metrics, ...]
    tasks: tuple[TaskScore, ...]
    averages: Mapping[str, Score]
    cut: int


@dataclass(frozen=True)
class Scorecard:
    """A model, and the dense one beside it.

    Args:
        dense: None where no dense model was named.
        changes: by task and accuracy, this model's less the dense one's, item by item.
        average_changes: their plain means.
        texts: how the windows of every split and text were made, by name.
        missing: tasks that were asked for as one of `papers` and are not in the folder.
        limit: most items of a task; None: all.
    """

    command: str
    model: ModelScore
    dense: ModelScore | None
    changes: Mapping[str, Mapping[str, Score]]
    average_changes: Mapping[str, Score]
    texts: Mapping[str, Mapping[str, Any]]
    missing: tuple[str, ...]
    limit: int | None
    batch_size: int
    versions: Mapping[str, str]


ACCURACIES = ("acc", "acc_norm")


def averages(tasks: Iterable[Mapping[str, Score]]) -> dict[str, Score]:
    """The plain mean of every accuracy over the tasks that have it; their errors are independent."""
    tasks = tuple(tasks)
    found = {}
    for metric in ACCURACIES:
        scores = [task[metric] for task in tasks if metric in task]
        if scores:
            value = math.fsum(score.value for score in scores) / len(scores)
            errors = [score.stderr for score in scores if score.stderr is not None]
            stderr = math.hypot(*errors) / len(scores) if len(errors) == len(scores) else None
            found[metric] = Score(value, stderr)
    return found
