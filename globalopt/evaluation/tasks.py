"""Evaluate models on zero-shot tasks by lm-eval: its own from the hub, YAML tasks of the user, or local files.

Local files become task configs that hold their items: neither the network nor a cache is used for them.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from globalopt.errors import ArtefactError, NumericalError, UsageError, one_line
from globalopt.evaluation.task_files import CHOICES, CONTEXTS, PAPERS, TaskFile, find_task_files, read_task_file
from globalopt.models.loading import LoadedModel
from globalopt.models.streaming import lazy_blocks
from globalopt.protocols import Progress
from globalopt.values.scores import Score, TaskScore

PAPERS_WORD = "papers"
VERSION = "1"
"""Version that is recorded for tasks from local files."""

SPLIT = "test"
STEPS = 100
"""Steps of the progress over all requests of a task."""

FEWSHOT_SEED = 1234
"""lm-eval's default seed, for its tasks that draw examples for the prompt."""


@dataclass(frozen=True, eq=False)
class Tasks:
    """Hold the chosen tasks.

    Args:
        files: tasks in local files, by name.
        names: all tasks in the requested order; those that are not in `files` are lm-eval's.
        missing: those of `PAPERS` that were requested and that the folder lacks.
        manager: lm-eval's `TaskManager`, which loads its own tasks.

    >>> Tasks(files={}, names=("arc_easy", "piqa"), missing=(), manager=None).names
    ('arc_easy', 'piqa')
    """

    files: Mapping[str, TaskFile]
    names: tuple[str, ...]
    missing: tuple[str, ...]
    manager: Any


@dataclass(frozen=True, eq=False)
class TaskResults:
    """Hold the results of a model on tasks.

    Args:
        scores: one per task.
        items: by task and metric, the value of every item, where values are numbers.
        cut: requests whose beginning was cut off to fit into the model's context.

    >>> TaskResults(scores=(), items={"arc_easy": {"acc": (1.0, 0.0)}}, cut=0).items["arc_easy"]["acc"]
    (1.0, 0.0)
    """

    scores: tuple[TaskScore, ...]
    items: Mapping[str, Mapping[str, Sequence[float]]]
    cut: int


def choose_tasks(asked: str | None, folder: Path | None) -> Tasks:
    """Choose the tasks of `--tasks` and `--tasks-path`; local files are read, so that errors in them show early.

    Args:
        asked: names, separated by commas; `papers` stands for the eight of `PAPERS`. None: every file of the folder.
        folder: holds task files, and YAML tasks in lm-eval's format; no other tasks are known then. None: lm-eval's own
            tasks.
    Raises:
        UsageError: lm-eval is not installed, a task is unknown or named twice, or the folder is missing.
        CalibrationError: a task file is broken.

    >>> _ = Path("mine.jsonl").write_text('{"query": "He was one of", "choices": ["whale", "the"], "gold": 1}')
    >>> tasks = choose_tasks("mine", Path("."))
    >>> tasks.names, len(tasks.files["mine"].items)
    (('mine',), 1)
    """
    _require_lm_eval()
    files = {} if folder is None else find_task_files(folder)
    names, optional = _names(asked, files)
    if len(set(names)) < len(names):
        raise UsageError(f"--tasks {asked} names a task twice.")
    with _quiet():
        from lm_eval.tasks import TaskManager

        # Reading all of lm-eval's own takes seconds.
        others = [name for name in names if name not in files]
        paths = str(folder) if folder is not None and others else None
        manager = TaskManager(include_path=paths, include_defaults=folder is None)
    known = {*files, *manager.all_tasks}
    missing = tuple(name for name in names if name not in known)
    for name in missing:
        if name not in optional or folder is None:
            raise UsageError(_unknown(name, folder, known))
    names = tuple(name for name in names if name in known)
    if not names:
        raise UsageError(f"{folder} holds no task file" + (f" of {', '.join(missing)}." if missing else "."))
    return Tasks({name: read_task_file(files[name]) for name in names if name in files}, names, missing, manager)


def _names(asked: str | None, files: Mapping[str, Path]) -> tuple[tuple[str, ...], set[str]]:
    """Split `--tasks` into names; the second value holds those of a group, which the folder may lack."""
    if asked is None:
        return tuple(files), set()
    words = [word.strip() for word in asked.split(",") if word.strip()]
    if not words:
        raise UsageError(f"--tasks takes names separated by commas, or {PAPERS_WORD}; got '{asked}'.")
    names: list[str] = []
    for word in words:
        names += PAPERS if word == PAPERS_WORD else (word,)
    return tuple(names), {*PAPERS} if PAPERS_WORD in words else set()


