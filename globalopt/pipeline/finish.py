"""Refine a model to a budget, match it, save it, evaluate the saved model, and write the summary."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from globalopt.budgets.budget_file import BudgetFile
from globalopt.budgets.conversion import convert_target
from globalopt.export.card import write_card
from globalopt.machine import ranks
from globalopt.matching.model import Distillation, match_model, teacher_distributions
from globalopt.models.origin import origin_of
from globalopt.models.refusals import listed
from globalopt.models.saving import save_dense
from globalopt.pipeline.analyse import collect_output_grams
from globalopt.pipeline.embeddings import place_embeddings
from globalopt.pipeline.measure import evaluate_saved
from globalopt.pipeline.plan import RefinementPlan
from globalopt.pipeline.reporter import Reporter
from globalopt.pipeline.session import Session, versions
from globalopt.pipeline.unreached import left_dense, without_tokens
from globalopt.protocols import Needs, Solver
from globalopt.refine.blocks import Refinement, checked, refine
from globalopt.runs.artefacts import (
    BLOCK_OUTPUT_GRAM,
    MATCHED_BLOCK,
    MATCHED_MODEL,
    OUTPUT_GRAM,
    SOLVED_LAYER,
    SUMMARY,
)
from globalopt.runs.files import is_there
from globalopt.runs.folder import Run
from globalopt.runs.records import Allocated, Matched
from globalopt.values.budget import Target
from globalopt.values.embeddings import stored_bytes
from globalopt.values.layer_results import LayerResult
from globalopt.values.metrics import Metrics
from globalopt.values.problem import Allocation
from globalopt.values.results import Summary


def finish(
    session: Session,
    reporter: Reporter,
    run: Run,
    plan: RefinementPlan,
    file: BudgetFile,
    command: str,
    found: Allocated | None = None,
    reused: Sequence[str] = (),
) -> Summary:
    """Refine a model to a budget, match it, save it, evaluate the saved model, and write the summary.

    The session's model is changed in place, and its weights are freed before the evaluation: a session serves one
    refinement.

    Args:
        run: with the output Grams and metric choices that the plan needs; see `compress`.
        plan: how the layers are refined.
        file: the budget.
        command: command line, for the record.
        found: result of the search before it, or None.
        reused: notes on artefacts of earlier runs, whose stages took no time in this one.
    Raises:
        NumericalError: a layer could not be solved.

    >>> from pathlib import Path
    >>> from globalopt.pipeline.example import example_budget, example_refinement, example_reporter, example_session
    >>> session = example_session()
    >>> with Run.start(Path("run"), {}, {}) as run:
    ...     file = example_budget(session)
    ...     summary = finish(session, example_reporter(), run, example_refinement(), file, "globalopt compress")
    >>> [(metrics.split, metrics.kl > 0) for metrics in summary.compressed]
    [('validation', True), ('test', True)]
    """
    layers, allocation = session.layers, file.allocation
    targets = {
        spec.name: convert_target(allocation.targets[spec.name], spec, plan.solver, allocation.budget)
        for spec in layers.specs
    }
    refinement = _refinement(session, plan, file, targets)
    notes = [*_notes(allocation, plan.solver), *_errors_note(refinement)]
    if session.quantisation:
        notes.append(f"The dense model is {session.name}, dequantised from {session.quantisation}.")
    if session.loaded.unused:
        notes.append(f"The result lacks {listed(session.loaded.unused)}; the model's class does not use them.")
    for note in notes:
        reporter.note(note)
    unsolved = ranks.told(run.missing(SOLVED_LAYER, layers.specs if plan.output_grams else ()))
    unmatched = ranks.told(run.missing(MATCHED_BLOCK, range(len(layers.blocks)) if plan.block_output_grams else ()))
    if ranks.told(bool(run.missing(OUTPUT_GRAM, unsolved) or run.missing(BLOCK_OUTPUT_GRAM, unmatched))):
        # No earlier sweep computed them, or they were pruned from the cache since.
        collect_output_grams(session, reporter, run, unsolved, plan.seed, unmatched)
    results = _refined(session, reporter, run, refinement, file)
    for note in (unreached := without_tokens(run, layers)):
        reporter.note(note)
    if plan.distillation is not None:
        match_whole(session, reporter, run, plan.distillation, targets, plan.seed)
    coded = [each.name for each in file.matrices if each.bits < 16]
    if ranks.writer():
        run.publish(layers.specs, len(layers.blocks), coded)
    ranks.written(run)
    # All others find the links there, and read them from now on.
    run.publish(layers.specs, len(layers.blocks), coded)
    loaded = session.loaded
    # A model in memory may differ from the files that it says it is from.
    origin = origin_of(loaded.name) if session.live is None else None
    with reporter.stage("save", 1, "models") as advance:
        # A model folder is written whole or not at all, so an existing one is complete.
        if ranks.writer() and not run.model_folder.exists():
            save_dense(loaded.model, loaded.tokenizer, run.model_folder, loaded.checkpoint_dtype, origin)
        ranks.written(run)
        advance(str(run.model_folder))
    dense: tuple[Metrics, ...] = ()
    compressed: tuple[Metrics, ...] = ()
    if session.text_options.evaluate:
        # Two models at once are enough.
        session.release()
        dense, compressed = evaluate_saved(session, reporter, run, session.dense)
    summary = Summary(
        command=command,
        model=session.name,
        allocator=file.allocator,
        solver=plan.solver.name,
        seed=plan.seed,
        accounting=file.accounting,
        asked=file.asked,
        limit=file.limit,
        used=sum(result.cost for result in results) + stored_bytes(file.matrices),
        total=file.total,
        predicted=file.predicted,
        bound=file.bound,
        error_unit=plan.unit,
        budget_unit=file.error_unit,
        covered=layers.coverage.covered,
        block_params=layers.coverage.block_params,
        skipped=dict(layers.coverage.skipped),
        layers=tuple(results),
        dense=dense,
        compressed=compressed,
        stages=reporter.costs,
        splits={split.name: split.record() for split in session.splits},
        versions=versions(),
        notes=(*reused, *left_dense(layers), *notes, *unreached),
        search=found and found.search,
        uniform=found and found.uniform,
        matching=run.matches(len(layers.blocks)),
        quantisation=session.quantisation,
        embeddings=file.matrices,
    )
    # Before the summary, so that a finished run has a card: its figures are known only now.
    named = session.model_options.model or loaded.name
    from_hub = origin is not None and not is_there(Path(named).expanduser())
    if ranks.writer():
        write_card(run.model_folder, run, summary, origin, "dense", named if from_hub else "")
        run.put(SUMMARY, None, summary)
    ranks.written(run)
    return ranks.told(summary)


def _refinement(session: Session, plan: RefinementPlan, file: BudgetFile, targets: dict[str, Target]) -> Refinement:
    """Define the refinement of the session's layers to their targets."""
    return Refinement(
        targets=targets,
        solver=plan.solver,
        budget=file.allocation.budget,
        dtype=session.loaded.checkpoint_dtype,
        predicted={entry.name: entry.predicted if file.error_unit == plan.unit else None for entry in file.layers},
        output_grams=plan.output_grams,
        metric_choices=plan.metric_choices,
        order=plan.order,
        matching=plan.matching,
        seed=plan.seed,
    )


