"""The analysis of a model: anchor solutions, single-layer losses of the lowest, predictions that pass through both."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from globalopt.analysis.anchors import solve_anchors
from globalopt.analysis.collect import span_layers, write_output_grams
from globalopt.analysis.layer_analysis import PROBE_OUTPUT_GRAM, LayerAnalysis
from globalopt.analysis.one_layer_losses import (
    MEASURED_KEPT,
    choose_metrics,
    single_layer_losses,
    write_metric_choices,
    write_single_layer_losses,
)
from globalopt.analysis.predictions import predict_by_fisher, predict_by_grams
from globalopt.analysis.sensitivity import Sketches, backward_sweep
from globalopt.errors import NumericalError
from globalopt.kernels.sketch import DenseSketch
from globalopt.models.layers import find_layers
from globalopt.models.walk import Batch, BlockRunner
from globalopt.runs.artefacts import (
    ANCHORS,
    BLOCK_OUTPUT_GRAM,
    GRAM,
    METRIC_CHOICE,
    OUTPUT_GRAM,
    PREDICTION,
    SINGLE_LAYER_LOSSES,
    Stage,
)
from globalopt.runs.records import MetricChoice
from globalopt.runs.workspace import Workspace
from globalopt.values.budget import Target
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.metric import Gram, Metric
from solvers import get_solver
from tests.objective.test_kl_to_dense import counted, kl
from tests.tiny_models import tiny_ids, tiny_model

SOLVER = get_solver("3basil", {"steps": "10"})


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def analysed(request, tmp_path_factory):
    """A runner, an analysis with anchor solutions and single-layer losses, and the inputs of the backward sweep."""
    layers = find_layers(tiny_model(request.param), allow_low_coverage=True)
    runner = BlockRunner(layers, [Batch(ids) for ids in tiny_ids(8, 12).split(4)])
    work = Workspace(tmp_path_factory.mktemp("run") / request.param)
    inputs = span_layers(runner, work, "activation", keep_inputs=True)
    analysis = LayerAnalysis(layers, work)
    solve_anchors(analysis, layers.specs, SOLVER)
    write_single_layer_losses(analysis, runner, layers.specs)
    return runner, analysis, inputs


def test_anchor_solutions_are_the_solvers_and_come_back_to_the_bit(analysed):
    runner, analysis, _ = analysed
    spec = runner.layers.specs[3]
    weight = runner.layers.weight(spec.name)
    solutions = analysis.work.get(ANCHORS, spec)
    assert solutions.rows == analysis.options(spec).anchors
    metric = Metric(analysis.work.get(GRAM, spec.site))
    found = SOLVER.solve_path(SOLVER.prepare(weight, metric), solutions.anchors)
    residuals = analysis.residuals(spec, weight)
    assert residuals.anchors == solutions.anchors
    for anchor, solution, value in zip(solutions.anchors, found, solutions.values, strict=True):
        assert torch.equal(solution.value.S, value.S)
        assert torch.equal(solution.value.dense(), value.dense())
        assert torch.equal(residuals.at(anchor), (weight - solution.value.dense()).bfloat16().float())


def test_single_layer_losses_are_those_with_one_layer_replaced(analysed):
    runner, analysis, _ = analysed
    layers = runner.layers
    ids = tiny_ids(8, 12)
    with torch.no_grad():
        dense = layers.model(input_ids=ids).logits[:, :-1]
    for spec in (layers.specs[0], layers.specs[-1]):
        measured = analysis.work.get(SINGLE_LAYER_LOSSES, spec)
        weight = layers.weight(spec.name)
        residuals = analysis.residuals(spec, weight)
        low = [anchor for anchor in residuals.anchors if anchor.params(spec) <= MEASURED_KEPT * spec.numel]
        assert set(measured) == {*low, Target.zero()}
        for target, loss in measured.items():
            lost = weight if target == Target.zero() else residuals.at(target)
            layers.set_weight(spec.name, weight - lost)
            with torch.no_grad():
                logits = layers.model(input_ids=ids).logits[:, :-1]
            assert loss == pytest.approx(float(kl(dense, logits).mean()), rel=1e-3, abs=1e-6)
        layers.set_weight(spec.name, weight)


def test_blocks_before_the_replaced_layer_are_run_once_for_all_its_solutions(analysed, monkeypatch):
    runner = analysed[0]
    layers, chunks = runner.layers, len(runner)
    blocks = len(layers.blocks)
    tried = [layers.specs[0], layers.specs[-1]]
    residuals = [(spec, {Target(0, n): n * 0.1 * layers.weight(spec.name) for n in (1, 2, 3)}) for spec in tried]
    run = counted(monkeypatch)
    found = dict(single_layer_losses(runner, residuals))
    # The dense predictions; then the three solutions and the dropped layer.
    assert len(run) == chunks * (blocks + sum(blocks + 3 * (blocks - spec.block) for spec in tried))
    assert [list(losses) for losses in found.values()] == [[Target(0, n) for n in (1, 2, 3)] + [Target.zero()]] * 2
    run.clear()
    grams = [(spec, Gram(torch.eye(spec.d_in), 1), Gram(torch.eye(spec.d_out), 1)) for spec in tried]
    assert [spec for spec, _ in choose_metrics(runner, grams, SOLVER)] == tried
    assert len(run) == chunks * (blocks + sum(blocks + (blocks - spec.block) for spec in tried))


def test_the_model_is_dense_between_layers(analysed):
    runner = analysed[0]
    layers = runner.layers
    dense = {spec.name: layers.weight(spec.name) for spec in layers.specs}

    def is_dense() -> bool:
        return all(torch.equal(layers.weight(name), weight) for name, weight in dense.items())

    def residuals():
        for spec in layers.specs[:3]:
            assert is_dense()
            yield spec, {Target(0, 1): 0.5 * dense[spec.name]}

    for _ in single_layer_losses(runner, residuals()):
        assert is_dense()
    for _ in choose_metrics(runner, [], SOLVER):
        pass
    broken = [(layers.specs[0], {Target(0, 1): torch.full_like(dense[layers.specs[0].name], 1e38)})]
    with pytest.raises(NumericalError, match="not finite"):
        list(single_layer_losses(runner, broken))
    assert is_dense()


def test_predictions_pass_through_what_was_measured(analysed):
    runner, analysis, inputs = analysed
    for spec, prediction, _ in predict_by_fisher(analysis, runner, inputs, runner.layers.specs, 0):
        surface = prediction.surface
        for target, loss in analysis.work.get(SINGLE_LAYER_LOSSES, spec).items():
            if target == Target.zero():
                assert surface.predict(target) >= loss
            elif target in surface.targets:
                assert surface.predict(target) == pytest.approx(loss, rel=1e-6)


def test_overlaps_are_the_cosines_of_anchor_residuals_in_the_norm_of_the_predictions(analysed):
    runner, analysis, inputs = analysed
    specs = runner.layers.specs
    by_fisher = {spec: found.overlap for spec, found, _ in predict_by_fisher(analysis, runner, inputs, specs, 0)}
    by_grams = {spec: found.overlap for spec, found, _ in predict_by_grams(analysis, specs)}

    def residuals_of(spec: LayerSpec) -> Tensor:
        return analysis.residuals(spec, runner.layers.weight(spec.name)).tensor.float()

    def sums(spec: LayerSpec) -> Sketches:
        R = residuals_of(spec)
        return Sketches([DenseSketch(torch.cat([R, R[:1] + R]))])

    for found in backward_sweep(runner, inputs, specs, sums, 0):
        fisher, plain = by_fisher[found.spec], by_grams[found.spec]
        assert fisher is not None
        assert plain is not None
        k = len(found.error) // 2
        alone, together = torch.tensor(found.error, dtype=torch.float64).split(k)
        products = (together - alone - alone[0]) / 2
        torch.testing.assert_close(fisher[0], products / (alone * alone[0]).sqrt(), rtol=1e-3, atol=1e-4)
        R, metric = residuals_of(found.spec), Metric(analysis.work.get(GRAM, found.spec.site))
        one, other, both = (metric.error(E) for E in (R[0], R[1], R[0] + R[1]))
        expected = (both - one - other) / 2 / (one * other) ** 0.5
        assert float(plain[0, 1]) == pytest.approx(expected, rel=1e-3, abs=1e-4)
        assert float(plain[1, 1]) == 1.0


def test_without_anchor_solutions_nothing_overlaps(tmp_path):
    layers = find_layers(tiny_model("llama"), allow_low_coverage=True)
    runner = BlockRunner(layers, [Batch(tiny_ids(4, 12))])
    work = Workspace(tmp_path)
    inputs = span_layers(runner, work, "activation", keep_inputs=True)
    for spec, prediction, _ in predict_by_fisher(LayerAnalysis(layers, work), runner, inputs, layers.specs[:2], 0):
        assert prediction.overlap is None
        work.put(PREDICTION, spec, prediction)
        assert work.get(PREDICTION, spec).overlap is None


def test_the_sweep_of_predictions_leaves_output_grams_of_blocks_too(tmp_path):
    layers = find_layers(tiny_model("llama"), allow_low_coverage=True)
    runner = BlockRunner(layers, [Batch(tiny_ids(4, 12))])
    work = Workspace(tmp_path)
    inputs = span_layers(runner, work, "activation", keep_inputs=True)
    analysis, blocks = LayerAnalysis(layers, work), {}
    swept = {
        spec: gram
        for spec, _, gram in predict_by_fisher(
            analysis, runner, inputs, layers.specs, 3, behind=lambda block, gram: blocks.update({block: gram})
        )
    }
    write_output_grams(runner, work, Stage.LABELS, layers.specs, seed=3)
    for spec in layers.specs:
        assert torch.equal(work.get(OUTPUT_GRAM, spec).matrix, swept[spec].matrix)
    for block, gram in blocks.items():
        assert torch.equal(work.get(BLOCK_OUTPUT_GRAM.during(Stage.LABELS), block).matrix, gram.matrix)
    assert sorted(blocks) == [0, 1]


def test_measuring_leaves_the_model_dense(analysed):
    runner, analysis, _ = analysed
    before = {spec.name: runner.layers.weight(spec.name) for spec in runner.layers.specs}
    write_single_layer_losses(analysis, runner, runner.layers.specs[:2])
    assert all(torch.equal(runner.layers.weight(name), weight) for name, weight in before.items())


def test_anchor_solutions_may_minimise_in_the_output_gram(tmp_path):
    layers = find_layers(tiny_model("llama"), allow_low_coverage=True)
    runner = BlockRunner(layers, [Batch(tiny_ids(4, 12))])
    losses = {}
    for weighted in (False, True):
        work = Workspace(tmp_path / str(weighted))
        span_layers(runner, work, "activation", keep_inputs=False)
        write_output_grams(runner, work, Stage.PROBE_LABELS, layers.specs, seed=1)
        analysis = LayerAnalysis(layers, work, weighted=weighted)
        for spec in layers.specs:
            work.put(METRIC_CHOICE, spec, MetricChoice(plain=1.0, weighted=0.0))
        solve_anchors(analysis, layers.specs, SOLVER)
        losses[weighted] = sum(
            Metric(work.get(GRAM, spec.site), work.get(PROBE_OUTPUT_GRAM, spec)).error(residual.float())
            for spec in layers.specs
            for residual in analysis.residuals(spec, layers.weight(spec.name)).tensor
        )
    assert losses[True] < losses[False]


@pytest.mark.parametrize("pattern", [None, NM(2, 4)])
def test_the_metric_of_a_layer_is_the_one_whose_solution_costs_less(tmp_path, pattern):
    layers = find_layers(tiny_model("llama"), allow_low_coverage=True)
    ids = tiny_ids(4, 12)
    runner = BlockRunner(layers, [Batch(ids)])
    work = Workspace(tmp_path)
    write_output_grams(runner, work, Stage.PROBE_LABELS, layers.specs, seed=1)
    # One layer's output Gram is made to feel nothing that matters.
    blind = layers.specs[4]
    A = torch.full((blind.d_out,), 1e-6)
    A[0] = 1.0
    work.put(PROBE_OUTPUT_GRAM, blind, Gram(torch.diag(A), 48))
    analysis = LayerAnalysis(layers, work, pattern, weighted=True)
    write_metric_choices(analysis, runner, layers.specs, SOLVER)
    assert not work.get(METRIC_CHOICE, blind).uses_output_gram
    assert analysis.output_gram(blind) is None
    assert any(analysis.output_gram(spec) is not None for spec in layers.specs)
    with torch.no_grad():
        dense = layers.model(input_ids=ids).logits[:, :-1]
    target = Target(0, pattern.nnz(blind) if pattern else int(0.2 * blind.numel), pattern)
    weight = layers.weight(blind.name)
    gram, choice = work.get(GRAM, blind.site), work.get(METRIC_CHOICE, blind)
    for found, outputs in ((choice.plain, None), (choice.weighted, work.get(PROBE_OUTPUT_GRAM, blind))):
        solved = SOLVER.solve(SOLVER.prepare(weight, Metric(gram, outputs)), target).value.dense()
        layers.set_weight(blind.name, solved)
        with torch.no_grad():
            loss = float(kl(dense, layers.model(input_ids=ids).logits[:, :-1]).mean())
        assert found == pytest.approx(loss, rel=1e-3, abs=1e-6)
    layers.set_weight(blind.name, weight)


def test_under_a_pattern_only_the_rank_is_predicted(tmp_path):
    layers = find_layers(tiny_model("llama"), allow_low_coverage=True)
    runner = BlockRunner(layers, [Batch(tiny_ids(2, 12))])
    work = Workspace(tmp_path)
    inputs = span_layers(runner, work, "activation", keep_inputs=True)
    analysis = LayerAnalysis(layers, work, NM(2, 4))
    solve_anchors(analysis, layers.specs, SOLVER)
    for spec, prediction, _ in predict_by_fisher(analysis, runner, inputs, layers.specs, 0):
        surface = prediction.surface
        assert {(target.pattern, target.nnz) for target in surface.targets} == {(NM(2, 4), spec.numel // 2)}
