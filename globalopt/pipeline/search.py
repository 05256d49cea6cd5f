"""Search: analyse a model, allocate its budget, and refine it to the allocation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allocators import Uniform
from globalopt.analysis.layer_analysis import LayerAnalysis, read_gap
from globalopt.budgets import budget_file
from globalopt.budgets.budget_file import BudgetFile
from globalopt.models.walk import BlockRunner
from globalopt.objective.candidates import AnchoredLayer
from globalopt.objective.journal import Selection
from globalopt.objective.of_run import SearchObjective
from globalopt.pipeline.addresses import algorithms, refinement_addresses, search_addresses
from globalopt.pipeline.analyse import analyse
from globalopt.pipeline.finish import finish
from globalopt.pipeline.plan import SearchPlan
from globalopt.pipeline.reporter import Reporter
from globalopt.pipeline.reuse import note_reused, opened
from globalopt.pipeline.session import Session
from globalopt.protocols import Solver
from globalopt.runs.artefacts import ALLOCATED, PREDICTION, PROFILE, SPAN, SUMMARY, TEACHER
from globalopt.runs.cache import Cache
from globalopt.runs.folder import Run
from globalopt.runs.records import Allocated
from globalopt.values.layer import LayerSpec
from globalopt.values.problem import Allocation, ErrorSurface, Problem
from globalopt.values.results import Outcome, Summary
from globalopt.values.span import Span


def search(
    session: Session,
    reporter: Reporter,
    plan: SearchPlan,
    folder: Path,
    command: str,
    cache: Cache | None = None,
    fresh: bool = False,
) -> tuple[Summary, Run]:
    """Analyse a model, allocate its budget, refine it, evaluate it, and write the run into `folder`.

    A call with the same arguments continues an interrupted run. The session's model is changed in place: a session
    serves one refinement.

    Args:
        command: command line, for the record.
        cache: shared artefacts of runs; None keeps them in the run folder.
        fresh: delete an earlier run in the folder; artefacts in the cache are used again.
    Raises:
        BudgetError, UsageError: no allocation meets the budget, pattern and limits.
        ArtefactError: the folder holds another run.
        NumericalError: gradients or solutions are not finite.

    >>> from globalopt.pipeline.example import example_plan, example_reporter, example_session
    >>> session, plan = example_session(), example_plan(budget=0.5, allocator="knapsack")
    >>> summary, run = search(session, example_reporter(), plan, Path("run"), "globalopt search")
    >>> summary.allocator, summary.solver, summary.used / summary.total
    ('knapsack', 'wanda', 0.5)
    >>> summary.predicted < summary.uniform.predicted
    True
    """
    specs = session.layers.specs
    plan.check_feasible(specs, plan.rule.of(specs))
    plan.refinement.check(session.layers)
    addresses = search_addresses(session, plan)
    with opened(session, folder, search_identity(session, plan), command, cache, fresh) as (run, at):
        if run.has(SUMMARY, None):
            reporter.note(f"{folder} is finished; nothing was computed again.")
            return run.summary(), run
        at(addresses)
        reused = note_reused(session, reporter, run, addresses)
        problem, allocation, found = allocated(session, reporter, plan, run)
        file = budget_of(session, plan, problem, allocation)
        budget_file.write(run.budget_path, file)
        at(refinement_addresses(session, plan.refinement, file, addresses))
        summary = finish(session, reporter, run, plan.refinement, file, command, found, reused)
        return summary, run


def allocated(
    session: Session, reporter: Reporter, plan: SearchPlan, run: Run
) -> tuple[Problem, Allocation, Allocated]:
    """Analyse the model, pose the allocation problem and solve it; a solution that was saved is read instead.

    Returns:
        The problem, its allocation, and the allocation with its search statistics, as saved.

    >>> from globalopt.pipeline.example import example_plan, example_reporter, example_session
    >>> session, reporter, plan = example_session(), example_reporter(), example_plan(0.25)
    >>> with Run.start(Path("allocated"), {}, {}) as run:
    ...     problem, allocation, saved = allocated(session, reporter, plan, run)
    >>> allocation.used, problem.budget.limit, run.has(ALLOCATED, None)
    (1088, 1088, True)
    """
    analysis = analyse(session, reporter, plan.analysis, run)
    problem = pose(session, plan, run)
    if not run.has(ALLOCATED, None):
        run.put(ALLOCATED, None, allocate(session, reporter, plan, analysis, problem))
    found = run.get(ALLOCATED, None)
    return problem, problem.finish(found.targets, plan.allocator.name, found.bound), found


def allocate(
    session: Session, reporter: Reporter, plan: SearchPlan, analysis: LayerAnalysis, problem: Problem
) -> Allocated:
    """Choose the targets of all layers, and predict the loss of the uniform allocation for comparison.

    An allocator that uses the objective gets it, and its allocation and the uniform one are evaluated on all of the
    selection text.

    >>> from globalopt.pipeline.example import example_plan, example_reporter, example_session
    >>> session, reporter, plan = example_session(), example_reporter(), example_plan(allocator="knapsack")
    >>> with Run.start(Path("knapsack"), {}, {}) as run:
    ...     analysis = analyse(session, reporter, plan.analysis, run)
    ...     problem = pose(session, plan, run)
    ...     found = allocate(session, reporter, plan, analysis, problem)
    >>> found.bound <= problem.finish(found.targets, by="knapsack").predicted <= found.uniform.predicted
    True
    """
    flat = Uniform().allocate(problem)
    if not plan.allocator.uses_objective:
        with reporter.stage("allocate", 1, "budgets") as advance:
            allocation = plan.allocator.allocate(problem)
            advance(plan.allocator.name)
        return Allocated(allocation.targets, allocation.bound, None, outcome(flat))
    with true_loss(session, reporter, plan, analysis, problem) as objective:
        # The spans of the problem itself would be those of a model that holds candidates.
        allocation = plan.allocator.allocate(replace(problem, spans=objective.span), objective)
        loss = float(objective.losses([allocation.targets], range(objective.chunks)).mean())
        searched = objective.search_record(loss)
        # After the search, whose tokens it does not use.
        return Allocated(allocation.targets, allocation.bound, searched, outcome(flat, objective))


def outcome(allocation: Allocation, objective: SearchObjective | None = None) -> Outcome:
    """Return the predicted loss of an allocation and, given an objective, its loss on all of the selection text.

    >>> from allocators.example import example_problem
    >>> found = outcome(Uniform().allocate(example_problem(kept=0.5)))
    >>> found.used <= example_problem(kept=0.5).budget.limit, found.measured
    (True, None)
    """
    if objective is None:
        return Outcome(allocation.used, allocation.predicted, None, None)
    losses = objective.losses([allocation.targets], range(objective.chunks))[0]
    stderr = float(losses.std() / len(losses) ** 0.5)
    return Outcome(allocation.used, allocation.predicted, float(losses.mean()), stderr)


def pose(session: Session, plan: SearchPlan, run: Run) -> Problem:
    """Pose the allocation problem of an analysed model: the error surfaces of its layers, under its budget.

    Args:
        run: with predictions, profiles and spans. The problem's spans are right while the session's model is dense.

    >>> from globalopt.pipeline.example import example_plan, example_reporter, example_session
    >>> session, plan = example_session(), example_plan()
    >>> with Run.start(Path("posed"), {}, {}) as run:
    ...     _ = analyse(session, example_reporter(), plan.analysis, run)
    ...     problem = pose(session, plan, run)
    >>> len(problem.specs), problem.budget.limit, {target.rank for target in problem.surfaces[0].targets}
    (14, 2176, {0})
    """
    specs = {spec.name: spec for spec in session.layers.specs}
    surfaces = tuple(_offered(run.get(PREDICTION, spec).surface, plan.analysis.solver) for spec in specs.values())
    profiles = {name: run.get(PROFILE, spec) for name, spec in specs.items()}

    def span(name: str) -> Span:
        return _span(run, specs[name], session.layers.weight(name))

    return Problem(
        surfaces,
        plan.rule.of(specs.values()),
        plan.analysis.pattern,
        plan.seed,
        profiles,
        plan.analysis.limits,
        span,
    )


def _span(run: Run, spec: LayerSpec, weight: Tensor) -> Span:
    """Read the span of a layer into main memory, given its dense weight."""
    return run.get(SPAN, spec).span(weight).to(torch.device("cpu"))


def _offered(surface: ErrorSurface, solver: Solver) -> ErrorSurface:
    """Keep the options that a solver can meet: of a solver without low-rank part, those of rank 0."""
    if solver.low_rank:
        return surface
    kept = [(t, e) for t, e in zip(surface.targets, surface.error, strict=True) if t.rank == 0]
    return ErrorSurface(surface.spec, tuple(t for t, _ in kept), tuple(e for _, e in kept))


def budget_of(session: Session, plan: SearchPlan, problem: Problem, allocation: Allocation) -> BudgetFile:
    """Make the budget file of an allocation.

    >>> from globalopt.pipeline.example import example_plan, example_reporter, example_session
    >>> session, reporter, plan = example_session(), example_reporter(), example_plan(0.5)
    >>> with Run.start(Path("budget"), {}, {}) as run:
    ...     problem, allocation, _ = allocated(session, reporter, plan, run)
    >>> file = budget_of(session, plan, problem, allocation)
    >>> file.allocator, file.used <= file.limit, file.error_unit.value
    ('uniform', True, 'nats per token')
    """
    coverage = session.layers.coverage
    return budget_file.make(
        allocation,
        problem,
        session.fingerprint,
        coverage.covered,
        coverage.block_params,
        plan.rule.kept,
        plan.analysis.unit,
    )


@contextlib.contextmanager
def true_loss(
    session: Session,
    reporter: Reporter,
    plan: SearchPlan,
    analysis: LayerAnalysis,
    problem: Problem,
    stage: str = "search",
) -> Iterator[SearchObjective]:
    """Yield the objective of an analysed model: the KL divergence from the dense model on the selection text.

    The session's model is dense again when the context ends.

    Args:
        analysis: of a run; its journal keeps the evaluations.
        stage: name of the stage on the display.

    >>> from globalopt.pipeline.example import example_plan, example_reporter, example_session
    >>> session, reporter, plan = example_session(), example_reporter(), example_plan()
    >>> with Run.start(Path("loss"), {}, {}) as run:
    ...     analysis = analyse(session, reporter, plan.analysis, run)
    ...     problem = pose(session, plan, run)
    ...     allocation = Uniform(rank_share=0.0).allocate(problem)
    ...     with true_loss(session, reporter, plan, analysis, problem) as objective:
    ...         losses = objective.losses([allocation.targets], [0])
    >>> bool((losses > 0).all())
    True
    """
    batches = session.batches(session.splits.selection)
    selection = Selection(tuple(len(batch.input_ids) for batch in batches), session.splits.selection.seqlen)
    most = plan.search_tokens // max(batch.tokens for batch in batches)
    run = analysis.work
    assert isinstance(run, Run), "the analysis of a run"
    gap = read_gap(analysis)
    specs = {spec.name: spec for spec in problem.specs}

    def fitted(surface: ErrorSurface, weight: Tensor) -> AnchoredLayer:
        residuals = analysis.residuals(surface.spec, weight, gap)
        overlap = run.get(PREDICTION, surface.spec).overlap
        assert overlap is not None, "anchor solutions were predicted too"
        return AnchoredLayer(surface, residuals.rows, residuals.tensor, overlap)

    with reporter.stage(stage, most, "chunks") as advance:
        objective = SearchObjective(
            lambda: BlockRunner(session.layers, batches),
            selection,
            problem,
            fitted if plan.analysis.anchors and plan.candidates != "span" else None,
            plan.search_tokens,
            run.journal_path,
            run.path(TEACHER, None),
            advance,
            lambda name, weight: _span(run, specs[name], weight),
        )
        try:
            yield objective
        finally:
            objective.close()


def search_identity(session: Session, plan: SearchPlan) -> dict[str, Any]:
    """Return all that decides the results of a search: model, text, options, methods and versions of algorithms.

    >>> from globalopt.pipeline.example import example_plan, example_session
    >>> search_identity(example_session(), example_plan(0.3))["search"]["budget"]
    0.3
    """
    return {**session.identity(), **plan.record(), "algorithms": algorithms()}
