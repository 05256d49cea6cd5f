"""Search: analyse a model, allocate its budget, and refine it to the allocation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from allocators import Knapsack, Uniform
from globalopt.analysis.attribution import attribute
from globalopt.analysis.corrections import WINDOWS, correct
from globalopt.analysis.layer_analysis import LayerAnalysis, read_gap
from globalopt.budgets import budget_file
from globalopt.budgets.budget_file import BudgetFile
from globalopt.machine import ranks
from globalopt.machine.team import Team
from globalopt.models.block_runner import BlockRunner
from globalopt.objective.candidates import AnchoredLayer
from globalopt.objective.journal import Selection
from globalopt.objective.of_run import SearchObjective
from globalopt.pipeline.addresses import algorithms, refinement_addresses, search_addresses
from globalopt.pipeline.analyse import analyse, discard_solutions
from globalopt.pipeline.embeddings import beside_embeddings, choose, largest_budget, layer_budget, measured_menus
from globalopt.pipeline.finish import finish
from globalopt.pipeline.measure import gone_on
from globalopt.pipeline.plan import SearchPlan
from globalopt.pipeline.problem import pose, span_of
from globalopt.pipeline.reporter import Reporter
from globalopt.pipeline.reuse import note_reused, opened
from globalopt.pipeline.session import Session
from globalopt.protocols import Reads
from globalopt.runs.answers import remembered
from globalopt.runs.artefacts import (
    ALLOCATED,
    CORRECTIONS,
    LOSSES_ALONE,
    PREDICTION,
    ROUNDING,
    SHARES,
    SUMMARY,
    TEACHER,
)
from globalopt.runs.cache import Cache
from globalopt.runs.folder import Run
from globalopt.runs.records import Allocated
from globalopt.values.attribution import Attribution
from globalopt.values.budget import Budget, Target
from globalopt.values.corrections import NO_CORRECTIONS, Corrections
from globalopt.values.embeddings import Embedding
from globalopt.values.problem import Allocation, Problem
from globalopt.values.results import Summary
from globalopt.values.search_record import Outcome
from globalopt.values.surface import ErrorSurface


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
    plan.check_feasible(specs, largest_budget(session.layers, plan))
    plan.refinement.check(session.layers)
    addresses = search_addresses(session, plan)
    with opened(session, folder, search_identity(session, plan), command, cache, fresh) as (run, at):
        if ranks.told(run.has(SUMMARY, None)):
            return gone_on(session, reporter, run), run
        at(addresses)
        reused = note_reused(session, reporter, run, addresses)
        problem, allocation, found = allocated(session, reporter, plan, run)
        file = budget_of(session, plan, problem, allocation, found.embeddings)
        ranks.by_writer(lambda: budget_file.write(run.budget_path, file))
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
    corrects = plan.rounds and Reads.SURFACES in plan.reads
    done = ranks.told(run.has(ALLOCATED, None) and (run.has(CORRECTIONS, None) or not corrects))
    analysis = analyse(session, reporter, plan.analysis, run, plan.reads, done)
    choices = measured_menus(session, reporter, plan, run)
    predicted = pose(session, plan, run)
    first, _ = ranks.by_writer(lambda: choose(plan, predicted, choices, Knapsack(exact=False).allocate))
    predicted = replace(predicted, budget=layer_budget(plan, predicted.specs, first))
    problem = corrected(session, reporter, plan, analysis, predicted, [predicted.budget])
    if not ranks.told(run.has(ALLOCATED, None)):
        stored, bound = ranks.by_writer(lambda: choose(plan, problem, choices, Knapsack().allocate))
        budget = layer_budget(plan, problem.specs, stored)
        beside = replace(predicted, budget=budget), replace(problem, budget=budget)
        chosen = beside_embeddings(allocate(session, reporter, plan, analysis, *beside), stored, bound)
        if ranks.writer():
            run.put(ALLOCATED, None, chosen)
        ranks.written(run)
    if ranks.writer():
        discard_solutions(run, problem.specs)
    found = run.get(ALLOCATED, None)
    problem = replace(problem, budget=layer_budget(plan, problem.specs, found.embeddings))
    return problem, problem.finish(found.targets, plan.allocator.name, found.bound), found


def corrected(
    session: Session,
    reporter: Reporter,
    plan: SearchPlan,
    analysis: LayerAnalysis,
    problem: Problem,
    budgets: Sequence[Budget],
) -> Problem:
    """Correct the predicted losses of a problem by the model, around the allocations that they lead to.

    Args:
        problem: with surfaces as predicted.
        budgets: around which they are corrected, one after the other.
    Returns:
        the problem with corrected surfaces; `problem` itself where the plan corrects nothing or predicts nothing.

    >>> from globalopt.pipeline.example import example_plan, example_reporter, example_session
    >>> session, reporter, plan = example_session(), example_reporter(), example_plan(allocator="knapsack")
    >>> with Run.start(Path("corrected"), {}, {}) as run:
    ...     analysis = analyse(session, reporter, plan.analysis, run)
    ...     problem = pose(session, plan, run)
    ...     found = corrected(session, reporter, plan, analysis, problem, [problem.budget])
    >>> len(found.surfaces), len(run.get(CORRECTIONS, None).losses) > 0
    (14, True)
    """
    run = analysis.work
    if not plan.rounds or Reads.SURFACES not in plan.reads:
        return problem
    if not ranks.told(run.has(CORRECTIONS, None)):
        solve = Knapsack(exact=False).allocate
        dense = {spec.name: Target.dense(spec) for spec in problem.specs}
        with (
            reporter.stage("correct", plan.rounds * len(budgets), "rounds") as advance,
            true_loss(session, plan, analysis, problem, WINDOWS) as objective,
        ):

            def shares(targets: Mapping[str, Target]) -> Attribution:
                model, weights = objective.weights(targets)
                return attribute(model, weights, range(model.chunks), session.loaded.device)

            def alone(targets: Mapping[str, Target]) -> dict[str, float]:
                model, weights = objective.weights({**dense, **targets})
                losses = model.losses_of([{name: weights[name]} for name in targets], range(model.chunks)).mean(1)
                return dict(zip(targets, losses.tolist(), strict=True))

            team = Team({"shares": shares, "alone": alone})

            def corrections() -> Corrections:
                best = NO_CORRECTIONS
                # Only the writer asks, and what was answered before it was killed is read back.
                asked = (
                    remembered(run, SHARES, partial(team.ask, "shares")),
                    remembered(run, LOSSES_ALONE, partial(team.ask, "alone")),
                )
                for budget in budgets:
                    for found in correct(replace(problem, budget=budget), solve, *asked, plan.rounds, best):
                        advance(f"loss {found.losses[-1]:.3g}")
                        best = found
                return best

            best = team.run(corrections)
        if ranks.writer():
            run.put(CORRECTIONS, None, best)
        ranks.written(run)
    return run.get(CORRECTIONS, None).apply(problem)


def allocate(
    session: Session,
    reporter: Reporter,
    plan: SearchPlan,
    analysis: LayerAnalysis,
    predicted: Problem,
    problem: Problem,
) -> Allocated:
    """Choose the targets of all layers, and predict the loss of the uniform allocation for comparison.

    An allocator that uses the objective gets it, and its allocation and the uniform one are evaluated on all of the
    selection text.

    Args:
        predicted: with surfaces as predicted, of which the candidates of the objective are made.
        problem: with corrected surfaces.

    >>> from globalopt.pipeline.example import example_plan, example_reporter, example_session
    >>> session, reporter, plan = example_session(), example_reporter(), example_plan(allocator="knapsack")
    >>> with Run.start(Path("knapsack"), {}, {}) as run:
    ...     analysis = analyse(session, reporter, plan.analysis, run)
    ...     problem = pose(session, plan, run)
    ...     found = allocate(session, reporter, plan, analysis, problem, problem)
    >>> found.bound <= problem.finish(found.targets, by="knapsack").predicted <= found.uniform.predicted
    True
    """
    flat = Uniform().allocate(problem)
    if Reads.OBJECTIVE not in plan.reads:
        with reporter.stage("allocate", 1, "budgets") as advance:
            allocation = ranks.by_writer(lambda: plan.allocator.allocate(problem))
            advance(plan.allocator.name)
        return Allocated(allocation.targets, allocation.bound, None, outcome(flat))
    selection = session.splits.selection
    most = plan.search_tokens // (min(session.text_options.batch_size, len(selection.windows)) * selection.seqlen)
    with (
        reporter.stage("search", most, "chunks") as advance,
        true_loss(session, plan, analysis, predicted, None, advance, problem) as objective,
    ):

        def searched() -> Allocated:
            # The spans of the problem itself would be those of a model that holds candidates.
            allocation = plan.allocator.allocate(replace(problem, spans=objective.span), objective)
            loss = float(objective.losses([allocation.targets], range(objective.chunks)).mean())
            record = objective.search_record(loss)
            # After the search, whose tokens it does not use.
            return Allocated(allocation.targets, allocation.bound, record, outcome(flat, objective))

        return objective.team.run(searched)


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


def budget_of(
    session: Session,
    plan: SearchPlan,
    problem: Problem,
    allocation: Allocation,
    embeddings: Sequence[Embedding] = (),
) -> BudgetFile:
    """Make the budget file of an allocation, which the `embeddings` are beside.

    >>> from globalopt.pipeline.example import example_plan, example_reporter, example_session
    >>> session, reporter, plan = example_session(), example_reporter(), example_plan(0.5)
    >>> with Run.start(Path("budget"), {}, {}) as run:
    ...     problem, allocation, _ = allocated(session, reporter, plan, run)
    >>> file = budget_of(session, plan, problem, allocation)
    >>> file.allocator, file.used <= file.limit, file.error_unit.value
    ('uniform', True, 'not predicted')
    """
    coverage = session.layers.coverage
    file = budget_file.make(
        allocation,
        problem,
        session.fingerprint,
        coverage.covered,
        coverage.block_params,
        plan.rule.kept,
        plan.analysis.unit,
        embeddings,
    )
    return file if Reads.SURFACES in plan.reads else budget_file.unpredicted(file)


@contextlib.contextmanager
def true_loss(
    session: Session,
    plan: SearchPlan,
    analysis: LayerAnalysis,
    problem: Problem,
    windows: int | None = None,
    advance: Callable[[str], None] = lambda detail: None,
    beside: Problem | None = None,
) -> Iterator[SearchObjective]:
    """Yield the objective of an analysed model: the KL divergence from the dense model on the selection text.

    The session's model is dense again when the context ends.

    Args:
        analysis: of a run; its journal keeps the evaluations.
        problem: with surfaces as predicted, of which candidates are made.
        windows: the first windows of the text alone, without a journal, on a rough `ModelObjective`; None is all of
            them.
        advance: called for every candidate and chunk whose tokens are counted.
        beside: problem whose predictions are recorded beside the evaluations; None is `problem`.

    >>> from globalopt.pipeline.example import example_plan, example_reporter, example_session
    >>> session, reporter, plan = example_session(), example_reporter(), example_plan()
    >>> with Run.start(Path("loss"), {}, {}) as run:
    ...     analysis = analyse(session, reporter, plan.analysis, run)
    ...     problem = pose(session, plan, run, Reads.SURFACES)
    ...     allocation = Uniform(rank_share=0.0).allocate(problem)
    ...     with true_loss(session, plan, analysis, problem) as objective:
    ...         losses = objective.losses([allocation.targets], [0])
    >>> bool((losses > 0).all())
    True
    """
    batches = session.batches(session.splits.selection, windows=windows)
    selection = Selection(tuple(len(batch.input_ids) for batch in batches), session.splits.selection.seqlen)
    run = analysis.work
    assert isinstance(run, Run), "the analysis of a run"
    gap = read_gap(analysis)
    specs = {spec.name: spec for spec in problem.specs}

    def fitted(surface: ErrorSurface, weight: Tensor) -> AnchoredLayer:
        residuals = analysis.residuals(surface.spec, weight, gap)
        prediction = run.get(PREDICTION, surface.spec)
        assert prediction.overlap is not None, "anchor solutions were predicted too"
        rounding = run.get(ROUNDING, surface.spec) if plan.analysis.rounds_numbers else None
        return AnchoredLayer(prediction.surface, residuals.rows, residuals.tensor, prediction.overlap, rounding)

    objective = SearchObjective(
        lambda: BlockRunner(session.layers, batches),
        selection,
        problem,
        fitted if plan.analysis.anchors and plan.candidates != "span" else None,
        plan.search_tokens,
        run.journal_path if windows is None else None,
        run.path(TEACHER, None) if windows is None else None,
        advance,
        beside,
        lambda name, weight: span_of(run, specs[name], weight),
        rough=windows is not None,
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