def _refined(
    session: Session, reporter: Reporter, run: Run, refinement: Refinement, file: BudgetFile
) -> list[LayerResult]:
    """Refine and match the model block by block."""
    matching = refinement.matching
    with reporter.stage("refine", len(session.layers.specs), "layers") as advance:
        put = place_embeddings(session, run, file.matrices)
        runner = session.runner(run.folder, matching and matching.windows)
        return list(refine(runner, refinement, run, session.loaded.device, advance, put))


def _notes(allocation: Allocation, solver: Solver) -> Iterator[str]:
    """Say how targets are converted to parts that the solver has."""
    ranked = sum(1 for target in allocation.targets.values() if target.rank)
    if not solver.sparse and not solver.low_rank:
        yield f"Solver {solver.name} keeps every weight of a layer; it saves by their bits alone."
        return
    if ranked and not solver.low_rank:
        yield (
            f"Solver {solver.name} has no low-rank part: the rank of {ranked} layers is kept as nonzeros of the same "
            f"cost in {allocation.budget.accounting}."
        )
    if not solver.sparse:
        yield f"Solver {solver.name} has no sparse part: nonzeros are kept as rank of at most the same cost."
    if solver.signs:
        yield f"Solver {solver.name} keeps a sign plane of rank 1 in every layer, paid for with other parts of it."


def _errors_note(refinement: Refinement) -> Iterator[str]:
    """Say where the errors of layers are not those of their outputs."""
    if refinement.reads is Needs.NOTHING:
        yield (
            f"Solver {refinement.solver.name} reads no inputs of layers: their errors are of weights, not of outputs."
        )


def match_whole(
    session: Session, reporter: Reporter, run: Run, options: Distillation, targets: dict[str, Target], seed: int
) -> None:
    """Train the refined model to match the dense model's predictions, where that is missing, and put it in place.

    The kept entries, factors and norms are trained (`match_model`); every layer stays within its target.

    Args:
        run: with the refined layers.
        targets: by layer.
        seed: of the training.

    >>> from pathlib import Path
    >>> from globalopt.pipeline.example import example_budget, example_refinement, example_reporter, example_session
    >>> session, reporter = example_session(), example_reporter()
    >>> file = example_budget(session)
    >>> targets = dict(file.allocation.targets)
    >>> with Run.start(Path("matched"), {}, {}) as run:
    ...     _ = finish(example_session(), reporter, run, example_refinement(), file, "globalopt compress")
    ...     match_whole(session, reporter, run, Distillation(epochs=1), targets, seed=0)
    ...     run.get(MATCHED_MODEL, None).values[session.layers.specs[0].name].nnz
    128
    """
    layers = session.layers
    if not ranks.told(run.has(MATCHED_MODEL, None)):
        with reporter.stage("match", options.epochs, "epochs") as advance:
            portion, batches = session.portion(options.windows)
            dense = teacher_distributions(session.dense(), batches)
            values = {spec.name: run.layer(spec) for spec in layers.specs}
            started = time.perf_counter()
            trained, match = match_model(
                layers, batches, dense, values, options, seed, run.training_path, advance, portion
            )
            found = trained.values()
            for name, target in targets.items():
                checked(found[name], target)
            metadata = {**asdict(match), "loss": "kl", "seconds": time.perf_counter() - started}
            if ranks.writer():
                run.put(MATCHED_MODEL, None, Matched(found, trained.norm_values(), metadata))
            ranks.written(run)
    if ranks.writer():
        run.training_path.unlink(missing_ok=True)
    matched = run.get(MATCHED_MODEL, None)
    for name, value in matched.values.items():
        layers.set_weight(name, value.dense())
    for name, norm in matched.norms.items():
        layers.set_parameter(name, norm)
