"""Run the analysis of a model: all stages up to the predicted loss of every option of every layer.

Only what the allocator and the solver read is computed. A stage whose artefacts exist already is skipped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from globalopt.analysis.anchors import compare_solvers, solve_anchors
from globalopt.analysis.collect import write_curves, write_grams, write_output_grams, write_profiles, write_spans
from globalopt.analysis.layer_analysis import PLAIN_ANCHORS, LayerAnalysis
from globalopt.analysis.metric_choices import WINDOWS, choose_metrics, probed_target
from globalopt.analysis.predictions import predict
from globalopt.analysis.rounding import rounding_losses
from globalopt.analysis.solver_gap import sampled
from globalopt.machine import ranks
from globalopt.models.block_runner import BlockRunner
from globalopt.objective.kl_to_dense import ModelObjective
from globalopt.pipeline.plan import AnalysisPlan
from globalopt.pipeline.reporter import Reporter
from globalopt.pipeline.session import Session
from globalopt.protocols import Reads, Solver
from globalopt.runs.artefacts import (
    ANCHORS,
    BLOCK_OUTPUT_GRAM,
    CURVES,
    DIRECTIONS,
    GRAM,
    METRIC_CHOICE,
    OUTPUT_GRAM,
    PREDICTION,
    PROBED,
    PROFILE,
    ROUNDING,
    SOLVER_GAP,
    SPAN,
)
from globalopt.runs.folder import Run
from globalopt.runs.records import AnchorSolutions
from globalopt.runs.workspace import Workspace
from globalopt.values.budget import Budget
from globalopt.values.layer import LayerSpec


def analyse(
    session: Session,
    reporter: Reporter,
    plan: AnalysisPlan,
    run: Run,
    reads: Reads = Reads.SURFACES,
    allocated: bool = False,
) -> LayerAnalysis:
    """Compute the artefacts that an allocation is chosen from, where they are missing.

    In order: input Grams, and with them output Grams where the solver or the predictions use these; profiles; spectra
    and spans, anchor solutions, the error metric of every layer (where the solver uses output Grams), solver gaps, and
    predicted losses.

    Args:
        reads: what the allocator reads; nothing else is computed, but for what the solver's error metric needs.
        allocated: whether the budget has been divided already, so that spans and anchor solutions are read no more.
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
    specs = session.layers.specs
    analysis = LayerAnalysis(session.layers, run, plan.pattern, plan.limits, plan.weighted, plan.solver.low_rank)
    predicts = Reads.SURFACES in reads
    anchors = predicts and plan.anchors
    if allocated and not ranks.told(_lacks_results(plan, run, specs, reads)):
        return analysis
    if ranks.told(_unfinished(plan, analysis, run, reads)):
        if plan.weighted or (predicts and (plan.fisher or plan.scaling == "output")):
            collect_output_grams(session, reporter, run, specs, plan.seed)
        collect_grams(session, reporter, run)
    if Reads.PROFILES in reads:
        _profile(session, reporter, run)
    if predicts:
        _span(session, reporter, plan, analysis, reads)
    if anchors:
        _solve_anchors(session, reporter, plan, analysis)
    if plan.weighted:
        choose_error_metrics(session, reporter, analysis, plan.probe, anchors)
    if anchors:
        # Again, for the layers that are to be solved in the other metric.
        _solve_anchors(session, reporter, plan, analysis)
    if predicts and plan.compared:
        _compare(session, reporter, plan, analysis)
    if predicts and plan.rounds_numbers and (unrounded := ranks.told(run.missing(ROUNDING, specs))):
        with _shared(reporter, run, "rounding", unrounded) as (mine, advance):
            for spec, losses in rounding_losses(analysis, mine):
                run.put(ROUNDING, spec, losses)
                advance(spec.name)
    if unpredicted := ranks.told(run.missing(PREDICTION, specs)) if predicts else []:
        with _shared(reporter, run, "predict", unpredicted) as (mine, advance):
            for spec, prediction in predict(analysis, mine):
                run.put(PREDICTION, spec, prediction)
                advance(spec.name)
    if ranks.writer():
        discard_inputs(run, specs)
    return analysis


def discard_inputs(run: Run, specs: Sequence[LayerSpec]) -> None:
    """Delete what metrics, profiles and predictions were made of, where no other run reads it.

    A refinement computes input Grams of its own.

    >>> from pathlib import Path
    >>> from globalopt.pipeline.example import example_session
    >>> with Run.start(Path("run"), {}, {}) as run:
    ...     discard_inputs(run, example_session().layers.specs)
    """
    run.discard(GRAM, [spec.site for spec in specs])
    run.discard(PROBED, specs)


def discard_solutions(run: Run, specs: Sequence[LayerSpec]) -> None:
    """Delete what candidates are made of, spans and anchor solutions, where no other run reads it.

    >>> from pathlib import Path
    >>> from globalopt.pipeline.example import example_session
    >>> with Run.start(Path("run"), {}, {}) as run:
    ...     discard_solutions(run, example_session().layers.specs)
    """
    for artefact in (SPAN, DIRECTIONS, ANCHORS, PLAIN_ANCHORS):
        run.discard(artefact, specs)


