"""`globalopt eval`: measure perplexity, KL to the dense model, and zero-shot tasks."""

# Heavy imports are inside the functions: `globalopt --help` must not wait for torch.
from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from globalopt.commands.arguments import chosen_cache, named
from globalopt.commands.console import err, out, print_json
from globalopt.commands.options import (
    BatchSize,
    CacheFolder,
    Calibration,
    Device,
    Dtype,
    EvalText,
    GGUFFile,
    Json,
    MaxMemory,
    QuietScores,
    TextColumn,
    Trust,
)
from globalopt.commands.processes import together


def evaluate(
    target: Annotated[
        str | None,
        typer.Argument(
            help="A model, a run folder, or a packed or adapter export. If it is left out, the bundled model is used.",
            show_default=False,
        ),
    ] = None,
    gguf_file: GGUFFile = None,
    dense: Annotated[
        str | None,
        typer.Option(
            help="The dense model to compare with; `reference` is the bundled one. A run has its own by default.",
            show_default=False,
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Zero-shot tasks, separated by commas; `papers` stands for piqa, hellaswag, arc_easy, arc_challenge, "
            "winogrande, rte, openbookqa and boolq. Tasks need lm-eval.",
            metavar="NAME[,...]",
            show_default=False,
        ),
    ] = None,
    tasks_path: Annotated[
        Path | None,
        typer.Option(
            help="Folder to read tasks from instead of the hub: .jsonl or .parquet files, or YAML tasks in the format "
            "of lm-eval. Without --tasks, every file in it is a task. A YAML task that is named may run its own code.",
            show_default=False,
        ),
    ] = None,
    tasks_limit: Annotated[
        int | None,
        typer.Option(
            help="Largest number of items per task. If it is left out, all items are used.", show_default=False
        ),
    ] = None,
    ppl: Annotated[
        list[str] | None,
        typer.Option(
            "--ppl",
            help="Another text to measure as a whole, in windows of --seqlen; may be repeated.",
            metavar="NAME=TEXT",
        ),
    ] = None,
    calibration: Calibration = None,
    eval_text: EvalText = None,
    text_column: TextColumn = None,
    seqlen: Annotated[
        int | None,
        typer.Option(
            help="Number of tokens per window. If it is left out, that of the run is used, or 256.", show_default=False
        ),
    ] = None,
    eval_windows: Annotated[
        int | None,
        typer.Option(
            help="Largest number of windows per part. If it is left out, that of the run is used, or 128.",
            show_default=False,
        ),
    ] = None,
    bos: Annotated[
        str | None,
        typer.Option(
            help="Whether every window begins with the BOS token: auto, yes or no. If it is left out, that of the run "
            "is used, or auto.",
            show_default=False,
        ),
    ] = None,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    max_memory: MaxMemory = None,
    cache: CacheFolder = None,
    quiet: QuietScores = False,
    as_json: Json = False,
) -> None:
    """Measure perplexity, KL to the dense model and zero-shot tasks, and compare with the dense model.

    A run is measured on its own windows, unless options choose others.
    The result is kept in its folder as eval.json, and in its report where the run left the evaluation out.
    Any other model is measured on validation and test windows of --calibration.
    With --tasks or --ppl, --calibration may be left out.
    """
    with together():
        from dataclasses import asdict, replace

        from globalopt.errors import ArtefactError, UsageError
        from globalopt.machine import ranks
        from globalopt.pipeline import score, session
        from globalopt.pipeline.live import IN_MEMORY
        from globalopt.pipeline.measure import complete
        from globalopt.pipeline.options import REFERENCE, ModelOptions, TextOptions
        from globalopt.pipeline.reporter import Reporter
        from globalopt.runs.artefacts import OWN_TEXT, SCORES
        from globalopt.runs.files import advising, is_there
        from globalopt.runs.folder import MANIFEST
        from globalopt.values.metrics import WindowLosses
        from reports import make_progress

        models = ModelOptions(named(target), allow_low_coverage=True, gguf_file=gguf_file)
        texts = TextOptions(nsamples=1)
        run, dense_file, own = None, None, False
        if target is not None and is_there(Path(target) / MANIFEST):
            run, recorded, texts = session.recorded(Path(target))
            if recorded.in_memory and dense is None:
                raise UsageError(f"{target} was made of a model in memory; say where it is with --dense MODEL.")
            if texts.calibration == IN_MEMORY and calibration is None:
                raise UsageError(f"{target} was made with a text in memory; say where it is with --calibration TEXT.")
            if dense is None:
                dense, dense_file, own = recorded.model or REFERENCE, recorded.gguf_file, True
            trust_remote_code = trust_remote_code or recorded.trust_remote_code
            models = replace(models, model=str(run.saved_model))
            if recorded.model is None and texts.calibration is None:
                texts = replace(texts, calibration=REFERENCE)
        models = replace(models, dtype=dtype, device=device, trust_remote_code=trust_remote_code, max_memory=max_memory)
        given = {
            "calibration": calibration,
            "eval_text": eval_text,
            "text_column": text_column,
            "seqlen": seqlen,
            "eval_windows": eval_windows,
            "bos": bos,
        }
        chosen = {name: value for name, value in given.items() if value is not None}
        texts = replace(texts, batch_size=batch_size, **chosen)
        written = None if run is None or calibration is not None else run.find(OWN_TEXT, None)
        if written is None and any(part.own for part in texts.parts):
            raise UsageError(
                "--calibration self is written by the dense model while a run is made, and kept in the run. Give the "
                "run, or another text."
            )
        asked = tasks is not None or tasks_path is not None
        others = named_texts(ppl)
        splits = models.model is None or texts.calibration is not None or not (asked or others)
        options = score.ScoreOptions(dense, splits, others, limit=tasks_limit, dense_gguf_file=dense_file)
        if asked:
            from globalopt.evaluation.tasks import choose_tasks

            options = replace(options, tasks=choose_tasks(tasks, tasks_path))
        # No option chooses what is written: the result of a run, and hidden states that memory has no room for.
        with advising(""):
            shown, command = Reporter(make_progress(err, quiet or not ranks.writer())), session.run_command()
            home = chosen_cache(Path("runs") / "any" if run is None else run.folder, cache, no_cache=False)
            losses: list[WindowLosses] = []
            scores = score.score(models, texts, options, shown, command, home, written, losses.append)
        if as_json:
            print_json(asdict(scores))
        else:
            from reports import render_scores

            render_scores(scores, out)
        if run is not None and ranks.writer():
            try:
                with advising(""):
                    run.put(SCORES, None, scores)
                    if own and complete(run, scores, losses, shown.costs):
                        shown.note(f"The run had no figures yet and keeps these: see globalopt report {run.folder}")
            except ArtefactError as cause:
                err.print(f"The result is not kept in the run. {cause}", soft_wrap=True, highlight=False, markup=False)


def named_texts(words: list[str] | None) -> dict[str, str]:
    """Read repeated NAME=TEXT pairs; `UsageError` for anything else."""
    from globalopt.errors import UsageError

    found: dict[str, str] = {}
    for word in words or ():
        name, equals, text = (part.strip() for part in word.partition("="))
        if not (name and equals and text) or name in found:
            raise UsageError(f"--ppl takes NAME=TEXT, every name once; got '{word}'.")
        found[name] = text
    return found
