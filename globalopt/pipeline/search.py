"""The verbs: what `search`, `compress` and `eval` do, as short functions that call the stages in order."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from allocators import Uniform, get_allocator
from globalopt.budgets import budget_file
from globalopt.budgets.budget_file import BudgetFile
from globalopt.models.walk import BlockRunner
from globalopt.objective.journal import Selection
from globalopt.objective.of_run import SearchObjective
from globalopt.pipeline.analyse import analyse
from globalopt.pipeline.finish import finish
from globalopt.pipeline.options import (
    AS_FITTED,
    RefineOptions,
    SearchOptions,
    check_feasible,
)
from globalopt.pipeline.session import Bench
from globalopt.protocols import Allocator, Solver
from globalopt.runs.folder import Run
from globalopt.values.budget import Budget
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.metric import Gram
from globalopt.values.problem import Allocation, ErrorSurface, Problem
from globalopt.values.results import ErrorUnit, Outcome, Search, Summary
from solvers import get_solver


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
    unit = ErrorUnit.NATS if options.sensitivity != "none" else ErrorUnit.OUTPUT_ERROR
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
