"""The command line: options in, verbs of the pipeline out; every error is one line and an exit code.

0 done, 1 failed, 2 usage, 3 budget infeasible, 4 finished with fallbacks, 130 interrupted and resumable.
"""

# Heavy imports are inside the commands: `globalopt --help` must not wait for torch.
from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from globalopt.store import Run
    from globalopt.summary import Family, Summary
    from globalopt.workbench import Bench, ModelOptions, TextOptions

app = typer.Typer(
    name="globalopt",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
budget_app = typer.Typer(help="Look at budget files.", no_args_is_help=True)
app.add_typer(budget_app, name="budget")

FAILED = 1
DONE_WITH_FALLBACKS = 4
INTERRUPTED = 130

BUDGET = 0.5
ALLOCATOR = "auto"

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
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
LowCoverage = Annotated[
    bool, typer.Option("--allow-low-coverage", help="Go on where under half of the block parameters is compressible.")
]
SolverName = Annotated[str, typer.Option("--solver", help="What fits the layers; `globalopt list` shows them all.")]
SolverSet = Annotated[
    list[str] | None,
    typer.Option("--set", help="Solver options, comma separated; may be repeated.", metavar="NAME=VALUE"),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        # The backslash keeps rich from reading markup.
        help=r"Text: .txt, .jsonl or .parquet file, a folder saved by datasets, hub data set ID\[@CONFIG][:SPLIT], or "
        "`reference`: the bundled one.",
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
BatchSize = Annotated[int, typer.Option(help="Windows per forward pass.", max=2**20)]
Seed = Annotated[int, typer.Option(help="Of windows, labels and search.", min=0, max=2**32 - 1)]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="Run folder. Left out: runs/NAME, made from the options.", show_default=False),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Delete an earlier run in the folder and start over.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no tables.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Also a row per layer.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of tables.")]
BudgetPath = Annotated[Path, typer.Argument(help="A budget.json.", show_default=False)]


def _print_version(asked: bool) -> None:
    if asked:
        import globalopt

        out.out(f"globalopt {globalopt.__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Compress a trained language model into sparse + low-rank layers under one global budget."""


@app.command()
def search(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Fraction kept of the compressible layers, in (0, 1]. Several, comma separated: a family of budget "
            "files, each within the next larger one; nothing is refined.",
            metavar="FRACTION[,...]",
            show_default=str(BUDGET),
        ),
    ] = None,
    frontier: Annotated[bool, typer.Option("--frontier", help="A family of budgets: 0.1, 0.15, ... 0.9.")] = False,
    accounting: Annotated[str, typer.Option(help="Unit of the budget: params or bytes.")] = "params",
    pattern: Annotated[
        str, typer.Option(help="Of the sparse part: unstructured, or KEEP:OF such as 2:4.")
    ] = "unstructured",
    allocator: Annotated[
        str | None,
        typer.Option(help="What divides the budget; `globalopt list` shows them all.", show_default=ALLOCATOR),
    ] = None,
    allocator_set: Annotated[
        list[str] | None,
        typer.Option(help="Allocator options, comma separated; may be repeated.", metavar="NAME=VALUE"),
    ] = None,
    solver: SolverName = "3basil",
    solver_set: SolverSet = None,
    sensitivity: Annotated[
        str, typer.Option(help="fisher: one backward sweep, predicted nats; none: output errors only.")
    ] = "fisher",
    span_scaling: Annotated[
        str, typer.Option(help="activation: split W D_x; none: W; output: also by A; direct: whitened SVD.")
    ] = "activation",
    pricing: Annotated[
        str, typer.Option(help="fit: calibrate predictions on a few real fits per layer; span: trust the spans.")
    ] = "fit",
    candidates: Annotated[
        str, typer.Option(help="What a search asks the model about: fit (scaled fits), span, or auto.")
    ] = "auto",
    search_tokens: Annotated[
        int,
        typer.Option(
            help="Forward tokens a search on the true loss may spend; of a family, 0 measures nothing.", min=0
        ),
    ] = 500_000,
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
    folder: Out = None,
    fresh: Fresh = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Span, allocate, refine, evaluate and report: the whole job."""
    with _errors():
        from dataclasses import replace

        from globalopt import family, pipeline, stages, workbench
        from globalopt.errors import UsageError
        from globalopt.store import Run

        budgets = _budgets(budget, family.FRONTIER if frontier else None)
        several = len(budgets) > 1
        if several and allocator not in (None, family.ALLOCATOR):
            raise UsageError(f"A family of budgets is made by the nested knapsack; leave out --allocator {allocator}.")
        allocator = family.ALLOCATOR if several else allocator or ALLOCATOR
        if not several and not search_tokens:
            raise UsageError("--search-tokens 0 is for a family of budgets; of one budget it must be at least 1.")
        options = stages.SearchOptions(
            budget=budgets[0],
            accounting=accounting,
            pattern=pattern,
            allocator=allocator,
            allocator_options=_pairs(allocator_set, "--allocator-set"),
            solver=solver,
            solver_options=_pairs(solver_set, "--set"),
            sensitivity=sensitivity,
            scaling=span_scaling,
            pricing=pricing,
            candidates=candidates,
            search_tokens=search_tokens,
            seed=seed,
        )
        for kept in budgets:
            stages.check_options(replace(options, budget=kept))
        models = workbench.ModelOptions(
            _one_model(model, model_option), dtype, device, trust_remote_code, allow_low_coverage
        )
        texts = workbench.TextOptions(calibration, eval_text, text_column, nsamples, seqlen, eval_windows, batch_size)
        variant = "" if accounting == "params" else "-bytes"
        variant += "" if pattern == "unstructured" else f"-{pattern.replace(':', 'of')}"
        name = f"family{variant}" if several else f"{budgets[0]:g}{variant}-{allocator}"
        folder = folder or _default_folder(models, f"{name}-{solver}-seed{seed}")
        Run.check_folder(folder)
        bench = _bench(models, texts, seed, quiet)
        command = pipeline.run_command()
        if several:
            found, run = family.family(bench, options, budgets, folder, command, fresh, leave_out=frontier)
            _show_family(found, run, quiet, as_json)
        else:
            _show(*pipeline.search(bench, options, folder, command, fresh), quiet, verbose, as_json)


@app.command()
def compress(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    *,
    budget_path: Annotated[
        Path, typer.Option("--budget-file", help="A budget.json that `search` wrote.", show_default=False)
    ],
    solver: SolverName = "3basil",
    solver_set: SolverSet = None,
    sensitivity: Annotated[
        str, typer.Option(help="fisher: a backward sweep weights outputs, for solvers that can; none: inputs only.")
    ] = "fisher",
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
    folder: Out = None,
    fresh: Fresh = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Refine a found budget with any solver."""
    with _errors():
        from globalopt import budget_file, pipeline, workbench
        from globalopt.store import Run
        from solvers import get_solver

        file = budget_file.read(budget_path)
        options = _pairs(solver_set, "--set")
        get_solver(solver, options)
        models = workbench.ModelOptions(
            _one_model(model, model_option), dtype, device, trust_remote_code, allow_low_coverage
        )
        texts = workbench.TextOptions(calibration, eval_text, text_column, nsamples, seqlen, eval_windows, batch_size)
        folder = folder or _default_folder(models, f"{file.asked:g}-{file.allocator}-{solver}-refined-seed{seed}")
        Run.check_folder(folder)
        bench = _bench(models, texts, seed, quiet)
        summary, run = pipeline.compress(
            bench, budget_path, file, solver, options, seed, folder, pipeline.run_command(), fresh, sensitivity
        )
        _show(summary, run, quiet, verbose, as_json)


@app.command(name="eval")
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
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Perplexity on validation and test windows, and KL to the dense model.

    A run is measured on the windows it was made with, unless other ones are asked for.
    """
    with _errors():
        from dataclasses import asdict, replace

        from globalopt import pipeline, workbench
        from globalopt.store import MANIFEST

        models = workbench.ModelOptions(_named(target), allow_low_coverage=True)
        texts = workbench.TextOptions(nsamples=1)
        if target is not None and (Path(target) / MANIFEST).exists():
            run, recorded, texts = pipeline.recorded(Path(target))
            dense = dense or recorded.model or workbench.REFERENCE
            trust_remote_code = trust_remote_code or recorded.trust_remote_code
            models = replace(models, model=str(run.saved_model))
            if recorded.model is None and texts.calibration is None:
                texts = replace(texts, calibration=workbench.REFERENCE)
        models = replace(models, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        given = {
            "calibration": calibration,
            "eval_text": eval_text,
            "text_column": text_column,
            "seqlen": seqlen,
            "eval_windows": eval_windows,
        }
        chosen = {name: value for name, value in given.items() if value is not None}
        texts = replace(texts, batch_size=batch_size, **chosen)
        metrics = pipeline.evaluate_folder(_bench(models, texts, 0, quiet), dense)
        if as_json:
            _print_json([asdict(m) for m in metrics])
        elif not quiet:
            from reports import metrics_table

            out.print(metrics_table(metrics))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; several are compared.", show_default=False)],
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Tables and heatmaps of a run, or a comparison of several."""
    with _errors():
        from dataclasses import asdict

        import reports
        from globalopt.store import Run

        opened = [Run.open(folder) for folder in runs]
        if len(opened) == 1 and opened[0].family_path.exists():
            _show_family(opened[0].read_family(), opened[0], quiet=False, as_json=as_json)
            return
        summaries = [run.read_summary() for run in opened]
        if as_json:
            _print_json([asdict(summary) for summary in summaries])
        elif len(opened) == 1:
            _report(summaries[0], opened[0], verbose)
        else:
            out.print(reports.comparison(summaries, [str(folder) for folder in runs]))


@app.command(name="list")
def list_methods() -> None:
    """Print the solvers and allocators there are, with their papers and options."""
    with _errors():
        from rich.table import Table
        from rich.text import Text

        from allocators import ALLOCATORS
        from solvers import SOLVERS

        for kind, option, methods in (("solver", "--set", SOLVERS), ("allocator", "--allocator-set", ALLOCATORS)):
            table = Table(box=None, pad_edge=False)
            for heading in (f"--{kind}", "paper", f"what it does, and what {option} may change"):
                table.add_column(heading, overflow="fold")
            for name, method in methods.items():
                what = (method.__doc__ or "").partition("\n")[0]
                defaults = _defaults(method)
                options = Text(f"\n{' '.join(f'{name}={value}' for name, value in defaults.items())}", "dim")
                table.add_row(name, method.paper, Text.assemble(what, options if defaults else ""))
            out.print(table, "", sep="")


@budget_app.command()
def show(path: BudgetPath) -> None:
    """Print what a budget file gives to every layer."""
    with _errors():
        import reports
        from globalopt import budget_file

        out.print(reports.budget_file(budget_file.read(path)))


@budget_app.command()
def validate(
    path: BudgetPath,
    model: Annotated[
        str | None, typer.Option(help="Also check that it belongs to this model.", show_default=False)
    ] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Check that a budget file is whole and adds up."""
    with _errors():
        from globalopt import budget_file

        file = budget_file.read(path)
        if model is not None:
            from globalopt.layers import find_layers
            from globalopt.models import load_model, model_fingerprint, reference_folder

            source = _named(model) or str(reference_folder())
            loaded = load_model(source, device="cpu", trust_remote_code=trust_remote_code)
            layers = find_layers(loaded.model, allow_low_coverage=True)
            file.for_model(model_fingerprint(layers), layers.specs, path)
        share = file.used / file.limit
        out.out(
            f"{path}: valid. {len(file.layers)} layers, {file.used:,} of {file.limit:,} {file.accounting} "
            f"({share:.3%}).",
            highlight=False,
        )


def main() -> None:
    """Entry point of the `globalopt` command."""
    # The hub's client reads it when it is imported; its retries would bury the one line that says what is wrong.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    for stream in (sys.stdout, sys.stderr):
        # A terminal or file that has no letter for a sign must not lose the result of a long run.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    app()


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Turn the error family, exhausted memory and Ctrl-C into one line and an exit code."""
    from globalopt.errors import GlobalOptError

    try:
        # Library advice (deprecations, tokenizer hints) is for us, not for a user in the middle of a run.
        with warnings.catch_warnings(action="ignore"):
            yield
    except GlobalOptError as cause:
        raise _exit(str(cause), cause.exit_code) from None
    except _out_of_memory() as cause:
        raise _exit(
            f"Out of memory ({cause}). Lower --batch-size, --seqlen or --nsamples, or use --dtype bfloat16.", FAILED
        ) from None
    except KeyboardInterrupt:
        err.out("Interrupted. Run the same command again to go on from the last finished artefact.", highlight=False)
        raise typer.Exit(INTERRUPTED) from None


def _exit(message: str, code: int) -> typer.Exit:
    from rich.text import Text

    line = re.sub(r"\s*[\r\n]\s*", " ", message.strip())
    err.print(Text.assemble(("error: ", "bold red"), line), soft_wrap=True)
    return typer.Exit(code)


def _out_of_memory() -> tuple[type[Exception], ...]:
    import torch

    return MemoryError, torch.OutOfMemoryError


def _budgets(text: str | None, frontier: Sequence[float] | None) -> Sequence[float]:
    """The budgets of `--budget`, or those of a frontier."""
    from globalopt.errors import UsageError

    if frontier is not None:
        if text is not None:
            raise UsageError(f"Give --frontier or --budget {text}, not both.")
        return frontier
    budgets: list[float] = []
    for part in (str(BUDGET) if text is None else text).split(","):
        try:
            budgets.append(float(part))
        except ValueError:
            raise UsageError(f"--budget takes a fraction, or several separated by commas; got '{text}'.") from None
    # As they name files.
    if len({f"{kept:g}" for kept in budgets}) < len(budgets):
        raise UsageError(f"--budget {text} names a fraction twice.")
    return budgets


def _pairs(texts: list[str] | None, option: str) -> dict[str, str]:
    from globalopt.errors import UsageError

    pairs: dict[str, str] = {}
    for text in (part for given in texts or () for part in given.split(",")):
        name, equals, value = (part.strip() for part in text.partition("="))
        if not (name and equals and value):
            raise UsageError(f"{option} takes NAME=VALUE; got '{text}'.")
        pairs[name.replace("-", "_")] = value
    return pairs


def _one_model(argument: str | None, option: str | None) -> str | None:
    from globalopt.errors import UsageError

    if argument and option and argument != option:
        raise UsageError(f"Two models were given: {argument} and --model {option}. Give one.")
    return _named(argument or option)


def _named(model: str | None) -> str | None:
    """The model as the pipeline names it: None for the bundled one, which reports call `reference`."""
    from globalopt import workbench

    return None if model == workbench.REFERENCE else model


def _default_folder(models: ModelOptions, name: str) -> Path:
    if models.model is None:
        return Path("runs") / f"reference-{name}"
    path = Path(models.model)
    # Of "." and ".." only the resolved path has a name; of a hub id only its own.
    base = path.resolve() if path.exists() else path
    return Path("runs") / f"{base.name}-{name}"


def _bench(models: ModelOptions, texts: TextOptions, seed: int, quiet: bool) -> Bench:
    from globalopt import workbench
    from globalopt.resources import StageClock
    from reports import make_progress

    return workbench.set_up(models, texts, seed, make_progress(err, quiet), StageClock())


def _print_json(value: object) -> None:
    # Not print_json: whatever reads this must get the same on a terminal of any width.
    out.out(json.dumps(value, indent=1, allow_nan=False), highlight=False)


def _show(summary: Summary, run: Run, quiet: bool, verbose: bool, as_json: bool) -> None:
    from dataclasses import asdict

    from globalopt.types import Status

    if as_json:
        _print_json(asdict(summary))
    elif not quiet:
        _report(summary, run, verbose)
    if any(layer.status == Status.FALLBACK.value for layer in summary.layers):
        raise typer.Exit(DONE_WITH_FALLBACKS)


def _report(summary: Summary, run: Run, verbose: bool) -> None:
    import reports

    pictures = reports.report(summary, run.report_folder, out, verbose)
    pictured = [("picture", path) for path in pictures]
    refine = _compress_command(run, run.budget_path, "hassle-free")
    _say([("budget", run.budget_path), ("model", run.model_folder), *pictured, ("next", refine)])


def _show_family(family: Family, run: Run, quiet: bool, as_json: bool) -> None:
    from dataclasses import asdict

    import reports

    if as_json:
        _print_json(asdict(family))
    elif not quiet:
        picture = reports.report_family(family, run.report_folder, out)
        middle = family.points[len(family.points) // 2]
        refine = _compress_command(run, run.folder / middle.file, family.solver, family.solver_options)
        _say([("budgets", run.folder / "budgets"), ("picture", picture), ("next", refine)])


def _say(lines: Sequence[tuple[str, object]]) -> None:
    for label, text in lines:
        out.out(f"{label:>8}  {text}", highlight=False)


def _compress_command(run: Run, budget: Path, solver: str, options: Mapping[str, str] | None = None) -> str:
    """What refines a budget of the run with a solver, on the same model and text."""
    from globalopt import pipeline

    _, models, texts = pipeline.recorded(run.folder)
    words = ["globalopt", "compress", *([models.model] if models.model else [])]
    words += ["--budget-file", str(budget), "--solver", solver]
    if options:
        words += ["--set", ",".join(f"{name}={value}" for name, value in options.items())]
    for recorded in (models, texts):
        for name, default in _defaults(type(recorded)).items():
            value = getattr(recorded, name)
            if name != "model" and value != default:
                words.append("--" + name.replace("_", "-"))
                words += [] if value is True else [str(value)]
    return shlex.join(words)


def _defaults(cls: Any) -> dict[str, object]:
    """The fields of a dataclass and their defaults."""
    from dataclasses import fields

    return {field.name: field.default for field in fields(cls)}