def _unknown(name: str, folder: Path | None, known: set[str]) -> str:
    """Write the error message for a task that is not known."""
    if folder is not None:
        return f"{folder} holds no task '{name}'. There are: {', '.join(sorted(known)) or 'none'}."
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean '{close[0]}'?" if close else "."
    return f"lm-eval has no task '{name}'{hint} `lm-eval ls tasks` lists them all."


def _require_lm_eval() -> None:
    """Check that lm-eval is installed; `UsageError` otherwise."""
    try:
        with warnings.catch_warnings(action="ignore"):
            import lm_eval  # noqa: F401
    except ImportError:
        raise UsageError("Tasks need lm-eval. Install it with: pip install 'globalopt[eval]'") from None


def lm_eval_version() -> str:
    """Return the version of lm-eval that is installed.

    >>> lm_eval_version().startswith("0.")
    True
    """
    return version("lm_eval")


def ask(loaded: LoadedModel, tasks: Tasks, limit: int | None, batch_size: int, progress: Progress) -> TaskResults:
    """Evaluate a model on all items of the tasks, or on the first `limit` of each.

    Standard errors are those of the mean over items; a perplexity's by the delta method.

    Args:
        loaded: a model that is in memory as a whole.
        batch_size: requests at once.
    Raises:
        ArtefactError: a task's data cannot be read.
        UsageError: the model is loaded lazily, a task runs code that the model writes, or an answer is longer than the
            context.
        NumericalError: a logit is not finite.

    >>> from globalopt.models.loading import load_model
    >>> from globalopt.reference import reference_folder
    >>> from reports import QuietProgress
    >>> _ = Path("mine.jsonl").write_text('{"query": "He was one of", "choices": ["whale", "the"], "gold": 1}')
    >>> loaded = load_model(reference_folder(), device="cpu")
    >>> found = ask(loaded, choose_tasks("mine", Path(".")), None, batch_size=2, progress=QuietProgress())
    >>> found.scores[0].scores["acc"].value
    1.0
    """
    if lazy_blocks(loaded.model) is not None:
        raise UsageError("Tasks need a model that is in memory as a whole; raise --max-memory or leave it out.")
    with _quiet():
        from lm_eval.evaluator import evaluate

        asked = _load(tasks)
        for name, task in asked["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise UsageError(f"Task {name} runs code that the model writes, which is not allowed. Leave it out.")
        model = _model(loaded, batch_size, progress)
        with torch.no_grad():
            found: Any = evaluate(model, asked, limit=limit, bootstrap_iters=0)
    scores, items = [], {}
    for name in asked["tasks"]:
        items[name] = _item_values(found["samples"][name])
        scores.append(_task_score(name, tasks.files.get(name), found, items[name]))
    return TaskResults(tuple(scores), items, model.cut)


def _load(tasks: Tasks) -> Any:
    """Load the tasks into lm-eval, anew for every model, as its tasks store the answers of a model."""
    specs = [_config(tasks.files[name]) if name in tasks.files else name for name in tasks.names]
    try:
        found = tasks.manager.load(specs)
    # Data sets raise anything, from a missing network to a moved file.
    except Exception as cause:
        reason = one_line(cause)
        raise ArtefactError(
            f"The data of {', '.join(tasks.names)} cannot be read: {reason} Without a network, give local files with "
            "--tasks-path."
        ) from cause
    for task in found["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return found


def _config(file: TaskFile) -> dict[str, Any]:
    """Make the lm-eval config of a task from a local file."""
    from datasets import Dataset

    def items(**_: Any) -> dict[str, Dataset]:
        return {SPLIT: Dataset.from_list([dict(item) for item in file.items])}

    shared = {"task": file.name, "custom_dataset": items, "test_split": SPLIT, "metadata": {"version": VERSION}}
    accuracies = [{"metric": metric} for metric in ("acc", "acc_norm")[: 1 + file.normed]]
    if file.form == CHOICES:
        texts = {"doc_to_text": "query", "doc_to_choice": "choices", "doc_to_target": "gold"}
        return {**shared, **texts, "output_type": "multiple_choice", "metric_list": accuracies}
    if file.form == CONTEXTS:
        # lm-eval expresses several contexts in this way: `doc_to_text` is the index of the right one.
        texts = {"doc_to_text": "gold", "doc_to_choice": "contexts", "doc_to_target": "continuation"}
        return {**shared, **texts, "output_type": "multiple_choice", "metric_list": accuracies[:1]}
    texts = {"doc_to_text": "context", "doc_to_target": "continuation"}
    metrics = [{"metric": "perplexity"}, {"metric": "acc"}]
    return {**shared, **texts, "output_type": "loglikelihood", "metric_list": metrics}


def _item_values(samples: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, ...]]:
    """Collect the values of all items by metric, and by filter where it is not the default; only numbers."""
    found: dict[str, list[Any]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            found.setdefault(_metric_name(metric, sample["filter"]), []).append(sample[metric])
    return {
        metric: tuple(float(value) for value in values)
        for metric, values in found.items()
        if all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)
    }


def _metric_name(metric: str, chosen: str) -> str:
    """Name a metric with its filter, where that is not the default."""
    return metric if chosen == "none" else f"{metric}@{chosen}"


def _task_score(
    name: str, file: TaskFile | None, found: Mapping[str, Any], items: Mapping[str, Sequence[float]]
) -> TaskScore:
    """Convert lm-eval's results on a task; `NumericalError` where one is not finite."""
    scores = {}
    for key, value in found["results"][name].items():
        metric, comma, chosen = key.partition(",")
        if comma and isinstance(value, (int, float)) and not metric.endswith("_stderr"):
            metric = _metric_name(metric, chosen)
            if not math.isfinite(value):
                raise NumericalError(f"{metric} of task {name} came out as {value}; the model is broken.")
            scores[metric] = Score(float(value), _stderr(float(value), items.get(metric, ())))
    return TaskScore(
        name=name,
        version=str(found["versions"][name]),
        source="lm-eval" if file is None else file.path.name,
        sha256=None if file is None else file.sha256,
        items=found["n-samples"][name]["effective"],
        scores=scores,
    )


def _stderr(value: float, items: Sequence[float]) -> float | None:
    """Compute the standard error of `value`, where it is the mean of the items or `exp(-mean)`; None otherwise."""
    if len(items) < 2:
        return None
    mean = Score.mean(items)
    assert mean.stderr is not None, "there are two items"
    if math.isclose(value, mean.value, rel_tol=1e-6, abs_tol=1e-9):
        return mean.stderr
    if mean.value <= 0 and math.isclose(math.log(max(value, 1e-300)), -mean.value, rel_tol=1e-6):
        return value * mean.stderr
    return None


def _model(loaded: LoadedModel, batch_size: int, progress: Progress) -> Any:
    """Wrap a model for lm-eval, with progress, and with an error where a logit is not finite."""
    from lm_eval.models import huggingface

    # Untyped: type checkers lose its members behind a decorator.
    base: Any = huggingface.HFLM

    class Model(base):
        cut = 0

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            with self.shown(len(requests)):
                return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            with self.shown(len(requests)):
                return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            with self.shown(len(requests)):
                return super().generate_until(requests, disable_tqdm=True)

        @contextlib.contextmanager
        def shown(self, total: int) -> Iterator[None]:
            # A log line for each of many thousands would be too many.
            with progress.stage("tasks", STEPS, f"% of {total} requests") as advance:
                self.cache_hook = _ProgressHook(total, advance)
                yield

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            for (_, text), context, answer in requests:
                if len(answer) > self.max_length:
                    raise UsageError(
                        f"An answer has {len(answer)} tokens, and the model a context of {self.max_length}: "
                        f"'{text.strip()[:40]}'... Leave its task out."
                    )
                self.cut += len(context) + len(answer) > self.max_length + 1
            return super()._loglikelihood_tokens(requests, *args, **kwargs)

        def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            logits = super()._model_call(inps, *args, **kwargs)
            if not torch.isfinite(logits).all():
                raise NumericalError(
                    "The logits of a task are not finite; a weight is broken, or --dtype is too narrow."
                )
            return logits

    return Model(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size, softmax_dtype="float32")


class _ProgressHook:
    """Count answers through the hook of lm-eval's cache, and advance a stage of `STEPS` steps."""

    def __init__(self, total: int, advance: Callable[[str], None]) -> None:
        self.total, self.answered, self.advance = total, 0, advance

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        """Count one answer; lm-eval calls this to store it."""
        before = self.answered * STEPS // self.total
        self.answered += 1
        for _ in range(before, self.answered * STEPS // self.total):
            self.advance("")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings and progress bars of lm-eval."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            from lm_eval.api import task

            shown: Any = task.tqdm
            changed: Any = task
            changed.tqdm = functools.partial(shown, disable=True)
            try:
                yield
            finally:
                changed.tqdm = shown
    finally:
        logger.setLevel(level)