@contextlib.contextmanager
def _shared(
    reporter: Reporter, work: Workspace, stage: str, specs: Sequence[LayerSpec]
) -> Iterator[tuple[list[LayerSpec], Callable[[str], None]]]:
    """Open a stage and yield the layers that this process is to do; it ends when all processes have written theirs."""
    mine = ranks.share(specs, LayerSpec.solve_cost)
    with reporter.stage(stage, len(mine), "layers") as advance:
        yield mine, advance
        ranks.written(work)


def _unfinished(plan: AnalysisPlan, analysis: LayerAnalysis, run: Run, reads: Reads) -> bool:
    """Tell whether an artefact that is read later is missing; Grams alone may have been pruned from the cache."""
    specs = analysis.layers.specs
    predicts = Reads.SURFACES in reads
    return bool(
        _lacks_results(plan, run, specs, reads)
        or (predicts and not all(_spanned(plan, analysis, spec, reads) for spec in specs))
        or run.missing(SOLVER_GAP, sampled(specs) if predicts and plan.compared else ())
        or (predicts and plan.anchors and not all(map(analysis.solved_anchors, specs)))
    )


def _lacks_results(plan: AnalysisPlan, run: Run, specs: Sequence[LayerSpec], reads: Reads) -> bool:
    """Tell whether a small result is missing that is read after the allocation too, by refinement or reports."""
    predicts = Reads.SURFACES in reads
    return bool(
        run.missing(PREDICTION, specs if predicts else ())
        or run.missing(ROUNDING, specs if predicts and plan.rounds_numbers else ())
        or run.missing(CURVES, [spec.name for spec in specs] if predicts else ())
        or run.missing(METRIC_CHOICE, specs if plan.weighted else ())
        or run.missing(PROFILE, specs if Reads.PROFILES in reads else ())
    )


def collect_grams(session: Session, reporter: Reporter, run: Run) -> None:
    """Compute the input Grams of all sites by one forward pass, if some are missing.

    >>> from pathlib import Path
    >>> from globalopt.pipeline.example import example_reporter, example_session
    >>> session = example_session()
    >>> with Run.start(Path("grams"), {}, {}) as run:
    ...     collect_grams(session, example_reporter(), run)
    ...     run.get(GRAM, session.layers.specs[0].site).tokens
    64
    """
    if ranks.told(run.missing(GRAM, list(dict.fromkeys(spec.site for spec in session.layers.specs)))):
        with reporter.stage("grams", len(session.layers.blocks), "blocks") as advance:
            write_grams(session.runner(run.folder), run, session.loaded.device, advance)


def collect_output_grams(
    session: Session,
    reporter: Reporter,
    run: Run,
    specs: Sequence[LayerSpec],
    seed: int,
    blocks: Sequence[int] | None = None,
) -> None:
    """Compute the output Grams of the layers `specs` and of all blocks by one backward sweep, if some are missing.

    The forward pass before it computes the input Grams.

    Args:
        run: where they are written.
        seed: of the sampled labels.
        blocks: whose output Grams are read; None is all.

    >>> from pathlib import Path
    >>> from globalopt.pipeline.example import example_reporter, example_session
    >>> session = example_session()
    >>> spec = session.layers.specs[0]
    >>> with Run.start(Path("labels"), {}, {}) as run:
    ...     collect_output_grams(session, example_reporter(), run, [spec], seed=0)
    ...     run.get(OUTPUT_GRAM, spec).matrix.shape
    torch.Size([16, 16])
    """
    missing = ranks.told(run.missing(OUTPUT_GRAM, specs))
    wanted = range(len(session.layers.blocks)) if blocks is None else blocks
    if ranks.told(bool(missing or run.missing(BLOCK_OUTPUT_GRAM, wanted))):
        with reporter.stage("labels", len(missing), "layers") as advance:
            write_output_grams(session.runner(run.folder), run, missing, seed, session.loaded.device, advance)


def _profile(session: Session, reporter: Reporter, run: Run) -> None:
    """Compute the profiles of the blocks in which one is missing."""
    layers = session.layers
    missing = ranks.told([i for i in range(len(layers.blocks)) if run.missing(PROFILE, layers.of_block(i))])
    if missing:
        mine = ranks.share(missing)
        with reporter.stage("profile", len(mine), "blocks") as advance:
            write_profiles(layers, run, mine, advance)
            ranks.written(run)


