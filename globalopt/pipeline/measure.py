"""Measure the saved model of a run beside the dense one, at the end of the run or later, and record the figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from globalopt.evaluation.perplexity import evaluate_both
from globalopt.evaluation.samples import write_samples
from globalopt.export.card import write_card
from globalopt.machine import ranks
from globalopt.pipeline.options import TextOptions
from globalopt.pipeline.reporter import Reporter
from globalopt.pipeline.session import Session, load_from
from globalopt.runs.artefacts import SAMPLES, SUMMARY, WINDOWS
from globalopt.runs.folder import Run
from globalopt.values.metrics import Metrics, WindowLosses
from globalopt.values.results import Summary
from globalopt.values.scores import Scorecard
from globalopt.values.stage_cost import StageCost

STAGES = ("evaluate", "samples")
"""Stages of a measurement, which `--no-evaluate` leaves out."""


def evaluate_saved(
    session: Session, reporter: Reporter, run: Run, dense: Callable[[], PreTrainedModel]
) -> tuple[tuple[Metrics, ...], tuple[Metrics, ...]]:
    """Evaluate the dense model and the saved one on validation and test windows, and write samples of both.

    Args:
        run: with a saved model; the losses of the windows, and the samples, are written into it.
        dense: gives the dense model.
    Returns:
        The metrics of the dense model, then those of the saved one; one per split.

    >>> from pathlib import Path
    >>> from globalopt.pipeline.example import example_plan, example_reporter, example_session
    >>> from globalopt.pipeline.search import search
    >>> session = example_session()
    >>> _, run = search(session, example_reporter(), example_plan(), Path("one"), "globalopt search")
    >>> dense, compressed = evaluate_saved(session, example_reporter(), run, session.dense)
    >>> dense[0].kl, compressed[0].kl > 0
    (None, True)
    """
    splits = (session.splits.validation, session.splits.test)
    windows = sum(len(ranks.span(len(split.windows))) for split in splits)
    with reporter.stage("evaluate", windows, "windows") as advance:
        original = dense()
        saved = load_from(str(run.model_folder), session.model_options, like=session.loaded.model)
        size = session.text_options.batch_size
        losses: list[WindowLosses] = []
        pairs = [
            evaluate_both(
                saved.model, original, split, size, advance, session.scratch(run.folder, split), losses.append
            )
            for split in splits
        ]
    if ranks.writer():
        run.put(WINDOWS, None, tuple(losses))
    if (count := session.text_options.samples) and ranks.writer():
        with reporter.stage("samples", 2, "models") as advance:
            written = write_samples(original, saved.model, saved.tokenizer, splits[0], count, advance)
        run.put(SAMPLES, None, written)
    return tuple(metrics for metrics, _ in pairs), tuple(compressed for _, compressed in pairs)


def is_whole(run: Run, texts: TextOptions) -> bool:
    """Tell whether a run has finished, and was measured if the options ask for it.

    >>> from pathlib import Path
    >>> with Run.start(Path("new"), {}, {}) as run:
    ...     is_whole(run, TextOptions())
    False
    """
    return run.has(SUMMARY, None) and (not texts.evaluate or bool(run.summary().compressed))


def gone_on(session: Session, reporter: Reporter, run: Run) -> Summary:
    """Return the summary of a finished run; first measure its model if the options ask for it and that was left out.

    >>> from pathlib import Path
    >>> from globalopt.pipeline.example import example_plan, example_reporter, example_session
    >>> from globalopt.pipeline.search import search
    >>> session = example_session()
    >>> summary, run = search(session, example_reporter(), example_plan(), Path("two"), "globalopt search")
    >>> gone_on(session, example_reporter(), run) == summary
    True
    """
    if ranks.told(is_whole(run, session.text_options)):
        reporter.note(f"{run.folder} is finished; nothing was computed again.")
        return run.summary()
    reporter.note(f"{run.folder} is finished but for its evaluation, which is done now.")
    return measure_later(session, reporter, run)


def measure_later(session: Session, reporter: Reporter, run: Run) -> Summary:
    """Measure the model of a finished run that left the evaluation out, and record the figures in its summary.

    The session's model must still be the dense one.

    >>> from pathlib import Path
    >>> from globalopt.pipeline.example import example_plan, example_reporter, example_session
    >>> from globalopt.pipeline.search import search
    >>> session, unmeasured = example_session(), TextOptions(nsamples=4, seqlen=16, eval_windows=2, evaluate=False)
    >>> quick = replace(session, text_options=unmeasured)
    >>> summary, run = search(quick, example_reporter(), example_plan(), Path("three"), "globalopt search")
    >>> summary.compressed
    ()
    >>> [metrics.split for metrics in measure_later(example_session(), example_reporter(), run).compressed]
    ['validation', 'test']
    """
    dense, compressed = evaluate_saved(session, reporter, run, lambda: session.loaded.model)
    if ranks.writer():
        _record(run, dense, compressed, reporter.costs)
    ranks.written(run)
    return ranks.told(run.summary())


def complete(run: Run, scores: Scorecard, losses: Sequence[WindowLosses], costs: Sequence[StageCost]) -> bool:
    """Record what `globalopt eval` measured of a run that left the evaluation out, where it used the run's windows.

    Args:
        scores: of the run's model, beside the dense model that it was made from.
        losses: of the windows of every split and text.
        costs: of the stages of the evaluation.
    Returns:
        whether the run was completed: False if it had figures, or if other windows were measured.

    >>> from globalopt.export.example import example_run
    >>> from globalopt.values.scores import ModelScore
    >>> run = Run.open(example_run())
    >>> score = ModelScore("tiny", "9f2c", "float32", (), (), {}, cut=0)
    >>> complete(run, Scorecard("globalopt eval", score, score, {}, {}, {}, (), None, 8, {}), [], [])
    False
    """
    if scores.dense is None or not run.has(SUMMARY, None) or run.summary().compressed:
        return False
    windows = {name: made.get("sha256") for name, made in run.summary().splits.items()}
    pairs = [
        (dense, compressed)
        for dense, compressed in zip(scores.dense.metrics, scores.model.metrics, strict=True)
        if windows.get(compressed.split) == compressed.text_sha256
    ]
    if [compressed.split for _, compressed in pairs] != ["validation", "test"]:
        return False
    run.put(WINDOWS, None, tuple(each for each in losses if each.split in ("validation", "test")))
    _record(run, [dense for dense, _ in pairs], [compressed for _, compressed in pairs], costs)
    return True


def _record(run: Run, dense: Sequence[Metrics], compressed: Sequence[Metrics], costs: Sequence[StageCost]) -> None:
    """Write the figures into the summary and the card of a finished run."""
    summary = run.summary()
    stages = (*summary.stages, *(cost for cost in costs if cost.name in STAGES))
    summary = replace(summary, dense=tuple(dense), compressed=tuple(compressed), stages=stages)
    # The card that is there names licence and base model.
    write_card(run.model_folder, run, summary, run.model_folder, "dense")
    run.put(SUMMARY, None, summary)
