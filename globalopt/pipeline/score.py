"""Evaluate a saved model by perplexity and zero-shot tasks, and the dense model beside it (`globalopt eval`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from globalopt.errors import UsageError
from globalopt.evaluation.perplexity import evaluate, evaluate_both
from globalopt.evaluation.tasks import TaskResults, Tasks, ask, lm_eval_version
from globalopt.machine import ranks
from globalopt.models.finding import find_layers
from globalopt.models.identity import weights_sha256
from globalopt.models.layers import ModelLayers
from globalopt.models.loading import LoadedModel
from globalopt.models.streaming import dtype_of
from globalopt.pipeline.dense_source import dense_source
from globalopt.pipeline.options import REFERENCE, ModelOptions, TextOptions
from globalopt.pipeline.reporter import Reporter
from globalopt.pipeline.session import limits, load, load_from, set_up, versions
from globalopt.runs.cache import Cache
from globalopt.text.messages import Chat
from globalopt.text.reading import read_text
from globalopt.text.splits import consecutive_split
from globalopt.text.windows import Split
from globalopt.values.metrics import Metrics, WindowLosses
from globalopt.values.own_text import OwnText
from globalopt.values.scores import ACCURACIES, ModelScore, Score, Scorecard, averages


@dataclass(frozen=True)
class ScoreOptions:
    """Hold the options of an evaluation.

    Args:
        dense: the model to compare with, or None.
        dense_gguf_file: name of the GGUF file that it is read from, as in `ModelOptions`.
        splits: whether the validation and test windows of the calibration text are evaluated.
        texts: further texts by name, evaluated whole.
        tasks: zero-shot tasks, or None.
        limit: largest number of items per task; None is all.
    Raises:
        UsageError: `limit` is below 2, or a text has the name of a split.

    >>> ScoreOptions(dense="reference", splits=True, texts={"wiki": "wiki.txt"}).tasks is None
    True
    """

    dense: str | None
    splits: bool
    texts: Mapping[str, str]
    tasks: Tasks | None = None
    limit: int | None = None
    dense_gguf_file: str | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 2:
            raise UsageError(
                f"--tasks-limit must be at least 2 items, or there is no standard error; got {self.limit}."
            )
        if taken := sorted({"validation", "test"} & self.texts.keys()):
            raise UsageError(f"--ppl {taken[0]}= is the name of a split; choose another.")


def score(
    models: ModelOptions,
    texts: TextOptions,
    options: ScoreOptions,
    reporter: Reporter,
    command: str,
    cache: Cache | None = None,
    written: OwnText | None = None,
    keep: Callable[[WindowLosses], None] | None = None,
) -> Scorecard:
    """Evaluate a model, and the dense model on the same windows and items.

    Args:
        cache: where the dequantised copy of a quantised model is kept; see `dense_source`.
        written: the text that the dense model wrote in the run that made the model, or None.
        keep: called with the losses of every window of a split or text, where there is a dense model.
    Raises:
        GlobalOptError: a model, text or task cannot be loaded; see `set_up`, `evaluate` and `ask`.

    >>> from pathlib import Path
    >>> from globalopt.pipeline.example import example_reporter, example_text, example_tokenizer
    >>> from globalopt.reference.tiny import tiny_llama
    >>> tiny_llama().save_pretrained("model")
    >>> _ = example_tokenizer().save_pretrained("model")
    >>> _ = Path("text.txt").write_text(" ".join(example_text()))
    >>> models, texts = ModelOptions("model", allow_low_coverage=True), TextOptions(seqlen=16)
    >>> options = ScoreOptions(dense="model", splits=False, texts={"words": "text.txt"})
    >>> card = score(models, texts, options, example_reporter(), "globalopt eval")
    >>> [(metrics.split, metrics.perplexity < 100, abs(metrics.kl) < 1e-6) for metrics in card.model.metrics]
    [('words', True, True)]
    """
    if options.splits:
        session = set_up(models, texts, 0, reporter, cache, written)
        loaded, layers, splits = session.loaded, session.layers, [session.splits.validation, session.splits.test]
    else:
        source = dense_source(models, cache, reporter)
        with reporter.stage("load", 1, "models") as advance:
            (loaded, layers), splits = load(source, models), []
            advance("model")
    splits += [
        consecutive_split(
            loaded.tokenizer,
            read_text(path, texts.text_column, Chat.of(loaded.tokenizer, texts.bos)),
            name,
            texts.seqlen,
            None,
            **limits(loaded),
            bos=texts.bos,
        )
        for name, path in options.texts.items()
    ]
    dense = None
    if options.dense is not None:
        named = None if options.dense == REFERENCE else options.dense
        of_dense = replace(models, model=named, gguf_file=options.dense_gguf_file)
        dense = load_from(dense_source(of_dense, cache, reporter).name, models, like=loaded.model)

    metrics, dense_metrics = _evaluate(loaded, dense, splits, texts.batch_size, reporter, keep)
    answers = ranks.by_writer(
        lambda: [
            ask(each, options.tasks, options.limit, texts.batch_size, reporter.progress)
            for each in (loaded, dense)
            if each is not None and options.tasks is not None
        ]
    )
    mine, theirs = answers[:1], answers[1:]
    changes = _changes(mine[0], theirs[0]) if theirs else {}
    return Scorecard(
        command=command,
        model=_score(models.model or REFERENCE, loaded, layers, metrics, mine),
        dense=None
        if dense is None
        else _score(options.dense or REFERENCE, dense, find_layers(dense.model, True), dense_metrics, theirs),
        changes=changes,
        average_changes=averages(changes.values()),
        texts={split.name: split.record() for split in splits},
        missing=options.tasks.missing if options.tasks else (),
        limit=options.limit if options.tasks else None,
        batch_size=texts.batch_size,
        versions={**versions(), **({"lm-eval": lm_eval_version()} if options.tasks else {})},
    )


def _evaluate(
    loaded: LoadedModel,
    dense: LoadedModel | None,
    splits: Sequence[Split],
    batch_size: int,
    reporter: Reporter,
    keep: Callable[[WindowLosses], None] | None,
) -> tuple[list[Metrics], list[Metrics]]:
    """Compute the metrics of the model and of the dense one, per split."""
    metrics: list[Metrics] = []
    dense_metrics: list[Metrics] = []
    if not splits:
        return metrics, dense_metrics
    windows = sum(len(ranks.span(len(split.windows))) for split in splits)
    with reporter.stage("evaluate", windows, "windows") as advance:
        for split in splits:
            if dense is None:
                metrics.append(evaluate(loaded.model, split, None, batch_size, advance))
            else:
                theirs, mine = evaluate_both(loaded.model, dense.model, split, batch_size, advance, keep=keep)
                metrics.append(mine)
                dense_metrics.append(theirs)
    return metrics, dense_metrics


def _score(
    name: str, loaded: LoadedModel, layers: ModelLayers, metrics: Sequence[Metrics], answers: Sequence[TaskResults]
) -> ModelScore:
    """Collect the scores of one model."""
    tasks = tuple(task for each in answers for task in each.scores)
    return ModelScore(
        model=name,
        weights_sha256=weights_sha256(layers),
        dtype=str(dtype_of(loaded.model)).removeprefix("torch."),
        metrics=tuple(metrics),
        tasks=tasks,
        averages=averages(task.scores for task in tasks),
        cut=sum(each.cut for each in answers),
    )


def _changes(mine: TaskResults, theirs: TaskResults) -> dict[str, dict[str, Score]]:
    """Compute mean differences of accuracies over items, whose standard errors are smaller than those of either."""
    found: dict[str, dict[str, Score]] = {}
    for task, metrics in mine.items.items():
        found[task] = {
            metric: Score.mean([a - b for a, b in zip(values, theirs.items[task][metric], strict=True)])
            for metric, values in metrics.items()
            if metric in ACCURACIES and metric in theirs.items[task]
        }
    return found
