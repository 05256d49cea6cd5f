"""The verbs: what `search`, `compress` and `eval` do, as short functions that call the stages in order."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from allocators import Uniform, get_allocator
from globalopt import budget_file
from globalopt.budget_file import BudgetFile
from globalopt.capture import BlockRunner
from globalopt.errors import ArtefactError
from globalopt.evaluate import evaluate_both
from globalopt.files import digest
from globalopt.matching import Matching
from globalopt.models import save_dense
from globalopt.protocols import Allocator, Outputs, Solver
from globalopt.recorder import Selection
from globalopt.refine import Order, Refinement, for_solver, refine
from globalopt.refining import AS_FITTED, RefineOptions, match_whole
from globalopt.samples import write_samples
from globalopt.search_objective import SearchObjective
from globalopt.stages import (
    SENSITIVITIES,
    SearchOptions,
    analyse,
    check_feasible,
    check_word,
    collect_block_outputs,
    collect_outputs,
    weigh,
)
from globalopt.store import Run
from globalopt.summary import Metrics, Outcome, Search, Summary, WindowLosses
from globalopt.types import NM, Allocation, Budget, ErrorSurface, Gram, LayerSpec, Problem
from globalopt.workbench import Bench, ModelOptions, TextOptions, load_from, versions
from solvers import get_solver

NATS = "nats per token"
OUTPUT_ERROR = "output error"


def search(
    bench: Bench,
    options: SearchOptions,
    folder: Path,
    command: str,
    fresh: bool = False,
    allocator: Allocator | None = None,
    refining: RefineOptions = AS_FITTED,
) -> tuple[Summary, Run]:
    """Span, allocate, refine, evaluate: the whole job, into `folder`. Running it again goes on where it stopped.

    Args:
        allocator: stands in for the one that the options name; their words then only tell runs apart.
    """
    solver = get_solver(options.solver, options.solver_options)
    allocator = allocator or get_allocator(options.allocator, options.allocator_options)
    pattern = NM.parse(options.pattern)
    specs = bench.layers.specs
    budget = Budget.fraction(options.budget, specs, options.accounting)
    check_feasible(options, specs, budget)
    refining.check(bench.layers)

    run = Run.start(folder, search_identity(bench, options, refining), bench.facts(command), fresh)
    if run.summary_path.exists():
        bench.progress.note(f"{folder} is finished; nothing was computed again.")
        return run.read_summary(), run

    analyse(bench, options, run, pattern)
    problem = pose(bench, options, run)
    allocation, searched, uniform = allocate(bench, options, run, problem, allocator)
    file = budget_of(bench, options, problem, allocation)
    budget_file.write(run.budget_path, file)

    def outputs(spec: LayerSpec) -> Gram | None:
        return run.read_sensitivity(spec)[1]

    unit = file.error_unit
    matching = refining.matching(options.sensitivity)
    return finish(
        bench,
        run,
        file,
        allocation,
        solver,
        command,
        options.seed,
        unit,
        outputs,
        refining,
        matching,
        searched,
        uniform,
    ), run


def allocate(
    bench: Bench, options: SearchOptions, run: Run, problem: Problem, allocator: Allocator
) -> tuple[Allocation, Search | None, Outcome]:
    """The allocator's answer, what it asked of the model, if it asks, and what the uniform allocation comes to."""
    flat = Uniform().allocate(problem)
    if not allocator.asks:
        with bench.stage("allocate", 1, "budgets") as advance:
            allocation = allocator.allocate(problem)
            advance(allocator.name)
        return allocation, None, outcome(flat)
    with true_loss(bench, options, run, problem) as objective:
        allocation = allocator.allocate(problem, objective)
        facts = objective.facts(float(objective.losses([allocation.targets], range(objective.chunks)).mean()))
        # Afterwards: it is none of the search's evaluations, and not paid from its tokens.
        return allocation, facts, outcome(flat, objective)


def outcome(allocation: Allocation, objective: SearchObjective | None = None) -> Outcome:
    """What an allocation is predicted to lose and, with an objective, loses on all of the selection text."""
    if objective is None:
        return Outcome(allocation.used, allocation.predicted, None, None)
    losses = objective.losses([allocation.targets], range(objective.chunks))[0]
    stderr = float(losses.std() / len(losses) ** 0.5)
    return Outcome(allocation.used, allocation.predicted, float(losses.mean()), stderr)


def pose(bench: Bench, options: SearchOptions, run: Run) -> Problem:
    """The problem of an analysed run: what its solver can make of every layer, under its budget."""
    specs = bench.layers.specs
    solver = get_solver(options.solver, options.solver_options)
    surfaces = tuple(_offered(run.read_sensitivity(spec)[0], solver) for spec in specs)
    profiles = {spec.name: run.read_profile(spec) for spec in specs}
    budget = Budget.fraction(options.budget, specs, options.accounting)
    return Problem(surfaces, budget, NM.parse(options.pattern), options.seed, profiles, options.limits)


