"""`globalopt search`: analyse a model, allocate the budget, refine, evaluate and report."""

# Heavy imports are inside the functions: `globalopt --help` must not wait for torch.
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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
    Fresh,
    GGUFFile,
    Json,
    LowCoverage,
    Match,
    MatchSet,
    MaxMemory,
    MaxRank,
    ModelArgument,
    ModelOption,
    NoCache,
    Out,
    Prompts,
    Quiet,
    RankMultiple,
    SampleCount,
    Seed,
    Seqlen,
    Sequential,
    ServingProfile,
    SolverName,
    SolverSet,
    StorageMenu,
    TextColumn,
    Trust,
    Verbose,
    one_of,
)
from globalopt.commands.processes import together
from globalopt.commands.results import show_dry_run, show_family, show_or_compute

if TYPE_CHECKING:
    from globalopt.runs.folder import Run
    from globalopt.values.results import Summary

BUDGET = 0.5


def search(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    gguf_file: GGUFFile = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Fraction of the compressible layers to keep, in (0, 1]. Several fractions, separated by commas, make "
            "a family of budget files, each within the next larger one, without refinement. Without it: 0.5.",
            metavar="FRACTION[,...]",
            show_default=False,
        ),
    ] = None,
    frontier: Annotated[
        bool, typer.Option("--frontier", help="Make a family of the budgets 0.1, 0.15, ... 0.9.")
    ] = False,
    accounting: Accounting = None,
    storage: StorageMenu = "16",
    embeddings: Embeddings = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            help="Pattern of the sparse parts: unstructured, or KEEP:OF such as 2:4. Without it: unstructured.",
            metavar="[unstructured|KEEP:OF]",
            show_default=False,
        ),
    ] = None,
    serving_profile: ServingProfile = "dense",
    rank_multiple: RankMultiple = None,
    max_rank: MaxRank = None,
    allocator: Annotated[
        str | None,
        typer.Option(
            help="Allocator that divides the budget; `globalopt list` shows all allocators. Without it: "
            "knapsack, or auto with --effort best.",
            metavar="NAME",
            show_default=False,
        ),
    ] = None,
    allocator_set: Annotated[
        list[str] | None,
        typer.Option(
            help="Options of the allocator, separated by commas; may be repeated. `globalopt list ALLOCATOR` "
            "shows them.",
            metavar="NAME=VALUE",
        ),
    ] = None,
    solver: SolverName = "3basil",
    solver_set: SolverSet = None,
    sensitivity: Annotated[
        str,
        typer.Option(
            help="How losses are predicted: fisher (in nats, by a backward sweep) or none (only as output errors).",
            metavar=one_of("fisher", "none"),
        ),
    ] = "fisher",
    span_scaling: Annotated[
        str | None,
        typer.Option(
            help="Scaling in which a weight W is split into its span: activation (W D_x, with the root mean squares of "
            "the inputs), none (W itself), output (also by the output Gram) or direct (a whitened SVD; the default of "
            "--serving-profile factors). Without it: activation.",
            metavar=one_of("activation", "none", "output", "direct"),
            show_default=False,
        ),
    ] = None,
    predict_from: Annotated[
        str,
        typer.Option(
            help="Basis of the predicted losses: anchors (spans, and solutions at a few anchors of every layer) or "
            "span (spans alone).",
            metavar=one_of("anchors", "span"),
        ),
    ] = "anchors",
    correct: Annotated[
        bool,
        typer.Option(
            help="Correct the predicted losses by what the model loses at the targets they lead to, in a few rounds of "
            "allocation and measurement."
        ),
    ] = True,
    candidates: Annotated[
        str,
        typer.Option(
            help="Layers of the candidates whose true loss a search measures: anchors (interpolated from the "
            "solutions at the anchors), span (cut from the spans) or auto (anchors where there are such solutions).",
            metavar=one_of("anchors", "span", "auto"),
        ),
    ] = "auto",
    effort: Annotated[
        str,
        typer.Option(
            help="How much time to spend: quick, default or best. It sets the defaults of --nsamples, --eval-windows, "
            "--allocator, --search-tokens, the solver's preset, the steps of the probe solver and the epochs of block "
            "matching.",
            metavar=one_of("quick", "default", "best"),
        ),
    ] = "default",
    search_tokens: Annotated[
        int | None,
        typer.Option(
            help="Forward tokens that the search may spend on true losses; for a family, 0 measures none. Without it: "
            "500000, or 100000 with --effort quick.",
            min=0,
            show_default=False,
        ),
    ] = None,
    sequential: Sequential = "block",
    match: Match = "block",
    match_set: MatchSet = None,
    distill_set: DistillSet = None,
    calibration: Calibration = None,
    eval_text: EvalText = None,
    text_column: TextColumn = None,
    prompts: Prompts = None,
    nsamples: Annotated[
        int | None,
        typer.Option(
            help="Number of calibration windows. Without it: 128, or 64 with --effort quick and 256 with best.",
            show_default=False,
        ),
    ] = None,
    seqlen: Seqlen = 256,
    eval_windows: Annotated[
        int | None,
        typer.Option(
            help="Largest number of windows in each of the selection, validation and test parts. Without it: 128, or "
            "64 with --effort quick.",
            show_default=False,
        ),
    ] = None,
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
    """Compress a model under one budget: analyse it, allocate the budget, refine, evaluate and report."""
    with together(verbose):
        from globalopt.budgets.serving_limits import get_profile
        from globalopt.errors import UsageError
        from globalopt.machine import ranks
        from globalopt.pipeline import family, session
        from globalopt.pipeline import search as pipeline
        from globalopt.pipeline.effort import get_effort
        from globalopt.pipeline.estimates.job import search_job, within
        from globalopt.pipeline.estimates.shape import Structure
        from globalopt.pipeline.finished import question
        from globalopt.pipeline.options import ModelOptions, SearchOptions, TextOptions, unit_of
        from globalopt.pipeline.plan import BudgetRule, resolve
        from globalopt.runs.folder import Run

        level = get_effort(effort)
        budgets = _budgets(budget, family.FRONTIER if frontier else None)
        several = len(budgets) > 1
        if several and allocator not in (None, family.ALLOCATOR):
            raise UsageError(f"A family of budgets is made by the nested knapsack; leave out --allocator {allocator}.")
        allocator = family.ALLOCATOR if several else allocator or level.allocator
        if not several and search_tokens == 0:
            raise UsageError("--search-tokens 0 is for a family of budgets; of one budget it must be at least 1.")
        if several and embeddings is not None:
            raise UsageError("--embeddings is for one budget, not for a family. Give one --budget, or leave it out.")
        choices = get_profile(serving_profile).choices(pattern, span_scaling)
        unit = unit_of(accounting, storage, embeddings)
        options = SearchOptions(
            budget=budgets[0],
            accounting=unit,
            storage=storage,
            embeddings=embeddings,
            allocator=allocator,
            allocator_options=pairs(allocator_set, "--allocator-set"),
            solver=solver,
            solver_options=level.solver_options(solver, pairs(solver_set, "--set")),
            sensitivity=sensitivity,
            **choices,
            predict_from=predict_from,
            correct=correct,
            candidates=candidates,
            search_tokens=level.search_tokens if search_tokens is None else search_tokens,
            probe_steps=level.probe_steps,
            seed=seed,
            serving_profile=serving_profile,
            rank_multiple=rank_multiple,
            max_rank=max_rank,
        )
        plan = resolve(options, refine_options(sequential, match, match_set, distill_set, level))
        for kept in budgets:
            BudgetRule(kept, unit).check()
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
            level.nsamples if nsamples is None else nsamples,
            seqlen,
            level.eval_windows if eval_windows is None else eval_windows,
            batch_size,
            bos,
            samples,
            prompts,
            evaluate,
        )
        variant = "" if unit == "params" else "-bytes"
        variant += "" if storage == "16" else f"-bits{storage.replace('/', 'x').replace(',', '+')}"
        variant += "" if embeddings is None else f"-embeddings{embeddings}"
        variant += "" if options.pattern == "unstructured" else f"-{options.pattern.replace(':', 'of')}"
        variant += "" if serving_profile == "dense" else f"-{serving_profile}"
        variant += "" if rank_multiple is None else f"-ranks{rank_multiple}"
        variant += "" if max_rank is None else f"-rank{max_rank}"
        variant += "" if effort == "default" else f"-{effort}"
        name = f"family{variant}" if several else f"{budgets[0]:g}{variant}-{allocator}"
        folder = folder or default_folder(models, f"{name}-{solver}-seed{seed}")
        shared = chosen_cache(folder, cache, no_cache)
        Run.check_folder(folder)
        if dry_run:
            structure = Structure.of(models)
            job = within(search_job(plan, refines=not several), structure.layers, plan)
            show_dry_run(structure, models, texts, replace(job, shared=shared is not None), as_json)
            return
        command = session.run_command()
        if several:
            shown = reporter(quiet, verbose)
            opened = session.set_up(models, texts, seed, shown, shared)
            found, run = family.family(opened, shown, plan, budgets, folder, command, shared, fresh, leave_out=frontier)
            if ranks.writer():
                show_family(found, run, quiet, as_json)
        else:

            def compute() -> tuple[Summary, Run]:
                shown = reporter(quiet, verbose)
                opened = session.set_up(models, texts, seed, shown, shared)
                return pipeline.search(opened, shown, plan, folder, command, shared, fresh)

            asked = question({"command": "search", **plan.record()}, models, texts)
            show_or_compute(folder, asked, compute, fresh, quiet, verbose, as_json)


def _budgets(text: str | None, frontier: Sequence[float] | None) -> Sequence[float]:
    """Return the budgets of `--budget`, or those of a frontier."""
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
