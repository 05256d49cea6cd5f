"""The analysis: every stage up to the predicted loss of every option, each skipped where its artefacts are there."""

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
    """Make what an allocation is chosen from: Grams, metrics, spans, anchor solutions, losses, predictions.

    Artefacts that are there are not made again.

    Returns:
        the analysis, for those who read its artefacts.
    """
    layers, device = session.layers, session.loaded.device
    analysis = LayerAnalysis(layers, run, plan.pattern, plan.limits, plan.weighted)
    probed = plan.weighted or plan.scaling == "output"
    if _complete(plan, run, layers, probed):
        return analysis
    unpredicted = run.missing(PREDICTION, layers.specs)
    if plan.fisher:
        # Output Grams come from the same sweep, and refinement reads them.
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
    """Whether all is there that is read after the analysis. Of earlier stages alone some may have been pruned."""
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
    """Write the output Grams of the layers `specs` and of all blocks, by a backward sweep, if some are not there."""
    missing = run.missing(OUTPUT_GRAM.during(stage), specs)
    blocks = run.missing(BLOCK_OUTPUT_GRAM.during(stage), range(len(session.layers.blocks)))
    if missing or blocks:
        with reporter.stage("labels", len(missing), "layers") as advance:
            runner = session.runner(run.folder)
            write_output_grams(runner, run, stage, missing, seed, session.loaded.device, advance)


def choose_metrics(session: Session, reporter: Reporter, analysis: LayerAnalysis, probe: Solver) -> None:
    """Choose the metric of every layer that has none yet, between `tr(E G Eᵀ)` and `tr(A E G Eᵀ)`."""
    work = analysis.work
    missing = work.missing(METRIC_CHOICE, session.layers.specs)
    if missing:
        with reporter.stage("metric", len(missing), "layers") as advance:
            write_metric_choices(analysis, _few(session), missing, probe, advance)


def _few(session: Session) -> BlockRunner:
    """A runner on the few calibration windows on which single layers are measured."""
    return BlockRunner(session.layers, [Batch(session.splits.calibration.windows[:MEASURED_WINDOWS])])


def _solve_anchors(session: Session, reporter: Reporter, plan: AnalysisPlan, analysis: LayerAnalysis) -> None:
    """Solve every layer at its anchors, and measure the gap of the real solver on a few."""
    specs, work = session.layers.specs, analysis.work
    if missing := work.missing(ANCHORS, specs):
        with reporter.stage("anchors", len(missing), "layers") as advance:
            solve_anchors(analysis, missing, plan.probe, advance)
    if missing := work.missing(SOLVER_GAP, sampled(specs)):
        with reporter.stage("gap", len(missing), "layers") as advance:
            # Of the budget only the accounting is read.
            compare_solvers(analysis, missing, plan.solver, Budget.fraction(1.0, specs, plan.accounting), advance)


def _measure(session: Session, reporter: Reporter, analysis: LayerAnalysis) -> None:
    """Measure the loss of every layer at its lowest anchors, where that was not done yet."""
    missing = analysis.work.missing(SINGLE_LAYER_LOSSES, session.layers.specs)
    if missing:
        with reporter.stage("measure", len(missing), "layers") as advance:
            write_single_layer_losses(analysis, _few(session), missing, advance)