def _span(session: Session, reporter: Reporter, plan: AnalysisPlan, analysis: LayerAnalysis, reads: Reads) -> None:
    """Compute spans and spectra of the layers in which one is missing."""
    layers, work = session.layers, analysis.work
    unspanned = ranks.told([spec for spec in layers.specs if not _spanned(plan, analysis, spec, reads)])
    uncurved = ranks.told([spec for spec in layers.specs if not work.has(CURVES, spec.name)])
    if unspanned or uncurved:

        def directions(spec: LayerSpec, rank: int) -> int | None:
            read = _reads_directions(plan, analysis, spec, reads)
            return analysis.offered_rank(spec, rank) if read else None

        missing = [spec for spec in layers.specs if spec in unspanned or spec in uncurved]
        with _shared(reporter, work, "span", missing) as (mine, advance):
            for spec in mine:
                if spec in unspanned:
                    write_spans(layers, work, [spec], plan.scaling, directions)
                if spec in uncurved:
                    write_curves(layers, work, [spec])
                advance(spec.name)


def _spanned(plan: AnalysisPlan, analysis: LayerAnalysis, spec: LayerSpec, reads: Reads) -> bool:
    """Tell whether a layer's span is there, with its directions where these are read."""
    work = analysis.work
    return work.has(SPAN, spec) and (work.has(DIRECTIONS, spec) or not _reads_directions(plan, analysis, spec, reads))


def _reads_directions(plan: AnalysisPlan, analysis: LayerAnalysis, spec: LayerSpec, reads: Reads) -> bool:
    """Tell whether an allocator, candidates or predictions read the directions of a layer's span."""
    return Reads.SPANS in reads or analysis.reads_directions(spec, plan.anchors)


def choose_error_metrics(
    session: Session, reporter: Reporter, analysis: LayerAnalysis, probe: Solver, anchors: bool = False
) -> None:
    """Choose the error metric of every layer that has none yet: `tr(A E G Eᵀ)` or `tr(E G Eᵀ)`.

    `G` is the input Gram and `A` the output Gram, both of which must have been computed. See `choose_metrics`.

    Args:
        probe: the probe solver.
        anchors: whether the anchor solutions are checked, which must have been computed; otherwise every layer is
            solved at its probed target first.

    >>> from pathlib import Path
    >>> from globalopt.pipeline.example import example_reporter, example_session
    >>> from solvers import get_solver
    >>> session, reporter = example_session(), example_reporter()
    >>> specs = session.layers.specs
    >>> with Run.start(Path("metrics"), {}, {}) as run:
    ...     collect_output_grams(session, reporter, run, specs, seed=0)
    ...     analysis = LayerAnalysis(session.layers, run, weighted=True)
    ...     choose_error_metrics(session, reporter, analysis, get_solver("3basil", {"steps": "2", "outputs": "rows"}))
    ...     len(run.missing(METRIC_CHOICE, specs))
    0
    """
    work, specs = analysis.work, session.layers.specs
    if not ranks.told(work.missing(METRIC_CHOICE, specs)):
        return

    def solutions(spec: LayerSpec) -> AnchorSolutions:
        return work.get(ANCHORS if anchors else PROBED, spec)

    if unsolved := [] if anchors else ranks.told(work.missing(PROBED, specs)):
        with _shared(reporter, work, "probe", unsolved) as (mine, advance):
            for spec in mine:
                target = probed_target(spec, analysis.pattern, analysis.limits)
                state = probe.prepare(session.layers.weight(spec.name), analysis.loss_metric(spec))
                work.put(PROBED, spec, AnchorSolutions(((target,),), (probe.solve(state, target).value,)))
                advance(spec.name)
    with reporter.stage("metric", len(specs), "layers") as advance:
        model = ModelObjective(_few(session), rough=True)
        chosen = choose_metrics(analysis, model, specs, solutions, probe, session.loaded.device)
        for number, (spec, choice) in enumerate(chosen):
            if ranks.owns(number):
                work.put(METRIC_CHOICE, spec, choice)
            advance(spec.name)
        ranks.written(work)


def _few(session: Session) -> BlockRunner:
    """Make a runner on a few calibration windows."""
    return BlockRunner(session.layers, session.batches(session.splits.calibration, windows=WINDOWS))


def _solve_anchors(session: Session, reporter: Reporter, plan: AnalysisPlan, analysis: LayerAnalysis) -> None:
    """Solve every layer at its anchors, in its error metric, where that is missing."""
    missing = ranks.told([spec for spec in session.layers.specs if not analysis.solved_anchors(spec)])
    if missing:
        with _shared(reporter, analysis.work, "anchors", missing) as (mine, advance):
            solve_anchors(analysis, mine, plan.probe, advance)


def _compare(session: Session, reporter: Reporter, plan: AnalysisPlan, analysis: LayerAnalysis) -> None:
    """Measure the solver gap on a few layers, where that is missing."""
    specs = session.layers.specs
    if missing := ranks.told(analysis.work.missing(SOLVER_GAP, sampled(specs))):
        with _shared(reporter, analysis.work, "gap", missing) as (mine, advance):
            # Only the accounting of this budget is used.
            compare_solvers(analysis, mine, plan.solver, Budget.fraction(1.0, specs, plan.accounting), advance)
