"""`globalopt eval`: perplexity, and KL to the dense model."""

# Heavy imports are inside the functions: `globalopt --help` must not wait for torch.
from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from globalopt.commands.arguments import named, set_up
from globalopt.commands.console import errors, out, print_json
from globalopt.commands.options import (
    BatchSize,
    Calibration,
    Device,
    Dtype,
    EvalText,
    Json,
    MaxMemory,
    Quiet,
    TextColumn,
    Trust,
)


def evaluate(
    target: Annotated[
        str | None,
        typer.Argument(help="A model, or a run folder. Left out: the reference model.", show_default=False),
    ] = None,
    dense: Annotated[
        str | None,
        typer.Option(help="Measure KL to this model. For a run: the model it compressed.", show_default=False),
    ] = None,
    calibration: Calibration = None,
    eval_text: EvalText = None,
    text_column: TextColumn = None,
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens per window. Left out: the run's, else 256.", show_default=False)
    ] = None,
    eval_windows: Annotated[
        int | None, typer.Option(help="Most windows of each split. Left out: the run's, else 128.", show_default=False)
    ] = None,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    max_memory: MaxMemory = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Perplexity on validation and test windows, and KL to the dense model.

    A run is measured on the windows it was made with, unless other ones are asked for.
    """
    with errors():
        from dataclasses import asdict, replace

        from globalopt import pipeline, workbench
        from globalopt.store import MANIFEST

        models = workbench.ModelOptions(named(target), allow_low_coverage=True)
        texts = workbench.TextOptions(nsamples=1)
        if target is not None and (Path(target) / MANIFEST).exists():
            run, recorded, texts = pipeline.recorded(Path(target))
            dense = dense or recorded.model or workbench.REFERENCE
            trust_remote_code = trust_remote_code or recorded.trust_remote_code
            models = replace(models, model=str(run.saved_model))
            if recorded.model is None and texts.calibration is None:
                texts = replace(texts, calibration=workbench.REFERENCE)
        models = replace(models, dtype=dtype, device=device, trust_remote_code=trust_remote_code, max_memory=max_memory)
        given = {
            "calibration": calibration,
            "eval_text": eval_text,
            "text_column": text_column,
            "seqlen": seqlen,
            "eval_windows": eval_windows,
        }
        chosen = {name: value for name, value in given.items() if value is not None}
        texts = replace(texts, batch_size=batch_size, **chosen)
        metrics = pipeline.evaluate_folder(set_up(models, texts, 0, quiet), dense)
        if as_json:
            print_json([asdict(m) for m in metrics])
        elif not quiet:
            from reports import metrics_table

            out.print(metrics_table(metrics))
