"""How a refinement goes: what a user chooses, and the matching of the whole model that may end it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict

from globalopt.budgets.budget_file import BudgetFile
from globalopt.budgets.conversion import for_solver
from globalopt.evaluation.perplexity import evaluate_both
from globalopt.evaluation.samples import write_samples
from globalopt.matching.block import Matching
from globalopt.matching.model import Distillation, match_model, teachers
from globalopt.models.saving import save_dense
from globalopt.pipeline.analyse import collect_block_outputs
from globalopt.pipeline.options import (
    RefineOptions,
)
from globalopt.pipeline.session import Bench, load_from, versions
from globalopt.protocols import Solver
from globalopt.refine.blocks import Order, Refinement, checked, refine
from globalopt.runs.folder import Run
from globalopt.values.layer import LayerSpec
from globalopt.values.metric import Gram
from globalopt.values.problem import Allocation
from globalopt.values.results import ErrorUnit, Metrics, Outcome, Search, Summary, WindowLosses


def finish(
    bench: Bench,
    run: Run,
    file: BudgetFile,
    allocation: Allocation,
    solver: Solver,
    command: str,
    seed: int,
    unit: ErrorUnit,
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


def match_whole(bench: Bench, run: Run, plan: Refinement, options: Distillation) -> None:
    """Match the refined model to the dense one if that is not done yet, and put what came of it in place."""
    layers, path = bench.layers, run.matched_path(None)
    if not path.exists():
        with bench.stage("match", options.epochs, "epochs") as advance:
            batches = bench.batches(bench.splits.calibration, options.windows)
            dense = teachers(bench.dense(), batches)
            values = {spec.name: run.read_layer(spec)[0] for spec in layers.specs}
            started = time.perf_counter()
            trained, match = match_model(layers, batches, dense, values, options, plan.seed, run.training_path, advance)
            found = trained.values()
            for spec in layers.specs:
                checked(found[spec.name], for_solver(plan.targets[spec.name], spec, plan.solver, plan.budget))
            facts = {**asdict(match), "loss": "kl", "seconds": time.perf_counter() - started}
            run.write_matched(path, found, trained.norm_values(), facts)
    run.training_path.unlink(missing_ok=True)
    values, norms, _ = run.read_matched(path, layers.specs)
    for name, value in values.items():
        layers.set_weight(name, value.dense())
    for name, norm in norms.items():
        layers.set_parameter(name, norm)
