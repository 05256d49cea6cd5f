"""`globalopt compress`: refine a budget that was found before."""

# Heavy imports are inside the functions: `globalopt --help` must not wait for torch.
from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from globalopt.commands.arguments import chosen_cache, default_folder, one_model, pairs, refine_options, reporter
from globalopt.commands.console import errors
from globalopt.commands.options import (
    BatchSize,
    Bos,
    CacheFolder,
    Calibration,
    Device,
    DistillSet,
    DryRun,
    Dtype,
    EvalText,
    EvalWindows,
    Fresh,
    Json,
    LowCoverage,
    Match,
    MatchSet,
    MaxMemory,
    ModelArgument,
    ModelOption,
    NoCache,
    Nsamples,
    Out,
    Quiet,
    SampleCount,
    Seed,
    Seqlen,
    Sequential,
    SolverName,
    SolverSet,
    TextColumn,
    Trust,
    Verbose,
    one_of,
)
from globalopt.commands.results import show, show_dry_run


def compress(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    *,
    budget_path: Annotated[
        Path,
        typer.Option(
            "--budget-file", help="The budget file to refine, a budget.json that `search` wrote.", show_default=False
        ),
    ],
    solver: SolverName = "3basil",
    solver_set: SolverSet = None,
    sensitivity: Annotated[
        str,
        typer.Option(
            help="Metric of the layers: fisher (also the output Grams of a backward sweep) or none (inputs only).",
            metavar=one_of("fisher", "none"),
        ),
    ] = "fisher",
    sequential: Sequential = "block",
    match: Match = "block",
    match_set: MatchSet = None,
    distill_set: DistillSet = None,
    calibration: Calibration = None,
    eval_text: EvalText = None,
    text_column: TextColumn = None,
    nsamples: Nsamples = 128,
    seqlen: Seqlen = 256,
    eval_windows: EvalWindows = 128,
    batch_size: BatchSize = 8,
    bos: Bos = "auto",
    samples: SampleCount = 3,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    allow_low_coverage: LowCoverage = False,
    max_memory: MaxMemory = None,
    folder: Out = None,
    fresh: Fresh = False,
    cache: CacheFolder = None,
    no_cache: NoCache = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Compress a model with any solver, at the targets of a budget file."""
    with errors():
        from globalopt.budgets import budget_file
        from globalopt.models.identity import model_fingerprint
        from globalopt.pipeline import compress as pipeline
        from globalopt.pipeline import session
        from globalopt.pipeline.dry_run import Structure, compress_job
        from globalopt.pipeline.options import SENSITIVITIES, ModelOptions, TextOptions, check_word
        from globalopt.pipeline.plan import resolve_refinement
        from globalopt.runs.folder import Run
        from solvers import get_solver

        file = budget_file.read(budget_path)
        check_word("sensitivity", sensitivity, SENSITIVITIES)
        refining = refine_options(sequential, match, match_set, distill_set)
        fitting = get_solver(solver, pairs(solver_set, "--set"))
        plan = resolve_refinement(refining, fitting, fisher=sensitivity != "none", seed=seed)
        models = ModelOptions(
            one_model(model, model_option), dtype, device, trust_remote_code, allow_low_coverage, max_memory
        )
        texts = TextOptions(
            calibration, eval_text, text_column, nsamples, seqlen, eval_windows, batch_size, bos, samples
        )
        folder = folder or default_folder(models, f"{file.asked:g}-{file.allocator}-{solver}-refined-seed{seed}")
        shared = chosen_cache(folder, cache, no_cache)
        Run.check_folder(folder)
        if dry_run:
            structure = Structure.of(models)
            file.for_model(model_fingerprint(structure.layers), structure.layers.specs, budget_path)
            show_dry_run(structure, models, texts, compress_job(plan, file.used / file.total), as_json)
            return
        shown = reporter(quiet)
        opened = session.set_up(models, texts, seed, shown)
        command = session.run_command()
        summary, run = pipeline.compress(opened, shown, plan, budget_path, file, folder, command, shared, fresh)
        show(summary, run, quiet, verbose, as_json)
