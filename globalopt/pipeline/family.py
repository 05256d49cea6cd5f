"""Allocate a family of budgets from one analysis: nested allocations, and the loss expected of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from allocators import Knapsack, Uniform
from allocators.nested import nested
from globalopt.analysis.layer_analysis import LayerAnalysis
from globalopt.budgets import budget_file
from globalopt.errors import BudgetError, UsageError
from globalopt.machine import ranks
from globalopt.pipeline.addresses import FINISHED, VERSIONS, algorithms, correction_address, objective_addresses
from globalopt.pipeline.analyse import analyse, discard_solutions
from globalopt.pipeline.plan import SearchPlan
from globalopt.pipeline.problem import pose
from globalopt.pipeline.reporter import Reporter
from globalopt.pipeline.reuse import note_reused, opened
from globalopt.pipeline.search import budget_of, corrected, outcome, true_loss
from globalopt.pipeline.session import Session, versions
from globalopt.runs.artefacts import FAMILY, Stage
from globalopt.runs.cache import Cache
from globalopt.runs.folder import Run
from globalopt.values.budget import Budget
from globalopt.values.family import Family, FamilyPoint
from globalopt.values.layer import LayerSpec
from globalopt.values.problem import Allocation, Problem
from globalopt.values.search_record import Outcome

FRONTIER = tuple(round(0.05 * step, 2) for step in range(2, 19))
"""Fractions kept of the default family: 0.1 to 0.9 in steps of 0.05."""

ALLOCATOR = Knapsack.name
"""Name of the allocator of every budget; its options may be given."""

UNREAD = ("budget", "allocator", "search_tokens")
"""Options of a search that a family's allocations do not depend on."""


def family(
    session: Session,
    reporter: Reporter,
    plan: SearchPlan,
    budgets: Sequence[float],
    folder: Path,
    command: str,
    cache: Cache | None = None,
    fresh: bool = False,
    leave_out: bool = False,
) -> tuple[Family, Run]:
    """Analyse a model once, allocate every budget, and evaluate every allocation; no layer is refined.

    A smaller budget's allocation is within a larger one's: no layer keeps more. A call with the same arguments
    continues an interrupted run.

    Args:
        plan: of a search by the knapsack. Its budget is not used; with `search_tokens` 0 nothing is evaluated.
        budgets: fractions kept, distinct.
        folder: run folder, for budget files and `family.json`.
        command: command line, for the record.
        cache: shared artefacts of runs; None keeps them in the run folder.
        fresh: delete an earlier run in the folder; artefacts in the cache are used again.
        leave_out: whether budgets that are too small for the pattern are left out instead of refused.
    Raises:
        UsageError: the allocator of the plan is not the knapsack.
        BudgetError: a budget, or with `leave_out` every one of them, is too small for the pattern.
        ArtefactError: the folder holds another run.

    >>> from globalopt.pipeline.example import example_plan, example_reporter, example_session
    >>> plan = example_plan(allocator="knapsack", search_tokens=0)
    >>> found, run = family(
    ...     example_session(), example_reporter(), plan, [0.3, 0.5], Path("family"), "globalopt search"
    ... )
    >>> [(point.asked, point.used, point.file) for point in found.points]
    [(0.3, 1305, 'budgets/0.3.json'), (0.5, 2176, 'budgets/0.5.json')]
    >>> found.points[0].predicted > found.points[1].predicted
    True
    """
    knapsack = plan.allocator
    if not isinstance(knapsack, Knapsack):
        raise UsageError(f"A family of budgets is made by the nested knapsack, not by {knapsack.name}.")
    specs = session.layers.specs
    reached = _reached(plan, specs, budgets, leave_out)
    left_out = tuple(sorted(set(budgets) - reached.keys()))
    plan = replace(plan, rule=replace(plan.rule, kept=max(reached)))
    around = _around(list(reached.values()))
    addresses = dict(objective_addresses(session, plan))
    addresses[Stage.CORRECTIONS] = correction_address(addresses, plan, [budget.kept for budget in around])
    identity = family_identity(session, plan, list(reached))
    with opened(session, folder, identity, command, cache, fresh) as (run, at):
        if ranks.told(run.has(FAMILY, None)):
            reporter.note(f"{folder} is finished; nothing was computed again.")
            return run.family(), run
        if left_out:
            named = ", ".join(f"{kept:g}" for kept in left_out)
            reporter.note(f"Left out: {named}. Pattern {plan.analysis.pattern} needs more.")
        at(addresses)
        note_reused(session, reporter, run, addresses)
        analysis = analyse(session, reporter, plan.analysis, run, plan.reads)
        predicted = pose(session, plan, run)
        problem = corrected(session, reporter, plan, analysis, predicted, around)
        found: list[Allocation] = []
        with reporter.stage("allocate", len(reached), "budgets") as advance:
            for allocation in nested(problem, list(reached.values()), knapsack) if ranks.writer() else ():
                found.append(allocation)
                advance(f"kept {allocation.budget.kept:.4g}")
            found = ranks.told(found)
        files = [
            budget_of(session, replace(plan, rule=replace(plan.rule, kept=kept)), problem, allocation)
            for kept, allocation in zip(reached, found, strict=True)
        ]
        for file in files if ranks.writer() else ():
            budget_file.write(run.family_budget_path(file.asked), file)
        flat = [Uniform().allocate(replace(problem, budget=budget)) for budget in reached.values()]
        outcomes, candidates = _outcomes(session, reporter, plan, analysis, predicted, [*found, *flat])
        selection = session.splits.selection
        made = Family(
            command=command,
            model=session.name,
            solver=plan.words["solver"],
            solver_options=plan.words["solver_options"],
            seed=plan.seed,
            accounting=plan.rule.accounting,
            pattern=plan.words["pattern"],
            total=problem.budget.total,
            error_unit=files[0].error_unit,
            candidates=candidates,
            windows=len(selection.windows),
            seqlen=selection.seqlen,
            left_out=left_out,
            stages=reporter.costs,
            versions=versions(),
            points=tuple(
                FamilyPoint(
                    **asdict(outcome),
                    asked=file.asked,
                    limit=file.limit,
                    file=run.family_budget_path(file.asked).relative_to(folder).as_posix(),
                    bound=allocation.bound or 0.0,
                    gap=allocation.gap or 0.0,
                    uniform=uniform,
                )
                for file, allocation, outcome, uniform in zip(
                    files, found, outcomes[: len(found)], outcomes[len(found) :], strict=True
                )
            ),
        )
        if ranks.writer():
            run.publish(specs, 0)
            run.put(FAMILY, None, made)
            discard_solutions(run, specs)
        ranks.written(run)
        return made, run


