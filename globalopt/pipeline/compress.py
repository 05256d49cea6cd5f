"""Refine a budget that was found before, with any solver."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from globalopt.budgets import budget_file
from globalopt.budgets.budget_file import BudgetFile
from globalopt.budgets.conversion import for_solver
from globalopt.pipeline.analyse import collect_outputs, weigh
from globalopt.pipeline.finish import finish
from globalopt.pipeline.options import (
    AS_FITTED,
    SENSITIVITIES,
    RefineOptions,
    check_word,
)
from globalopt.pipeline.session import Bench
from globalopt.protocols import Outputs, Solver
from globalopt.runs.files import digest
from globalopt.runs.folder import Run
from globalopt.values.layer import LayerSpec
from globalopt.values.metric import Gram
from globalopt.values.results import ErrorUnit, Summary
from solvers import get_solver


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
    unit, outputs = ErrorUnit.OUTPUT_ERROR, _no_outputs
    if sensitivity != "none" and solver.outputs is not Outputs.NONE:
        unit, outputs = ErrorUnit.NATS, run.read_outputs
        collect_outputs(bench, run, seed)
        patterns = {target.pattern for target in allocation.targets.values()}
        weigh(bench, run, patterns.pop() if len(patterns) == 1 else None, solver.outputs, file.served)
    matching = refining.matching(sensitivity)
    return finish(bench, run, file, allocation, solver, command, seed, unit, outputs, refining, matching), run


def _no_outputs(spec: LayerSpec) -> Gram | None:
    return None
