"""Hold perplexities and task accuracies of models: the values that `globalopt eval` shows, prints and writes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from globalopt.values.metrics import Metrics


@dataclass(frozen=True)
class Score:
    """Hold a mean and its standard error, which is None for a metric without one.

    >>> Score.mean([1.0, 0.0, 1.0, 1.0])
    Score(value=0.75, stderr=0.25)
    """

    value: float
    stderr: float | None

    @classmethod
    def mean(cls, values: Sequence[float]) -> Score:
        """Compute the mean of `values` and its standard error, `s / sqrt(n)`; None for a single value."""
        n = len(values)
        mean = math.fsum(values) / n
        if n < 2:
            return cls(mean, None)
        variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
        return cls(mean, math.sqrt(variance / n))


@dataclass(frozen=True)
class TaskScore:
    """Record the accuracies of one model on one task.

    Args:
        name, version: of the task.
        source: "lm-eval", or the name of the file that holds the items. sha256: hash of this file, else None.
        items: number of items.
        scores: by metric; `acc` is accuracy, `acc_norm` accuracy with likelihoods per character of a choice.

    >>> task = TaskScore("arc_easy", "1", "lm-eval", None, items=4, scores={"acc": Score.mean([1.0, 0.0, 1.0, 1.0])})
    >>> task.scores["acc"].value
    0.75
    """

    name: str
    version: str
    source: str
    sha256: str | None
    items: int
    scores: Mapping[str, Score]


@dataclass(frozen=True)
class ModelScore:
    """Collect the metrics and task accuracies of one model.

    Args:
        model: its name, as the user gave it.
        weights_sha256: hash of its compressible layers, as they are in memory.
        dtype: the floating-point type that it computed in.
        metrics: one per split or text.
        tasks: one per task.
        averages: by accuracy, over the tasks that have it.
        cut: number of requests whose beginning did not fit into the model's context and was left out.

    >>> task = TaskScore("arc_easy", "1", "lm-eval", None, items=4, scores={"acc": Score(0.75, 0.25)})
    >>> score = ModelScore("reference", "9f2c", "float32", (), (task,), averages([task.scores]), cut=0)
    >>> score.averages["acc"]
    Score(value=0.75, stderr=0.25)
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
    """Compare one model with the dense one, task by task.

    Args:
        command: the command line.
        model: scores of the model.
        dense: scores of the dense model; None where none was named.
        changes: by task and accuracy: the mean over items of this model's result less the dense one's.
        average_changes: their plain means over tasks.
        texts: how the windows of every split and text were made, by name.
        missing: tasks that belong to the group `papers`, which was asked for, and are not in the folder.
        limit: largest number of items of a task; None: all.
        batch_size: of the forward passes.
        versions: of the packages, by name.

    >>> model = ModelScore("compressed", "9f2c", "float32", (), (), {"acc": Score(0.71, 0.01)}, cut=0)
    >>> dense = ModelScore("dense", "07ab", "float32", (), (), {"acc": Score(0.75, 0.01)}, cut=0)
    >>> change = {"acc": Score(-0.04, 0.005)}  # item by item, and so with a smaller error than that of either mean
    >>> card = Scorecard("globalopt eval", model, dense, {"arc_easy": change}, change, {}, (), None, 8, {})
    >>> abs(card.average_changes["acc"].value) > 2 * card.average_changes["acc"].stderr
    True
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
"""Metrics that are averaged over tasks."""


def averages(tasks: Iterable[Mapping[str, Score]]) -> dict[str, Score]:
    """Compute the plain mean of every accuracy over the tasks that have it, treating their errors as independent.

    Args:
        tasks: for every task, its scores by metric.

    >>> found = averages([{"acc": Score(0.50, 0.03)}, {"acc": Score(0.70, 0.04)}])
    >>> round(found["acc"].value, 3), round(found["acc"].stderr, 3)
    (0.6, 0.025)
    """
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
