"""The stages of an analysis: all that an allocation is made from, each skipped where its artefacts are there."""

from __future__ import annotations

from collections.abc import Callable

from globalopt.analysis.collect import output_grams, span_layers
from globalopt.analysis.fit_ratio import sampled
from globalopt.analysis.fits import compare_fits, fit_layers
from globalopt.analysis.one_layer_losses import MEASURED_WINDOWS, measure_layers, weigh_layers
from globalopt.analysis.prices import price_by_gradients, price_by_grams
from globalopt.models.walk import Batch, BlockRunner
from globalopt.pipeline.options import SearchOptions, fitted
from globalopt.pipeline.session import Bench
from globalopt.protocols import Outputs, Solver
from globalopt.runs.folder import Run
from globalopt.values.budget import FREE, Budget, Limits
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.metric import Gram
from solvers import get_solver

OTHER_LABELS = 2**31
"""Turns a seed of labels into that of others."""


def analyse(bench: Bench, options: SearchOptions, run: Run, pattern: NM | None) -> None:
    """All that an allocation is made from: Grams, the metric of every layer, spans, fits, measurements, prices.

    What is there already is not made again.
    """
    layers, device = bench.layers, bench.loaded.device
    unpriced = [spec for spec in layers.specs if not run.sensitivity_path(spec).exists()]
    if not unpriced:
        return
    solver = get_solver(options.solver, options.solver_options)
    limits = options.limits
    weighted = solver.outputs is not Outputs.NONE and options.sensitivity != "none"
    if weighted or options.scaling == "output":
        # Of other labels than the prices': what was fitted to gradients looks too good when they price it.
        collect_outputs(bench, run, options.seed ^ OTHER_LABELS)
    if weighted:
        weigh(bench, run, pattern, solver.outputs, limits)
    runner = bench.runner(run.folder)
    with bench.stage("span", len(layers.specs), "layers") as advance:
        inputs = span_layers(runner, run, options.scaling, options.sensitivity != "none", device, advance)
    if fitted(options, solver):
        _fit(bench, options, run, pattern, solver, run.chosen_outputs if weighted else lambda spec: None)
        # A pattern keeps more than what needs measuring.
        if options.sensitivity != "none" and pattern is None:
            _measure(bench, run)
    with bench.stage("price", len(unpriced), "layers") as advance:
        if options.sensitivity == "none":
            found = price_by_grams(layers, unpriced, run, pattern, limits)
        else:
            found = price_by_gradients(runner, inputs, unpriced, run, pattern, options.seed, device, limits)
        for one in found:
            run.write_sensitivity(one.surface, one.outputs, one.overlap)
            advance(one.surface.spec.name)


def weigh(bench: Bench, run: Run, pattern: NM | None, outputs: Outputs, limits: Limits = FREE) -> None:
    """Choose the metric of every layer that has none yet, between `tr(E G Eᵀ)` and as much of `A` as `outputs` says."""
    unweighed = [spec for spec in bench.layers.specs if not run.weighing_path(spec).exists()]
    if unweighed:
        with bench.stage("weigh", len(unweighed), "layers") as advance:
            weigh_layers(_look(bench), unweighed, run, pattern, quick(outputs), advance, limits)


def quick(outputs: Outputs) -> Solver:
    """What fits layers that are only looked at."""
    return get_solver("3basil", {"steps": "80", "outputs": str(outputs)})


def _look(bench: Bench) -> BlockRunner:
    """A runner on the few calibration windows on which layers are looked at one at a time."""
    return BlockRunner(bench.layers, [Batch(bench.splits.calibration.windows[:MEASURED_WINDOWS])])


def _fit(
    bench: Bench,
    options: SearchOptions,
    run: Run,
    pattern: NM | None,
    solver: Solver,
    chosen: Callable[[LayerSpec], Gram | None],
) -> None:
    """Fit the anchors of every layer that has no fits yet, in the output Gram that `chosen` gives it."""
    layers, limits, glance = bench.layers, options.limits, quick(solver.outputs)
    if all(run.fits_path(spec).exists() for spec in layers.specs):
        return
    budget = Budget.fraction(options.budget, layers.specs, options.accounting)
    with bench.stage("compare", len(sampled(layers.specs)), "layers") as advance:
        ratio = compare_fits(layers, run, pattern, glance, solver, budget, chosen, advance, limits)
    unfitted = [spec for spec in layers.specs if not run.fits_path(spec).exists()]
    with bench.stage("fit", len(unfitted), "layers") as advance:
        fit_layers(layers, unfitted, run, pattern, glance, chosen, advance, limits, ratio)


def _measure(bench: Bench, run: Run) -> None:
    """Measure the lowest fits of every layer where that was not done yet."""
    unmeasured = [spec for spec in bench.layers.specs if not run.measured_path(spec).exists()]
    if unmeasured:
        with bench.stage("measure", len(unmeasured), "layers") as advance:
            measure_layers(_look(bench), unmeasured, run, advance)


def collect_block_outputs(bench: Bench, run: Run, seed: int) -> None:
    """The output Grams of the blocks, by a backward sweep, where they are not there yet."""
    if not all(run.block_outputs_path(block).exists() for block in range(len(bench.layers.blocks))):
        with bench.stage("outputs", 1, "sweeps") as advance:
            output_grams(bench.runner(run.folder), run, [], seed, bench.loaded.device)
            advance("blocks")


def collect_outputs(bench: Bench, run: Run, seed: int) -> None:
    """The output Grams that are not there yet, by a backward sweep of their own."""
    unmeasured = [spec for spec in bench.layers.specs if not run.outputs_path(spec).exists()]
    if unmeasured:
        runner = bench.runner(run.folder)
        with bench.stage("outputs", len(unmeasured), "layers") as advance:
            output_grams(runner, run, unmeasured, seed, bench.loaded.device, advance)
