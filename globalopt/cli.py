"""The command line: options in, verbs of the pipeline out; every error is one line and an exit code.

0 done, 1 failed, 2 usage, 3 budget infeasible, 4 finished with fallbacks, 130 interrupted and resumable.
"""

# Heavy imports are inside the commands: `globalopt --help` must not wait for torch.
from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from globalopt.pipeline import Bench, ModelOptions, TextOptions
    from globalopt.protocols import Progress
    from globalopt.store import Run
    from globalopt.summary import Summary

app = typer.Typer(
    name="globalopt",
    help="Compress a trained language model into sparse + low-rank layers under one global budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
budget_app = typer.Typer(help="Look at budget files.", no_args_is_help=True)
app.add_typer(budget_app, name="budget")

DONE_WITH_FALLBACKS = 4
INTERRUPTED = 130

out = Console()
err = Console(stderr=True)

ModelArgument = Annotated[
    str | None,
    typer.Argument(help="Local folder or hub id. Left out: the bundled reference model.", show_default=False),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", "--model-name-or-path", help="The same as the argument.", show_default=False),
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16: what the model computes in.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
LowCoverage = Annotated[
    bool, typer.Option("--allow-low-coverage", help="Go on where under half of the block parameters is compressible.")
]
Calibration = Annotated[
    str | None,
    typer.Option(
        help="Text: .txt, .jsonl or .parquet file, a folder saved by datasets, or a hub data set ID[@CONFIG][:SPLIT].",
        show_default=False,
    ),
]
EvalText = Annotated[
    str | None,
    typer.Option(help="Another text for the test split. Left out: the end of --calibration.", show_default=False),
]
TextColumn = Annotated[str | None, typer.Option(help="Column of the text in a table.", show_default=False)]
Nsamples = Annotated[int, typer.Option(help="Calibration windows.")]
Seqlen = Annotated[int, typer.Option(help="Tokens per window.")]
EvalWindows = Annotated[int, typer.Option(help="Most windows of each evaluation split.")]
BatchSize = Annotated[int, typer.Option(help="Windows per forward pass.")]
Seed = Annotated[int, typer.Option(help="Of windows, labels and search.")]
Out = Annotated[Path | None, typer.Option(help="Run folder. Left out: runs/NAME made from the options.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Delete an earlier run in the folder and start over.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no tables.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Also a row per layer.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of tables.")]
Set = Annotated[
    list[str] | None,
    typer.Option(help="Solver options NAME=VALUE, comma separated; may be repeated.", metavar="NAME=VALUE"),
]


@app.command()
def search(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    budget: Annotated[float, typer.Option(help="Fraction kept of the compressible layers, in (0, 1].")] = 0.5,
    accounting: Annotated[str, typer.Option(help="Unit of the budget: params or bytes.")] = "params",
    pattern: Annotated[
        str, typer.Option(help="Of the sparse part: unstructured, or KEEP:OF such as 2:4.")
    ] = "unstructured",
    allocator: Annotated[str, typer.Option(help="uniform or knapsack.")] = "knapsack",
    allocator_set: Annotated[
        list[str] | None, typer.Option(help="Allocator options NAME=VALUE, comma separated.", metavar="NAME=VALUE")
    ] = None,
    solver: Annotated[str, typer.Option(help="magnitude, wanda, sparsegpt, oats, hassle-free or 3basil.")] = "3basil",
    solver_set: Annotated[
        list[str] | None,
        typer.Option("--set", help="Solver options NAME=VALUE, comma separated.", metavar="NAME=VALUE"),
    ] = None,
    sensitivity: Annotated[
        str, typer.Option(help="fisher: one backward sweep, predicted nats; none: output errors only.")
    ] = "fisher",
    span_scaling: Annotated[str, typer.Option(help="activation: split W D_x; none: split W.")] = "activation",
    calibration: Calibration = None,
    eval_text: EvalText = None,
    text_column: TextColumn = None,
    nsamples: Nsamples = 128,
    seqlen: Seqlen = 256,
    eval_windows: EvalWindows = 128,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    allow_low_coverage: LowCoverage = False,
    folder: Annotated[Path | None, typer.Option("--out", help="Run folder; by default made from the options.")] = None,
    fresh: Fresh = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Span, allocate, refine, evaluate and report: the whole job."""
    with _errors():
        from globalopt import pipeline

        options = pipeline.SearchOptions(
            budget,
            accounting,
            pattern,
            allocator,
            _pairs(allocator_set, "--allocator-set"),
            solver,
            _pairs(solver_set, "--set"),
            sensitivity,
            span_scaling,
            seed,
        )
        pipeline.check_options(options)
        models = pipeline.ModelOptions(
            _one_model(model, model_option), dtype, device, trust_remote_code, allow_low_coverage
        )
        texts = pipeline.TextOptions(calibration, eval_text, text_column, nsamples, seqlen, eval_windows, batch_size)
        name = f"{budget:g}{'' if accounting == 'params' else '-bytes'}"
        name += "" if pattern == "unstructured" else f"-{pattern.replace(':', 'of')}"
        folder = folder or _default_folder(models, f"{name}-{allocator}-{solver}-seed{seed}")
        bench = _bench(models, texts, seed, quiet, as_json)
        summary, run = pipeline.search(bench, options, folder, pipeline.run_command(), fresh)
        _show(summary, run, quiet, verbose, as_json)


@app.command()
def compress(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    budget_path: Annotated[Path, typer.Option("--budget-file", help="A budget.json that `search` wrote.")] = ...,  # pyright: ignore[reportArgumentType]
    solver: Annotated[str, typer.Option(help="magnitude, wanda, sparsegpt, oats, hassle-free or 3basil.")] = "3basil",
    solver_set: Annotated[
        list[str] | None,
        typer.Option("--set", help="Solver options NAME=VALUE, comma separated.", metavar="NAME=VALUE"),
    ] = None,
    calibration: Calibration = None,
    eval_text: EvalText = None,
    text_column: TextColumn = None,
    nsamples: Nsamples = 128,
    seqlen: Seqlen = 256,
    eval_windows: EvalWindows = 128,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    allow_low_coverage: LowCoverage = False,
    folder: Annotated[Path | None, typer.Option("--out", help="Run folder; by default made from the options.")] = None,
    fresh: Fresh = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Refine a found budget with any solver."""
    with _errors():
        from globalopt import budget_file, pipeline
        from solvers import get_solver

        file = budget_file.read(budget_path)
        options = _pairs(solver_set, "--set")
        get_solver(solver, options)
        models = pipeline.ModelOptions(
            _one_model(model, model_option), dtype, device, trust_remote_code, allow_low_coverage
        )
        texts = pipeline.TextOptions(calibration, eval_text, text_column, nsamples, seqlen, eval_windows, batch_size)
        folder = folder or _default_folder(models, f"{file.asked:g}-{file.allocator}-{solver}-refined-seed{seed}")
        bench = _bench(models, texts, seed, quiet, as_json)
        summary, run = pipeline.compress(
            bench, budget_path, file, solver, options, seed, folder, pipeline.run_command(), fresh
        )
        _show(summary, run, quiet, verbose, as_json)


@app.command(name="eval")
def evaluate(
    target: Annotated[
        str | None, typer.Argument(help="A model, or a run folder. Left out: the reference model.")
    ] = None,
    dense: Annotated[
        str | None,
        typer.Option(help="Measure KL to this model. For a run: the model it compressed.", show_default=False),
    ] = None,
    calibration: Calibration = None,
    eval_text: EvalText = None,
    text_column: TextColumn = None,
    seqlen: Seqlen = 256,
    eval_windows: EvalWindows = 128,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Perplexity on validation and test windows, and KL to the dense model."""
    with _errors():
        from dataclasses import asdict, replace

        from globalopt import pipeline

        if target is not None and (Path(target) / "manifest.json").exists():
            run, models, texts = pipeline.recorded(Path(target))
            dense = dense or models.model or pipeline.REFERENCE
            models = replace(models, model=str(run.model_folder), dtype=dtype, device=device)
            texts = replace(texts, seqlen=seqlen, eval_windows=eval_windows, batch_size=batch_size)
            if calibration or eval_text:
                texts = replace(texts, calibration=calibration or texts.calibration, eval_text=eval_text)
        else:
            models = pipeline.ModelOptions(target, dtype, device, trust_remote_code, True)
            texts = pipeline.TextOptions(calibration, eval_text, text_column, 1, seqlen, eval_windows, batch_size)
        bench = _bench(models, texts, 0, quiet, as_json)
        metrics = pipeline.evaluate_folder(bench, dense)
        if as_json:
            out.print_json(json.dumps([asdict(m) for m in metrics]))
        else:
            from reports import metrics_table

            out.print(metrics_table(metrics))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; several are compared.")],
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Tables and heatmaps of a run, or a comparison of several."""
    with _errors():
        from dataclasses import asdict

        import reports
        from globalopt.store import Run

        opened = [Run.open(folder) for folder in runs]
        summaries = [run.read_summary() for run in opened]
        if as_json:
            out.print_json(json.dumps([asdict(summary) for summary in summaries]))
        elif len(opened) == 1:
            _report(summaries[0], opened[0], verbose)
        else:
            out.print(reports.comparison(summaries, [str(folder) for folder in runs]))


@budget_app.command()
def show(path: Annotated[Path, typer.Argument(help="A budget.json.")]) -> None:
    """Print what a budget file gives to every layer."""
    with _errors():
        import reports
        from globalopt import budget_file

        out.print(reports.budget_file(budget_file.read(path)))


@budget_app.command()
def validate(
    path: Annotated[Path, typer.Argument(help="A budget.json.")],
    model: Annotated[str | None, typer.Option(help="Also check that it belongs to this model.")] = None,
) -> None:
    """Check that a budget file is whole and adds up."""
    with _errors():
        from globalopt import budget_file

        file = budget_file.read(path)
        if model is not None:
            from globalopt.layers import find_layers
            from globalopt.models import load_model, model_fingerprint, reference_folder

            source = str(reference_folder()) if model == "reference" else model
            layers = find_layers(load_model(source).model, allow_low_coverage=True)
            file.for_model(model_fingerprint(layers), layers.specs, path)
        share = file.used / file.limit
        out.print(
            f"{path}: valid. {len(file.layers)} layers, {file.used:,} of {file.limit:,} {file.accounting} ({share:.3%})."
        )


def main() -> None:
    """Entry point of the `globalopt` command."""
    app()


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Turn the error family and Ctrl-C into one line and an exit code."""
    from globalopt.errors import GlobalOptError

    # Library advice (deprecations, tokenizer hints) is for us, not for a user in the middle of a run.
    warnings.filterwarnings("ignore")
    try:
        yield
    except GlobalOptError as cause:
        err.print(f"[bold red]error[/] {_plain(cause)}", highlight=False, soft_wrap=True)
        raise typer.Exit(cause.exit_code) from None
    except KeyboardInterrupt:
        err.print("Interrupted. Run the same command again to go on from the last finished artefact.")
        raise typer.Exit(INTERRUPTED) from None


def _plain(cause: Exception) -> str:
    from rich.markup import escape

    return escape(re.sub(r"\s*\n\s*", " ", str(cause)))


def _pairs(texts: list[str] | None, option: str) -> dict[str, str]:
    from globalopt.errors import UsageError

    pairs: dict[str, str] = {}
    for text in (part for given in texts or () for part in given.split(",")):
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise UsageError(f"{option} takes NAME=VALUE; got '{text}'.")
        pairs[name.strip().replace("-", "_")] = value.strip()
    return pairs


def _one_model(argument: str | None, option: str | None) -> str | None:
    from globalopt.errors import UsageError

    if argument and option and argument != option:
        raise UsageError(f"Two models were given: {argument} and --model {option}. Give one.")
    return argument or option


def _default_folder(models: ModelOptions, name: str) -> Path:
    base = Path(models.model).name if models.model else "reference"
    return Path("runs") / f"{base}-{name}"


def _progress(quiet: bool) -> Progress:
    from reports import make_progress

    return make_progress(err, quiet)


def _bench(models: ModelOptions, texts: TextOptions, seed: int, quiet: bool, as_json: bool) -> Bench:
    from globalopt import pipeline
    from globalopt.resources import StageClock

    return pipeline.set_up(models, texts, seed, _progress(quiet), StageClock())


def _show(summary: Summary, run: Run, quiet: bool, verbose: bool, as_json: bool) -> None:
    from globalopt.types import Status

    if as_json:
        from dataclasses import asdict

        out.print_json(json.dumps(asdict(summary)))
    elif not quiet:
        _report(summary, run, verbose)
    if any(layer.status == Status.FALLBACK.value for layer in summary.layers):
        raise typer.Exit(DONE_WITH_FALLBACKS)


def _report(summary: Summary, run: Run, verbose: bool) -> None:
    import reports

    paths = reports.report(summary, run.report_folder, out, verbose)
    files: dict[str, Any] = {"budget": run.budget_path, "model": run.model_folder}
    for label, path in [*files.items(), *(("picture", path) for path in paths)]:
        out.print(f"{label:>8}  {path}", highlight=False, soft_wrap=True)
    out.print(
        f"    next  globalopt compress --budget-file {run.budget_path} --solver hassle-free",
        highlight=False,
        soft_wrap=True,
    )
