"""Run the analysis of a model: all stages up to the predicted loss of every option of every layer.

A stage whose artefacts exist already is skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from globalopt.analysis.anchors import compare_solvers, solve_anchors
from globalopt.analysis.collect import span_layers, write_output_grams
from globalopt.analysis.layer_analysis import LayerAnalysis
from globalopt.analysis.one_layer_losses import MEASURED_WINDOWS, write_metric_choices, write_single_layer_losses
from globalopt.analysis.predictions import predict_by_fisher, predict_by_grams
from globalopt.analysis.solver_gap import sampled
from globalopt.models.layers import ModelLayers
from globalopt.models.walk import Batch, BlockRunner
from globalopt.pipeline.plan import OTHER_LABELS, AnalysisPlan
from globalopt.pipeline.reporter import Reporter
from globalopt.pipeline.session import Session
from globalopt.protocols import Solver
from globalopt.runs.artefacts import (
    ANCHORS,
    BLOCK_OUTPUT_GRAM,
    CURVES,
    METRIC_CHOICE,
    OUTPUT_GRAM,
    PREDICTION,
    PROFILE,
    SINGLE_LAYER_LOSSES,
    SOLVER_GAP,
    SPAN,
    Artefact,
    Stage,
)
from globalopt.runs.folder import Run
from globalopt.values.budget import Budget
from globalopt.values.layer import LayerSpec


def analyse(session: Session, reporter: Reporter, plan: AnalysisPlan, run: Run) -> LayerAnalysis:
    """Compute the artefacts that an allocation is chosen from, where they are missing.

    In order: output Grams of the probe's labels and the error metric of every layer (where the solver uses output
    Grams), input Grams and spans, anchor solutions and solver gaps, single-layer losses, and predicted losses.

    Returns:
        access to the artefacts of the run.

    >>> from pathlib import Path
    >>> from globalopt.pipeline.example import example_plan, example_reporter, example_session
    >>> session = example_session()
    >>> with Run.start(Path("analysed"), {}, {}) as run:
    ...     _ = analyse(session, example_reporter(), example_plan().analysis, run)
    ...     surface = run.get(PREDICTION, session.layers.specs[0]).surface
    >>> [(target.nnz, error > 0) for target, error in zip(surface.targets, surface.error)][:2]
    [(0, True), (16, True)]
    """
    layers, device = session.layers, session.loaded.device
    analysis = LayerAnalysis(layers, run, plan.pattern, plan.limits, plan.weighted)
    probed = plan.weighted or plan.scaling == "output"
    if _complete(plan, run, layers, probed):
        return analysis
    unpredicted = run.missing(PREDICTION, layers.specs)
    if plan.fisher:
        # The same sweep computes the output Grams, which the refinement reads.
        lacking = {*unpredicted, *run.missing(OUTPUT_GRAM, layers.specs)}
        unpredicted = [spec for spec in layers.specs if spec in lacking]
    if probed:
        seed = plan.seed ^ OTHER_LABELS
        collect_output_grams(session, reporter, run, Stage.PROBE_LABELS, layers.specs, seed)
    if plan.weighted:
        choose_metrics(session, reporter, analysis, plan.probe)
    runner = session.runner(run.folder)
    with reporter.stage("span", len(layers.specs), "layers") as advance:
        inputs = span_layers(runner, run, plan.scaling, plan.fisher and bool(unpredicted), device, advance)
    if plan.anchors:
        _solve_anchors(session, reporter, plan, analysis)
    if plan.single_layer_losses:
        _measure(session, reporter, analysis)
    if not unpredicted:
        return analysis
    with reporter.stage("predict", len(unpredicted), "layers") as advance:
        if plan.fisher:
            behind = partial(run.put, BLOCK_OUTPUT_GRAM.during(Stage.LABELS))
            found = predict_by_fisher(analysis, runner, inputs, unpredicted, plan.seed, device, behind)
        else:
            found = predict_by_grams(analysis, unpredicted)
        for spec, prediction, output_gram in found:
            if output_gram is not None:
                run.put(OUTPUT_GRAM, spec, output_gram)
            run.put(PREDICTION, spec, prediction)
            advance(spec.name)
    return analysis


def _complete(plan: AnalysisPlan, run: Run, layers: ModelLayers, probed: bool) -> bool:
    """Tell whether all artefacts exist that later stages read; others may have been pruned from the cache."""
    specs = layers.specs
    read: list[tuple[Artefact[Any, Any], Sequence[Any]]] = [
        (PREDICTION, specs),
        (PROFILE, specs),
        (SPAN, specs),
        (CURVES, [spec.name for spec in specs]),
        (METRIC_CHOICE, specs if plan.weighted else ()),
        (ANCHORS, specs if plan.anchors else ()),
        (SOLVER_GAP, sampled(specs) if plan.anchors else ()),
        (OUTPUT_GRAM, specs if plan.fisher else ()),
        (BLOCK_OUTPUT_GRAM.during(Stage.PROBE_LABELS), range(len(layers.blocks)) if probed else ()),
    ]
    return not any(run.missing(artefact, keys) for artefact, keys in read)


def collect_output_grams(
    session: Session, reporter: Reporter, run: Run, stage: Stage, specs: Sequence[LayerSpec], seed: int
) -> None:
    """Compute the output Grams of the layers `specs` and of all blocks by one backward sweep, if some are missing.

    Args:
        run: where they are written.
        stage: the stage that they belong to.
        seed: of the sampled labels.

    >>> from pathlib import Path
    >>> from globalopt.pipeline.example import example_reporter, example_session
    >>> session = example_session()
    >>> spec = session.layers.specs[0]
    >>> with Run.start(Path("labels"), {}, {}) as run:
    ...     collect_output_grams(session, example_reporter(), run, Stage.LABELS, [spec], seed=0)
    ...     run.get(OUTPUT_GRAM, spec).matrix.shape
    torch.Size([16, 16])
    """
    missing = run.missing(OUTPUT_GRAM.during(stage), specs)
    blocks = run.missing(BLOCK_OUTPUT_GRAM.during(stage), range(len(session.layers.blocks)))
    if missing or blocks:
        with reporter.stage("labels", len(missing), "layers") as advance:
            runner = session.runner(run.folder)
            write_output_grams(runner, run, stage, missing, seed, session.loaded.device, advance)


def choose_metrics(session: Session, reporter: Reporter, analysis: LayerAnalysis, probe: Solver) -> None:
    """Choose the error metric of every layer that has none yet: `tr(E G Eᵀ)` or `tr(A E G Eᵀ)`.

    `G` is the input Gram and `A` the output Gram, both of which must have been computed. The metric whose solution has
    the lower single-layer loss is chosen (`write_metric_choices`).

    >>> from pathlib import Path
    >>> from globalopt.pipeline.example import example_reporter, example_session
    >>> from solvers import get_solver
    >>> session, reporter = example_session(), example_reporter()
    >>> specs = session.layers.specs
    >>> with Run.start(Path("metrics"), {}, {}) as run:
    ...     collect_output_grams(session, reporter, run, Stage.PROBE_LABELS, specs, seed=0)
    ...     analysis = LayerAnalysis(session.layers, run, weighted=True)
    ...     choose_metrics(session, reporter, analysis, get_solver("3basil", {"steps": "2", "outputs": "rows"}))
    ...     len(run.missing(METRIC_CHOICE, specs))
    0
    """
    work = analysis.work
    missing = work.missing(METRIC_CHOICE, session.layers.specs)
    if missing:
        with reporter.stage("metric", len(missing), "layers") as advance:
            write_metric_choices(analysis, _few(session), missing, probe, advance)


def _few(session: Session) -> BlockRunner:
    """Make a runner on the few calibration windows on which single-layer losses are computed."""
    return BlockRunner(session.layers, [Batch(session.splits.calibration.windows[:MEASURED_WINDOWS])])


def _solve_anchors(session: Session, reporter: Reporter, plan: AnalysisPlan, analysis: LayerAnalysis) -> None:
    """Solve every layer at its anchors, and measure the solver gap on a few layers, where that is missing."""
    specs, work = session.layers.specs, analysis.work
    if missing := work.missing(ANCHORS, specs):
        with reporter.stage("anchors", len(missing), "layers") as advance:
            solve_anchors(analysis, missing, plan.probe, advance)
    if missing := work.missing(SOLVER_GAP, sampled(specs)):
        with reporter.stage("gap", len(missing), "layers") as advance:
            # Only the accounting of this budget is used.
            compare_solvers(analysis, missing, plan.solver, Budget.fraction(1.0, specs, plan.accounting), advance)


def _measure(session: Session, reporter: Reporter, analysis: LayerAnalysis) -> None:
    """Compute the single-layer losses of every layer at its smallest anchors, where they are missing."""
    missing = analysis.work.missing(SINGLE_LAYER_LOSSES, session.layers.specs)
    if missing:
        with reporter.stage("measure", len(missing), "layers") as advance:
            write_single_layer_losses(analysis, _few(session), missing, advance)