def family_identity(session: Session, plan: SearchPlan, budgets: Sequence[float]) -> dict[str, Any]:
    """Return all that decides the results of a family: model, text, options, budgets and versions of algorithms.

    >>> from globalopt.pipeline.example import example_plan, example_session
    >>> family_identity(example_session(), example_plan(allocator="knapsack"), [0.3, 0.5])["family"]["budgets"]
    [0.3, 0.5]
    """
    record = plan.record()
    words = {name: value for name, value in record["search"].items() if name not in UNREAD}
    return {
        **session.identity(),
        "family": {**words, "budgets": list(budgets), "measured": plan.search_tokens > 0},
        "methods": record["methods"],
        "algorithms": algorithms(stage for stage in VERSIONS if stage not in FINISHED),
    }


def _around(budgets: Sequence[Budget]) -> list[Budget]:
    """Choose the budgets around which predicted losses are corrected: the least, the middle and the largest one."""
    return [budgets[i] for i in sorted({0, len(budgets) // 2, len(budgets) - 1})]


def _reached(
    plan: SearchPlan, specs: tuple[LayerSpec, ...], budgets: Sequence[float], leave_out: bool
) -> Mapping[float, Budget]:
    """Return the budgets by fraction, ascending; leave out, or refuse, those too small for the pattern."""
    reached = {}
    for kept in sorted(budgets):
        budget = replace(plan.rule, kept=kept).of(specs)
        try:
            plan.check_feasible(specs, budget)
        except BudgetError:
            if not leave_out or kept == max(budgets):
                raise
        else:
            reached[kept] = budget
    return reached


def _outcomes(
    session: Session,
    reporter: Reporter,
    plan: SearchPlan,
    analysis: LayerAnalysis,
    problem: Problem,
    allocations: Sequence[Allocation],
) -> tuple[list[Outcome], str | None]:
    """Evaluate every allocation on all of the selection text; return what candidates were made from as well."""
    if not plan.search_tokens:
        return [outcome(one) for one in allocations], None
    whole = replace(plan, search_tokens=len(allocations) * session.splits.selection.windows.numel())
    chunks = -(-len(session.splits.selection.windows) // session.text_options.batch_size)
    with (
        reporter.stage("measure", chunks * len(allocations), "chunks") as advance,
        true_loss(session, whole, analysis, problem, None, advance) as objective,
    ):
        return objective.team.run(lambda: [outcome(one, objective) for one in allocations]), objective.candidates