def _offered(surface: ErrorSurface, solver: Solver) -> ErrorSurface:
    """The part of a surface a solver can make: rank 0 only, where it has no low-rank part."""
    if solver.low_rank:
        return surface
    kept = [(t, e) for t, e in zip(surface.targets, surface.error, strict=True) if t.rank == 0]
    return ErrorSurface(surface.spec, tuple(t for t, _ in kept), tuple(e for _, e in kept))


def budget_of(bench: Bench, options: SearchOptions, problem: Problem, allocation: Allocation) -> BudgetFile:
    """The budget file of an allocation of a run's problem."""
    coverage = bench.layers.coverage
    unit = NATS if options.sensitivity != "none" else OUTPUT_ERROR
    return budget_file.make(
        allocation, problem, bench.fingerprint, coverage.covered, coverage.block_params, options.budget, unit
    )


@contextlib.contextmanager
def true_loss(
    bench: Bench, options: SearchOptions, run: Run, problem: Problem, stage: str = "search"
) -> Iterator[SearchObjective]:
    """What a search asks, on the selection text and in the journal of an analysed run; the model is dense after it."""
    batches = bench.batches(bench.splits.selection)
    selection = Selection(tuple(len(batch.input_ids) for batch in batches), bench.splits.selection.seqlen)
    most = options.search_tokens // max(batch.tokens for batch in batches)
    with bench.stage(stage, most, "chunks") as advance:
        objective = SearchObjective(
            lambda: BlockRunner(bench.layers, batches),
            selection,
            run,
            problem,
            options.candidates,
            options.search_tokens,
            advance,
        )
        try:
            yield objective
        finally:
            objective.close()


def search_identity(bench: Bench, options: SearchOptions, refining: RefineOptions) -> dict[str, Any]:
    """What decides the results of a search."""
    return {**bench.identity(options.seed), "search": options.words(), "refining": asdict(refining)}


def compress_identity(
    bench: Bench,
    file: BudgetFile,
    solver_name: str,
    solver_options: Mapping[str, str],
    seed: int,
    sensitivity: str,
    refining: RefineOptions,
) -> dict[str, Any]:
    """What decides the results of a refinement."""
    return {
        **bench.identity(seed),
        "budget": digest(budget_file.record(file)),
        "solver": [solver_name, dict(solver_options)],
        "sensitivity": sensitivity,
        "refining": asdict(refining),
    }


def compress(
    bench: Bench,
    source: Path,
    file: BudgetFile,
    solver_name: str,
    solver_options: Mapping[str, str],
    seed: int,
    folder: Path,
    command: str,
    fresh: bool = False,
    sensitivity: str = "fisher",
    refining: RefineOptions = AS_FITTED,
    solver: Solver | None = None,
) -> tuple[Summary, Run]:
    """Refine a found budget with any solver, evaluate, and write the result into `folder`.

    Args:
        solver: stands in for the one that `solver_name` and `solver_options` say; these then only tell runs apart.
    """
    check_word("sensitivity", sensitivity, SENSITIVITIES)
    solver = solver or get_solver(solver_name, solver_options)
    allocation = file.for_model(bench.fingerprint, bench.layers.specs, source)
    refining.check(bench.layers)
    for spec in bench.layers.specs:
        made = for_solver(allocation.targets[spec.name], spec, solver, allocation.budget)
        file.served.check(made, spec)
    identity = compress_identity(bench, file, solver_name, solver_options, seed, sensitivity, refining)
    run = Run.start(folder, identity, bench.facts(command), fresh)
    if run.summary_path.exists():
        bench.progress.note(f"{folder} is finished; nothing was computed again.")
        return run.read_summary(), run
    budget_file.write(run.budget_path, file)
    unit, outputs = OUTPUT_ERROR, _no_outputs
    if sensitivity != "none" and solver.outputs is not Outputs.NONE:
        unit, outputs = NATS, run.read_outputs
        collect_outputs(bench, run, seed)
        patterns = {target.pattern for target in allocation.targets.values()}
        weigh(bench, run, patterns.pop() if len(patterns) == 1 else None, solver.outputs, file.served)
    matching = refining.matching(sensitivity)
    return finish(bench, run, file, allocation, solver, command, seed, unit, outputs, refining, matching), run


def _no_outputs(spec: LayerSpec) -> Gram | None:
    return None


