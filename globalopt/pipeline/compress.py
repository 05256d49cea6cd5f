"""Compress a model to the targets of an existing budget file, with any solver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from globalopt.analysis.layer_analysis import LayerAnalysis
from globalopt.budgets import budget_file
from globalopt.budgets.budget_file import BudgetFile
from globalopt.budgets.conversion import convert_target
from globalopt.embeddings.find import check_embeddings
from globalopt.machine import ranks
from globalopt.pipeline.addresses import REFINED, algorithms, compress_addresses
from globalopt.pipeline.analyse import choose_error_metrics, collect_output_grams, discard_inputs
from globalopt.pipeline.finish import finish
from globalopt.pipeline.measure import gone_on
from globalopt.pipeline.plan import RefinementPlan, probe_solver
from globalopt.pipeline.reporter import Reporter
from globalopt.pipeline.reuse import note_reused, opened
from globalopt.pipeline.session import Session
from globalopt.runs.artefacts import METRIC_CHOICE, SUMMARY
from globalopt.runs.cache import Cache
from globalopt.runs.files import digest
from globalopt.runs.folder import Run
from globalopt.values.results import Summary


def compress(
    session: Session,
    reporter: Reporter,
    plan: RefinementPlan,
    source: Path,
    file: BudgetFile,
    folder: Path,
    command: str,
    cache: Cache | None = None,
    fresh: bool = False,
) -> tuple[Summary, Run]:
    """Compress a model to the targets of a budget file, evaluate it, and write the run into `folder`.

    A call with the same arguments continues an interrupted run. The session's model is changed in place: a session
    serves one refinement.

    Args:
        plan: how the layers are refined.
        source: path of the budget file, for messages.
        file: the budget.
        command: command line, for the record.
        cache: shared artefacts of runs; None keeps them in the run folder.
        fresh: delete an earlier run in the folder; artefacts in the cache are used again.
    Raises:
        ArtefactError: the budget file is of another model, or the folder holds another run.
        UsageError: the solver cannot meet the targets, or the model cannot be matched as asked.
        NumericalError: a layer could not be solved.

    >>> from globalopt.pipeline.example import example_budget, example_refinement, example_reporter, example_session
    >>> session, plan = example_session(), example_refinement("sparsegpt")
    >>> file = example_budget(session, kept=0.25)
    >>> summary, run = compress(
    ...     session, example_reporter(), plan, Path("budget.json"), file, Path("run"), "globalopt compress"
    ... )
    >>> summary.solver, summary.used / summary.total, run.model_folder.name
    ('sparsegpt', 0.25, 'model')
    """
    allocation = file.for_model(session.fingerprint, session.layers.specs, source)
    check_embeddings(session.layers.model, file.matrices, source)
    plan.check(session.layers)
    for spec in session.layers.specs:
        file.served.check(convert_target(allocation.targets[spec.name], spec, plan.solver, allocation.budget), spec)
    patterns = {target.pattern for target in allocation.targets.values()}
    pattern = patterns.pop() if len(patterns) == 1 else None
    probe = probe_solver(plan.solver)
    addresses = compress_addresses(session, plan, file, probe, pattern)
    with opened(session, folder, compress_identity(session, plan, file), command, cache, fresh) as (run, at):
        if ranks.told(run.has(SUMMARY, None)):
            return gone_on(session, reporter, run), run
        at(addresses)
        reused = note_reused(session, reporter, run, addresses)
        ranks.by_writer(lambda: budget_file.write(run.budget_path, file))
        specs = session.layers.specs
        if plan.metric_choices and ranks.told(run.missing(METRIC_CHOICE, specs)):
            collect_output_grams(session, reporter, run, specs, plan.seed)
            analysis = LayerAnalysis(session.layers, run, pattern, file.served, weighted=True)
            choose_error_metrics(session, reporter, analysis, probe)
        if ranks.writer():
            discard_inputs(run, specs)
        return finish(session, reporter, run, plan, file, command, reused=reused), run


def compress_identity(session: Session, plan: RefinementPlan, file: BudgetFile) -> dict[str, Any]:
    """Return all that decides the results of a refinement: model, text, budget, plan and versions of algorithms.

    >>> from globalopt.pipeline.example import example_budget, example_refinement, example_session
    >>> session = example_session()
    >>> identity = compress_identity(session, example_refinement(), example_budget(session))
    >>> sorted(identity)
    ['algorithms', 'batch_size', 'budget', 'dtype', 'model', 'refining', 'splits']
    """
    budget = digest(budget_file.record(file))
    return {**session.identity(), "budget": budget, "refining": plan.record(), "algorithms": algorithms(REFINED)}
