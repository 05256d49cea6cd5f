"""The analysis of a model: second moments, anchor solutions, and predicted losses whose level these set."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from globalopt.analysis.anchors import solve_anchors
from globalopt.analysis.collect import ANALYSED, write_grams, write_output_grams, write_spans
from globalopt.analysis.layer_analysis import PLAIN_ANCHORS, LayerAnalysis
from globalopt.analysis.predictions import predict
from globalopt.analysis.solver_gap import sampled
from globalopt.analysis.surfaces import span_errors
from globalopt.models.batch import Batch
from globalopt.models.block_runner import BlockRunner
from globalopt.models.finding import find_layers
from globalopt.models.layers import ModelLayers
from globalopt.runs.artefacts import (
    ANCHORS,
    BLOCK_OUTPUT_GRAM,
    GRAM,
    METRIC_CHOICE,
    OUTPUT_GRAM,
    PREDICTION,
    SOLVER_GAP,
    SPAN,
)
from globalopt.runs.records import CheckedLoss, MetricChoice
from globalopt.runs.workspace import Workspace
from globalopt.values.budget import Limits, Target
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.metric import Metric
from globalopt.values.surface import ErrorSurface
from solvers import get_solver
from tests.command import assert_alike
from tests.tiny_models import tiny_ids, tiny_model

SOLVER = get_solver("3basil", {"steps": "10"})
PLAIN = MetricChoice((CheckedLoss(Target(0, 1), predicted=0.0, weighted=2.0, plain=1.0),))


def collected(kind: str, folder: Path, labels: bool = True) -> tuple[ModelLayers, Workspace]:
    """A model with Grams and spans, and output Grams if there are to be some."""
    layers = find_layers(tiny_model(kind), allow_low_coverage=True)
    runner = BlockRunner(layers, [Batch(ids) for ids in tiny_ids(8, 12).split(4)])
    work = Workspace(folder)
    if labels:
        write_output_grams(runner, work, layers.specs, seed=0)
    else:
        write_grams(runner, work)
    write_spans(layers, work, layers.specs, "activation")
    return layers, work


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def analysed(request, tmp_path_factory) -> LayerAnalysis:
    """An analysis up to anchor solutions; not to be changed."""
    layers, work = collected(request.param, tmp_path_factory.mktemp("run"))
    analysis = LayerAnalysis(layers, work)
    solve_anchors(analysis, layers.specs, SOLVER)
    return analysis


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> LayerAnalysis:
    """The same without output Grams."""
    layers, work = collected("llama", tmp_path_factory.mktemp("run"), labels=False)
    analysis = LayerAnalysis(layers, work)
    solve_anchors(analysis, layers.specs, SOLVER)
    return analysis


def surface_of(analysis: LayerAnalysis, spec: LayerSpec) -> ErrorSurface:
    ((found, prediction),) = predict(analysis, [spec])
    assert found is spec
    return prediction.surface


def error_of(analysis: LayerAnalysis, spec: LayerSpec, anchor: Target) -> float:
    """Error of an anchor solution in the metric of predictions, of the weight as the solver left it."""
    solutions = analysis.work.get(analysis.anchors(spec), spec)
    value = solutions.values[solutions.anchors.index(anchor)]
    return analysis.loss_metric(spec).error(analysis.layers.weight(spec.name) - value.dense())


# ------------------------------------------------------------------------------------------------- second moments


def test_one_sweep_leaves_grams_output_grams_and_those_of_blocks(tmp_path):
    layers, work = collected("llama", tmp_path / "swept")
    assert not work.missing(OUTPUT_GRAM, layers.specs)
    assert not work.missing(BLOCK_OUTPUT_GRAM, range(len(layers.blocks)))
    sites = list(dict.fromkeys(spec.site for spec in layers.specs))
    _, forward = collected("llama", tmp_path / "forward", labels=False)
    assert forward.missing(OUTPUT_GRAM, layers.specs) == list(layers.specs)
    for site in sites:
        assert_alike(work.get(GRAM, site).matrix, forward.get(GRAM, site).matrix, site)
    # Of the eight windows in two batches one batch is swept.
    assert {work.get(OUTPUT_GRAM, spec).tokens for spec in layers.specs} == {96 // ANALYSED}


def test_a_sweep_for_a_few_layers_finds_the_same_and_leaves_those_that_are_there(tmp_path):
    layers, whole = collected("llama", tmp_path / "whole")
    runner, some = BlockRunner(layers, [Batch(ids) for ids in tiny_ids(8, 12).split(4)]), Workspace(tmp_path / "some")
    write_grams(runner, some)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "some").rglob("*.safetensors")}
    write_output_grams(runner, some, layers.specs[3:5], seed=0)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [spec for spec in layers.specs if some.has(OUTPUT_GRAM, spec)] == list(layers.specs[3:5])
    for spec in layers.specs[3:5]:
        assert_alike(some.get(OUTPUT_GRAM, spec).matrix, whole.get(OUTPUT_GRAM, spec).matrix)
    for block in range(len(layers.blocks)):
        assert_alike(some.get(BLOCK_OUTPUT_GRAM, block).matrix, whole.get(BLOCK_OUTPUT_GRAM, block).matrix)


# ------------------------------------------------------------------------------------------------- anchor solutions


def test_anchor_solutions_are_the_solvers_and_residuals_what_they_leave(analysed):
    spec = analysed.layers.specs[3]
    weight = analysed.layers.weight(spec.name)
    solutions = analysed.work.get(ANCHORS, spec)
    assert solutions.rows == analysed.options(spec).anchors
    metric = Metric(analysed.work.get(GRAM, spec.site))
    found = SOLVER.solve_path(SOLVER.prepare(weight, metric), solutions.anchors)
    residuals = analysed.residuals(spec, weight)
    assert residuals.anchors == solutions.anchors
    for anchor, solution, value in zip(solutions.anchors, found, solutions.values, strict=True):
        assert_alike(value.dense(), solution.value.cast(torch.bfloat16).dense())
        assert (value.rank, value.nnz) == (anchor.rank, anchor.nnz)
        torch.testing.assert_close(residuals.at(anchor), weight - value.dense(), rtol=2e-2, atol=1e-5)


def test_anchor_solutions_may_minimise_in_the_output_gram(tmp_path):
    layers, work = collected("llama", tmp_path)
    losses = {}
    for weighted in (False, True):
        analysis = LayerAnalysis(layers, work, weighted=weighted)
        solve_anchors(analysis, layers.specs, SOLVER)
        losses[weighted] = sum(
            error_of(analysis, spec, anchor) for spec in layers.specs for anchor in work.get(ANCHORS, spec).anchors
        )
    assert losses[True] < 0.95 * losses[False]


def test_a_layer_that_is_better_off_without_its_output_gram_has_solutions_of_its_own(tmp_path):
    layers, work = collected("llama", tmp_path)
    analysis = LayerAnalysis(layers, work, weighted=True)
    spec, other = layers.specs[:2]
    solve_anchors(analysis, [spec, other], SOLVER)
    assert analysis.solved_anchors(spec)
    work.put(METRIC_CHOICE, spec, PLAIN)
    work.put(METRIC_CHOICE, other, MetricChoice())
    assert analysis.plain(spec)
    assert analysis.metric(spec).outputs is None
    assert analysis.loss_metric(spec).outputs is not None, "losses are predicted in nats all the same"
    assert not analysis.plain(other)
    assert analysis.metric(other).outputs is not None
    # Those in the output Gram are still there, and are not taken for these.
    assert (analysis.solved_anchors(spec), analysis.solved_anchors(other)) == (False, True)
    solve_anchors(analysis, [spec], SOLVER)
    without, within = work.get(PLAIN_ANCHORS, spec), work.get(ANCHORS, spec)
    metric = analysis.plain_metric(spec)
    weight = layers.weight(spec.name)
    for one, two in zip(without.values, within.values, strict=True):
        assert metric.error(weight - one.dense()) < metric.error(weight - two.dense())
    # To a solver that reads no output Gram a choice says nothing.
    unweighted = LayerAnalysis(layers, work)
    assert not unweighted.plain(spec)
    assert unweighted.checked_losses(spec) == {}


# ------------------------------------------------------------------------------------------------- predictions


def test_predictions_are_half_the_error_of_anchor_solutions_at_the_anchors(analysed):
    for spec in analysed.layers.specs:
        surface = surface_of(analysed, spec)
        for anchor in analysed.work.get(ANCHORS, spec).anchors:
            assert surface.predict(anchor) == pytest.approx(error_of(analysed, spec, anchor) / 2, rel=0.1), anchor
        whole = analysed.loss_metric(spec).error(analysed.layers.weight(spec.name)) / 2
        assert surface.predict(Target.zero()) >= 0.999 * whole
        assert surface.predict(Target.dense(spec)) == 0


def test_without_output_grams_predictions_are_output_errors(plain):
    for spec in plain.layers.specs[:3]:
        surface = surface_of(plain, spec)
        assert plain.loss_metric(spec).outputs is None
        for anchor in plain.work.get(ANCHORS, spec).anchors:
            assert surface.predict(anchor) == pytest.approx(error_of(plain, spec, anchor), rel=0.1), anchor


def test_without_anchor_solutions_the_span_alone_is_the_level_and_nothing_overlaps(tmp_path):
    layers, work = collected("llama", tmp_path)
    analysis = LayerAnalysis(layers, work)
    for spec, prediction in predict(analysis, layers.specs[:2]):
        assert prediction.overlap is None
        errors = span_errors(analysis.span(spec), analysis.options(spec), analysis.loss_metric(spec))
        for target, error in zip(prediction.surface.targets, errors, strict=True):
            # Along a row they are made monotone, and dropping the layer costs what its metric says.
            assert prediction.surface.predict(target) >= 0.499 * error
        nonzero = [(t, e) for t, e in zip(prediction.surface.targets, errors, strict=True) if t != Target.zero()]
        assert sum(prediction.surface.predict(t) for t, _ in nonzero) == pytest.approx(
            sum(e for _, e in nonzero) / 2, rel=0.05
        )
        work.put(PREDICTION, spec, prediction)
        assert work.get(PREDICTION, spec).overlap is None


def test_a_solver_gap_scales_the_level_of_predictions_but_not_of_the_layer_dropped(analysed, tmp_path):
    layers = analysed.layers
    work = Workspace(tmp_path, {artefact.stage: analysed.work.path(artefact, layers.specs[0]).parent
                                for artefact in (SPAN, ANCHORS, OUTPUT_GRAM)}
                     | {GRAM.stage: analysed.work.path(GRAM, layers.specs[0].site).parent})  # fmt: skip
    gapped = LayerAnalysis(layers, work)
    for spec in sampled(layers.specs):
        work.put(SOLVER_GAP, spec, dict.fromkeys(gapped.options(spec).anchors[0], 0.25))
    for spec in (layers.specs[0], layers.specs[-1]):
        before, after = surface_of(analysed, spec), surface_of(gapped, spec)
        for anchor in work.get(ANCHORS, spec).anchors:
            assert after.predict(anchor) == pytest.approx(0.25 * before.predict(anchor), rel=0.02)
        assert after.predict(Target.zero()) == pytest.approx(before.predict(Target.zero()), rel=1e-3)


def test_measured_losses_raise_predictions_and_never_lower_them(tmp_path):
    layers, work = collected("llama", tmp_path)
    analysis = LayerAnalysis(layers, work, weighted=True)
    spec = layers.specs[4]
    solve_anchors(analysis, [spec], SOLVER)
    before = surface_of(analysis, spec)
    low, middle, high = analysis.options(spec).anchors[0]
    at = {anchor: error_of(analysis, spec, anchor) / 2 for anchor in (low, middle, high)}
    checked = (
        CheckedLoss(low, predicted=at[low], weighted=10 * at[low], plain=1.0),
        CheckedLoss(middle, predicted=at[middle], weighted=0.1 * at[middle], plain=1.0),
    )
    work.put(METRIC_CHOICE, spec, MetricChoice(checked))
    after = surface_of(analysis, spec)
    assert after.predict(low) == pytest.approx(10 * before.predict(low), rel=0.1)
    for anchor in (middle, high):
        assert after.predict(anchor) == pytest.approx(before.predict(anchor), rel=0.1)
    # Dropping the layer cannot cost less than keeping a tenth of it.
    assert after.predict(Target.zero()) >= 10 * at[low]


def test_overlaps_are_the_cosines_of_anchor_residuals_in_the_norm_of_the_predictions(analysed, plain):
    for analysis in (analysed, plain):
        for spec in analysis.layers.specs[::3]:
            ((_, prediction),) = predict(analysis, [spec])
            metric, R = analysis.loss_metric(spec), residuals_of(analysis, spec)
            assert prediction.overlap is not None
            assert prediction.overlap.shape == (len(R), len(R))
            torch.testing.assert_close(prediction.overlap.diagonal(), torch.ones(len(R), dtype=torch.float64))
            torch.testing.assert_close(prediction.overlap, prediction.overlap.mT, rtol=1e-3, atol=1e-4)
            for i, j in ((0, 1), (2, 1), (0, len(R) - 1)):
                one, other, both = (metric.error(E) for E in (R[i], R[j], R[i] + R[j]))
                expected = (both - one - other) / 2 / (one * other) ** 0.5
                assert float(prediction.overlap[i, j]) == pytest.approx(expected, rel=1e-3, abs=1e-3)


def residuals_of(analysis: LayerAnalysis, spec: LayerSpec) -> Tensor:
    return analysis.residuals(spec, analysis.layers.weight(spec.name)).tensor.float()


def test_under_a_pattern_only_the_rank_is_predicted(tmp_path):
    layers, work = collected("llama", tmp_path)
    analysis = LayerAnalysis(layers, work, NM(2, 4))
    solve_anchors(analysis, layers.specs, SOLVER)
    for spec, prediction in predict(analysis, layers.specs):
        surface = prediction.surface
        assert {(target.pattern, target.nnz) for target in surface.targets} == {(NM(2, 4), spec.numel // 2)}
        for anchor in work.get(ANCHORS, spec).anchors:
            assert anchor in surface.targets
            assert surface.predict(anchor) == pytest.approx(error_of(analysis, spec, anchor) / 2, rel=0.02)


def test_options_follow_what_the_solver_and_the_place_of_serving_can_have(analysed):
    layers, work = analysed.layers, analysed.work
    spec = layers.specs[0]
    assert {t.rank for t in LayerAnalysis(layers, work, low_rank=False).options(spec).targets} == {0}
    # Nor is a span needed to know it.
    assert LayerAnalysis(layers, Workspace(work.folder / "empty"), low_rank=False).options(spec).targets
    factors = LayerAnalysis(layers, work, limits=Limits(sparse=False)).options(spec)
    assert factors.factors
    assert len({t.rank for t in factors.targets}) > 2
