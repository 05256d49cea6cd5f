"""`globalopt compress`: compress a model to a fraction kept, or to a budget that was found before."""

# Heavy imports are inside the functions: `globalopt --help` must not wait for torch.
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from globalopt.commands.arguments import chosen_cache, default_folder, one_model, pairs, refine_options, reporter
from globalopt.commands.options import (
    Accounting,
    BatchSize,
    Bos,
    CacheFolder,
    Calibration,
    Device,
    DistillSet,
    DryRun,
    Dtype,
    Embeddings,
    EvalText,
    Evaluate,
    EvalWindows,
    Fresh,
    GGUFFile,
    Json,
    LowCoverage,
    MatchOrNot,
    MatchSet,
    MaxMemory,
    ModelArgument,
    ModelOption,
    NoCache,
    Nsamples,
    Out,
    Prompts,
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
from globalopt.commands.processes import together
from globalopt.commands.results import show_dry_run, show_or_compute

if TYPE_CHECKING:
    from globalopt.runs.folder import Run
    from globalopt.values.results import Summary


def compress(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    *,
    gguf_file: GGUFFile = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Fraction of the compressible layers to keep, in (0, 1], divided by --allocator.", show_default=False
        ),
    ] = None,
    budget_path: Annotated[
        Path | None,
        typer.Option(
            "--budget-file",
            help="The budget file to refine, a budget.json that a run wrote, in place of --budget.",
            show_default=False,
        ),
    ] = None,
    allocator: Annotated[
        str | None,
        typer.Option(
            help="Allocator that divides --budget, one that needs no analysis. Without it: uniform.",
            metavar=one_of("uniform", "owl", "alpha"),
            show_default=False,
        ),
    ] = None,
    allocator_set: Annotated[
        list[str] | None,
        typer.Option(help="Options of the allocator, separated by commas; may be repeated.", metavar="NAME=VALUE"),
    ] = None,
    rank_share: Annotated[
        float | None,
        typer.Option(
            help="Part of the kept parameters of a layer that is in its low-rank part, in [0, 1], with --budget. "
            "Without it: 0.1 of a solver with a low-rank part.",
            show_default=False,
        ),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            help="Pattern of the sparse parts, with --budget: unstructured, or KEEP:OF such as 2:4. Without it: "
            "unstructured.",
            show_default=False,
        ),
    ] = None,
    accounting: Accounting = None,
    storage: Annotated[
        str | None,
        typer.Option(
            help="Bits of the stored numbers of every layer, with --budget: 16, 8, 6, 5, 4 or 3, or VALUES/FACTORS "
            "such as 4/8. Without it: 16.",
            metavar="BITS",
            show_default=False,
        ),
    ] = None,
    embeddings: Embeddings = None,
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
    match: MatchOrNot = None,
    match_set: MatchSet = None,
    distill_set: DistillSet = None,
    calibration: Calibration = None,
    eval_text: EvalText = None,
    text_column: TextColumn = None,
    prompts: Prompts = None,
    nsamples: Nsamples = 128,
    seqlen: Seqlen = 256,
    eval_windows: EvalWindows = 128,
    evaluate: Evaluate = True,
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
    """Compress a model with any solver: to a fraction kept, or to the targets of a budget file.

    With --budget nothing is run that the method does not use: no analysis, and no matching unless --match asks for it.
    """
    with together(verbose):
        from globalopt.budgets import budget_file
        from globalopt.embeddings.find import check_embeddings
        from globalopt.models.identity import model_fingerprint
        from globalopt.pipeline import compress as pipeline
        from globalopt.pipeline import search, session
        from globalopt.pipeline.direct import plan_direct
        from globalopt.pipeline.estimates.job import compress_job, search_job, within
        from globalopt.pipeline.estimates.shape import Structure
        from globalopt.pipeline.finished import question
        from globalopt.pipeline.options import SENSITIVITIES, ModelOptions, TextOptions, check_word, unit_of
        from globalopt.pipeline.plan import resolve_refinement
        from globalopt.runs.folder import Run
        from solvers import get_solver

        divided = {
            "--allocator": allocator,
            "--allocator-set": allocator_set,
            "--rank-share": rank_share,
            "--pattern": pattern,
            "--accounting": accounting,
            "--storage": storage,
            "--embeddings": embeddings,
        }
        check_budget(budget, budget_path, [option for option, value in divided.items() if value not in (None, [])])
        check_word("sensitivity", sensitivity, SENSITIVITIES)
        refining = refine_options(sequential, match or ("block" if budget is None else "none"), match_set, distill_set)
        options = pairs(solver_set, "--set")
        fitting = get_solver(solver, options)
        models = ModelOptions(
            one_model(model, model_option),
            dtype,
            device,
            trust_remote_code,
            allow_low_coverage,
            max_memory,
            gguf_file=gguf_file,
        )
        texts = TextOptions(
            calibration,
            eval_text,
            text_column,
            nsamples,
            seqlen,
            eval_windows,
            batch_size,
            bos,
            samples,
            prompts,
            evaluate,
        )
        if budget_path is None:
            assert budget is not None
            chosen, form, bits = allocator or "uniform", pattern or "unstructured", storage or "16"
            unit = unit_of(accounting, bits, embeddings)
            direct = plan_direct(
                budget,
                fitting,
                options,
                chosen,
                pairs(allocator_set, "--allocator-set"),
                rank_share,
                form,
                unit,
                sensitivity,
                refining,
                seed,
                bits,
                embeddings,
            )
            variant = "" if unit == "params" else "-bytes"
            variant += "" if bits == "16" else f"-bits{bits.replace('/', 'x')}"
            variant += "" if embeddings is None else f"-embeddings{embeddings}"
            variant += "" if form == "unstructured" else f"-{form.replace(':', 'of')}"
            folder = folder or default_folder(models, f"{budget:g}{variant}-{chosen}-{solver}-compressed-seed{seed}")
            shared = chosen_cache(folder, cache, no_cache)
            Run.check_folder(folder)
            if dry_run:
                structure = Structure.of(models)
                job = within(search_job(direct, refines=True), structure.layers, direct)
                show_dry_run(structure, models, texts, replace(job, shared=shared is not None), as_json)
                return

            def compute_direct() -> tuple[Summary, Run]:
                shown = reporter(quiet, verbose)
                opened = session.set_up(models, texts, seed, shown, shared)
                return search.search(opened, shown, direct, folder, session.run_command(), shared, fresh)

            asked = question({"command": "compress", **direct.record()}, models, texts)
            show_or_compute(folder, asked, compute_direct, fresh, quiet, verbose, as_json)
            return
        file = budget_file.read(budget_path)
        plan = resolve_refinement(refining, fitting, fisher=sensitivity != "none", seed=seed)
        folder = folder or default_folder(models, f"{file.asked:g}-{file.allocator}-{solver}-refined-seed{seed}")
        shared = chosen_cache(folder, cache, no_cache)
        Run.check_folder(folder)
        if dry_run:
            structure = Structure.of(models)
            allocation = file.for_model(model_fingerprint(structure.layers), structure.layers.specs, budget_path)
            check_embeddings(structure.layers.model, file.matrices, budget_path)
            few_bits = any(layer.storage != "16" for layer in file.plans)
            job = compress_job(plan, allocation.used / allocation.budget.total, few_bits)
            show_dry_run(structure, models, texts, replace(job, shared=shared is not None), as_json)
            return

        def compute() -> tuple[Summary, Run]:
            shown = reporter(quiet, verbose)
            opened = session.set_up(models, texts, seed, shown, shared)
            command = session.run_command()
            return pipeline.compress(opened, shown, plan, budget_path, file, folder, command, shared, fresh)

        asked = question({"command": "compress", **plan.record()}, models, texts, [budget_path])
        show_or_compute(folder, asked, compute, fresh, quiet, verbose, as_json)


def check_budget(budget: float | None, path: Path | None, divided: Sequence[str]) -> None:
    """Raise `UsageError` unless one budget was given; options that divide it, by name, are for a fraction alone."""
    from globalopt.errors import UsageError

    if budget is None and path is None:
        raise UsageError(
            "What to keep was not said: give --budget FRACTION, such as --budget 0.5, or --budget-file budget.json."
        )
    if budget is not None and path is not None:
        raise UsageError(f"Give --budget {budget:g} or --budget-file {path}, not both.")
    if path is not None and divided:
        raise UsageError(f"{divided[0]} divides a --budget; the layers of --budget-file {path} have their targets.")