def finish(
    bench: Bench,
    run: Run,
    file: BudgetFile,
    allocation: Allocation,
    solver: Solver,
    command: str,
    seed: int,
    unit: str,
    outputs: Callable[[LayerSpec], Gram | None],
    refining: RefineOptions,
    matching: Matching | None,
    searched: Search | None = None,
    uniform: Outcome | None = None,
) -> Summary:
    """Refine to the allocation, match, save the model, evaluate what was saved, and write the summary.

    The bench's model is changed in place: a bench serves one refinement.
    """
    layers = bench.layers
    dtype = bench.loaded.checkpoint_dtype
    notes = list(_notes(allocation, solver))
    for note in notes:
        bench.progress.note(note)
    predicted = {entry.name: entry.predicted if file.error_unit == unit else None for entry in file.layers}
    order = Order(refining.order)
    plan = Refinement(allocation.targets, solver, allocation.budget, dtype, predicted, order, matching, seed)

    if matching is not None and matching.loss.weighted:
        collect_block_outputs(bench, run, seed)
    with bench.stage("refine", len(layers.specs), "layers") as advance:
        runner = bench.runner(run.folder, matching and matching.windows)
        results = list(refine(runner, plan, run, outputs, bench.loaded.device, advance, run.weighs_outputs))
    if refining.distillation is not None:
        match_whole(bench, run, plan, refining.distillation)
    with bench.stage("save", 1, "models") as advance:
        # A model folder appears whole or not at all, so one that is there is this run's.
        if not run.model_folder.exists():
            save_dense(bench.loaded.model, bench.loaded.tokenizer, run.model_folder, dtype)
        advance(str(run.model_folder))
    dense, compressed = _evaluate_both(bench, run)
    summary = Summary(
        command=command,
        model=bench.name,
        allocator=file.allocator,
        solver=solver.name,
        seed=seed,
        accounting=file.accounting,
        asked=file.asked,
        limit=file.limit,
        used=sum(result.cost for result in results),
        total=file.total,
        predicted=file.predicted,
        bound=file.bound,
        error_unit=unit,
        budget_unit=file.error_unit,
        covered=layers.coverage.covered,
        block_params=layers.coverage.block_params,
        skipped=dict(layers.coverage.skipped),
        layers=tuple(results),
        dense=dense,
        compressed=compressed,
        stages=bench.clock.costs,
        splits={split.name: split.record() for split in bench.splits},
        versions=versions(),
        notes=tuple(notes),
        search=searched,
        uniform=uniform,
        matching=run.read_matches(len(layers.blocks)),
    )
    run.write_summary(summary)
    return summary


def _notes(allocation: Allocation, solver: Solver) -> Iterator[str]:
    ranked = sum(1 for target in allocation.targets.values() if target.rank)
    if ranked and not solver.low_rank:
        yield (
            f"Solver {solver.name} has no low-rank part: the rank of {ranked} layers is kept as nonzeros of the same "
            f"cost in {allocation.budget.accounting}."
        )
    if not solver.sparse:
        yield f"Solver {solver.name} has no sparse part: nonzeros are kept as rank of at most the same cost."
    if solver.signs:
        yield f"Solver {solver.name} keeps a sign plane of rank 1 in every layer, paid for with other parts of it."


def _evaluate_both(bench: Bench, run: Run) -> tuple[tuple[Metrics, ...], tuple[Metrics, ...]]:
    """Metrics of the dense model and of the saved one, reloaded, on validation and test windows; samples of both."""
    options = bench.model_options
    splits = (bench.splits.validation, bench.splits.test)
    windows = sum(len(split.windows) for split in splits)
    with bench.stage("evaluate", windows, "windows") as advance:
        original = bench.dense()
        saved = load_from(str(run.model_folder), options, like=bench.loaded.model)
        size = bench.text_options.batch_size
        losses: list[WindowLosses] = []
        pairs = [
            evaluate_both(saved.model, original, split, size, advance, bench.scratch(run.folder, split), losses.append)
            for split in splits
        ]
        written = write_samples(original, saved.model, saved.tokenizer, bench.splits.validation)
    run.write_window_losses(losses)
    run.write_samples(written)
    return tuple(dense for dense, _ in pairs), tuple(compressed for _, compressed in pairs)


def run_command() -> str:
    """What was typed, with the program's own path reduced to its name."""
    return shlex.join(["globalopt", *sys.argv[1:]])


def recorded(folder: Path) -> tuple[Run, ModelOptions, TextOptions]:
    """A run with the model and text options it was made with; `ArtefactError` if the manifest lacks them."""
    run = Run.open(folder)
    facts = run.manifest.get("facts", {})
    try:
        return run, ModelOptions(**facts["model_options"]), TextOptions(**facts["text_options"])
    except (KeyError, TypeError):
        raise ArtefactError(f"{folder}: the manifest does not say which model and text it was made with.") from None
