"""A family of budgets from one analysis: allocations within each other, and what each of them is expected to lose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from allocators import Knapsack, Uniform
from allocators.nested import nested
from globalopt.budgets import budget_file
from globalopt.errors import BudgetError
from globalopt.pipeline.analyse import analyse
from globalopt.pipeline.options import SearchOptions, check_feasible
from globalopt.pipeline.search import budget_of, outcome, pose, true_loss
from globalopt.pipeline.session import Bench, versions
from globalopt.registry import read_options
from globalopt.runs.folder import Run
from globalopt.values.budget import Budget
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.problem import Allocation, Problem
from globalopt.values.results import Family, FamilyPoint, Outcome

FRONTIER = tuple(round(0.05 * step, 2) for step in range(2, 19))
"""Fractions kept of a whole frontier: 0.1 to 0.9 in steps of 0.05."""

ALLOCATOR = Knapsack.name
"""What solves every point, and whose options may be given."""

UNREAD = ("budget", "allocator", "search_tokens")
"""Options of a search that do not decide a family."""


def family(
    bench: Bench,
    options: SearchOptions,
    budgets: Sequence[float],
    folder: Path,
    command: str,
    fresh: bool = False,
    leave_out: bool = False,
) -> tuple[Family, Run]:
    """Span once, allocate at every budget, measure every allocation; nothing is refined.

    Running it again goes on where it stopped.

    Args:
        options: of a search; `budget` and `allocator` are not read, `allocator_options` are the knapsack's, and with
            `search_tokens` 0 nothing is measured.
        budgets: fractions kept, distinct.
        leave_out: whether budgets that the pattern does not reach are left out instead of refused.

    Raises:
        BudgetError: a budget, or with `leave_out` every one of them, is below what the pattern needs.
    """
    knapsack = Knapsack(**read_options(Knapsack, f"allocator '{ALLOCATOR}'", options.allocator_options))
    pattern = NM.parse(options.pattern)
    specs = bench.layers.specs
    reached = _reached(options, specs, budgets, leave_out)
    left_out = tuple(sorted(set(budgets) - reached.keys()))
    words = {name: value for name, value in options.words().items() if name not in UNREAD}
    identity = {
        **bench.identity(options.seed),
        "family": {**words, "budgets": list(reached), "measured": options.search_tokens > 0},
    }
    run = Run.start(folder, identity, bench.facts(command), fresh)
    if run.family_path.exists():
        bench.progress.note(f"{folder} is finished; nothing was computed again.")
        return run.read_family(), run
    if left_out:
        bench.progress.note(f"Left out: {', '.join(f'{kept:g}' for kept in left_out)}. Pattern {pattern} needs more.")

    analyse(bench, options, run, pattern)
    problem = pose(bench, replace(options, budget=max(reached)), run)
    found: list[Allocation] = []
    with bench.stage("allocate", len(reached), "budgets") as advance:
        for allocation in nested(problem, list(reached.values()), knapsack):
            found.append(allocation)
            advance(f"kept {allocation.budget.kept:.4g}")
    files = [
        budget_of(bench, replace(options, budget=kept), problem, allocation)
        for kept, allocation in zip(reached, found, strict=True)
    ]
    for file in files:
        budget_file.write(run.family_budget_path(file.asked), file)
    flat = [Uniform().allocate(replace(problem, budget=budget)) for budget in reached.values()]
    outcomes, candidates = _outcomes(bench, options, run, problem, [*found, *flat])
    selection = bench.splits.selection
    made = Family(
        command=command,
        model=bench.name,
        solver=options.solver,
        solver_options=options.solver_options,
        seed=options.seed,
        accounting=options.accounting,
        pattern=options.pattern,
        total=problem.budget.total,
        error_unit=files[0].error_unit,
        candidates=candidates,
        windows=len(selection.windows),
        seqlen=selection.seqlen,
        left_out=left_out,
        stages=bench.clock.costs,
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
    run.write_family(made)
    return made, run


def _reached(
    options: SearchOptions, specs: tuple[LayerSpec, ...], budgets: Sequence[float], leave_out: bool
) -> Mapping[float, Budget]:
    """The budgets by their fractions, ascending, without those below the pattern's own cost if they may be left out."""
    reached = {}
    for kept in sorted(budgets):
        budget = Budget.fraction(kept, specs, options.accounting)
        try:
            check_feasible(options, specs, budget)
        except BudgetError:
            if not leave_out or kept == max(budgets):
                raise
        else:
            reached[kept] = budget
    return reached


def _outcomes(
    bench: Bench, options: SearchOptions, run: Run, problem: Problem, allocations: Sequence[Allocation]
) -> tuple[list[Outcome], str | None]:
    """What every allocation comes to, measured on all of the selection text, and what candidates were made from."""
    if not options.search_tokens:
        return [outcome(one) for one in allocations], None
    whole = replace(options, search_tokens=len(allocations) * bench.splits.selection.windows.numel())
    with true_loss(bench, whole, run, problem, "measure") as objective:
        return [outcome(one, objective) for one in allocations], objective.candidates
