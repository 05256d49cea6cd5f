"""What a search knows of a model: fits of every layer, the true cost of the lowest, prices that pass through both."""

from __future__ import annotations

import pytest
import torch

from globalopt.analysis.collect import output_grams, span_layers
from globalopt.analysis.fits import MEASURED_KEPT, fit_layers
from globalopt.analysis.one_layer_losses import (
    choose_metrics,
    measure_layers,
    single_layer_losses,
    weigh_layers,
)
from globalopt.analysis.prices import price_by_gradients, price_by_grams
from globalopt.analysis.sensitivity import backward_sweep
from globalopt.errors import ArtefactError, NumericalError
from globalopt.kernels.sketch import DenseSketch
from globalopt.models.layers import find_layers
from globalopt.models.walk import Batch, BlockRunner
from globalopt.runs.files import read_json
from globalopt.runs.folder import Run
from globalopt.values.budget import Target
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.metric import Gram, Metric
from solvers import get_solver
from tests.objective.test_kl_to_dense import counted, kl
from tests.tiny_models import tiny_ids, tiny_model

SOLVER = get_solver("3basil", {"steps": "10"})


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def analysed(request, tmp_path_factory):
    """A runner, a run with fits and measurements, and the inputs of the backward sweep."""
    layers = find_layers(tiny_model(request.param), allow_low_coverage=True)
    runner = BlockRunner(layers, [Batch(ids) for ids in tiny_ids(8, 12).split(4)])
    run = Run.start(tmp_path_factory.mktemp("run") / request.param, {}, {})
    inputs = span_layers(runner, run, "activation", keep_inputs=True)
    fit_layers(layers, layers.specs, run, None, SOLVER, lambda spec: None)
    measure_layers(runner, layers.specs, run)
    return runner, run, inputs


def test_fits_are_the_solvers_at_the_anchors(analysed):
    runner, run, _ = analysed
    spec = runner.layers.specs[3]
    rows, residuals = run.read_fits(spec)
    weight = runner.layers.weight(spec.name)
    anchors = [anchor for row in rows for anchor in row]
    found = SOLVER.solve_path(SOLVER.prepare(weight, Metric(run.read_gram(spec.site))), anchors)
    for solution, residual in zip(found, residuals, strict=True):
        expected = weight - solution.value.dense()
        torch.testing.assert_close(residual.float(), expected, rtol=0.01, atol=0.01 * float(weight.abs().max()))


def test_measured_is_the_loss_with_one_layer_replaced(analysed):
    runner, run, _ = analysed
    layers = runner.layers
    ids = tiny_ids(8, 12)
    with torch.no_grad():
        dense = layers.model(input_ids=ids).logits[:, :-1]
    for spec in (layers.specs[0], layers.specs[-1]):
        measured = run.read_measured(spec)
        rows, residuals = run.read_fits(spec)
        anchors = [anchor for row in rows for anchor in row]
        low = [anchor for anchor in anchors if anchor.params(spec) <= MEASURED_KEPT * spec.numel]
        assert set(measured) == {*low, Target.zero()}
        weight = layers.weight(spec.name)
        for target, loss in measured.items():
            lost = weight if target == Target.zero() else residuals[anchors.index(target)].float()
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
    assert [choice.spec for choice in choose_metrics(runner, grams, SOLVER)] == tried
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


def test_prices_pass_through_what_was_measured(analysed):
    runner, run, inputs = analysed
    found = {
        one.surface.spec.name: one.surface
        for one in price_by_gradients(runner, inputs, runner.layers.specs, run, None, 0)
    }
    for spec in runner.layers.specs:
        surface = found[spec.name]
        for target, loss in run.read_measured(spec).items():
            if target == Target.zero():
                assert surface.predict(target) >= loss
            elif target in surface.targets:
                assert surface.predict(target) == pytest.approx(loss, rel=1e-6)


def test_overlaps_are_the_cosines_of_what_fits_lose_in_the_prices_norm(analysed):
    runner, run, inputs = analysed
    specs = runner.layers.specs
    priced = {one.surface.spec.name: one.overlap for one in price_by_gradients(runner, inputs, specs, run, None, 0)}
    plain = {one.surface.spec.name: one.overlap for one in price_by_grams(runner.layers, specs, run, None)}

    def sums(spec: LayerSpec) -> list[DenseSketch]:
        R = run.read_fits(spec)[1].float()
        return [DenseSketch(torch.cat([R, R[:1] + R]))]

    for found in backward_sweep(runner, inputs, specs, sums, 0):
        by_gradients, by_grams = priced[found.spec.name], plain[found.spec.name]
        assert by_gradients is not None
        assert by_grams is not None
        k = len(found.error) // 2
        alone, together = torch.tensor(found.error, dtype=torch.float64).split(k)
        products = (together - alone - alone[0]) / 2
        torch.testing.assert_close(by_gradients[0], products / (alone * alone[0]).sqrt(), rtol=1e-3, atol=1e-4)
        R, metric = run.read_fits(found.spec)[1].float(), Metric(run.read_gram(found.spec.site))
        one, other, both = (metric.error(E) for E in (R[0], R[1], R[0] + R[1]))
        expected = (both - one - other) / 2 / (one * other) ** 0.5
        assert float(by_grams[0, 1]) == pytest.approx(expected, rel=1e-3, abs=1e-4)
        assert float(by_grams[1, 1]) == 1.0


def test_without_fits_nothing_overlaps(tmp_path):
    layers = find_layers(tiny_model("llama"), allow_low_coverage=True)
    runner = BlockRunner(layers, [Batch(tiny_ids(4, 12))])
    run = Run.start(tmp_path / "run", {}, {})
    inputs = span_layers(runner, run, "activation", keep_inputs=True)
    for one in price_by_gradients(runner, inputs, layers.specs[:2], run, None, 0):
        assert one.overlap is None
        run.write_sensitivity(one.surface, one.outputs, one.overlap)
    with pytest.raises(ArtefactError, match="lacks overlap"):
        run.read_overlap(layers.specs[0])


def test_measuring_leaves_the_model_dense(analysed):
    runner, run, _ = analysed
    before = {spec.name: runner.layers.weight(spec.name) for spec in runner.layers.specs}
    measure_layers(runner, runner.layers.specs[:2], run)
    assert all(torch.equal(runner.layers.weight(name), weight) for name, weight in before.items())


def test_fits_may_minimise_in_the_output_gram(tmp_path):
    layers = find_layers(tiny_model("llama"), allow_low_coverage=True)
    runner = BlockRunner(layers, [Batch(tiny_ids(4, 12))])
    losses = {}
    for weighted in (False, True):
        run = Run.start(tmp_path / str(weighted), {}, {})
        span_layers(runner, run, "activation", keep_inputs=False)
        output_grams(runner, run, layers.specs, seed=1)
        fit_layers(layers, layers.specs, run, None, SOLVER, run.read_outputs if weighted else lambda spec: None)
        losses[weighted] = sum(
            Metric(run.read_gram(spec.site), run.read_outputs(spec)).error(residual.float())
            for spec in layers.specs
            for residual in run.read_fits(spec)[1]
        )
    assert losses[True] < losses[False]


@pytest.mark.parametrize("pattern", [None, NM(2, 4)])
def test_the_metric_of_a_layer_is_the_one_whose_fit_costs_less(tmp_path, pattern):
    layers = find_layers(tiny_model("llama"), allow_low_coverage=True)
    ids = tiny_ids(4, 12)
    runner = BlockRunner(layers, [Batch(ids)])
    run = Run.start(tmp_path / "run", {}, {})
    output_grams(runner, run, layers.specs, seed=1)
    # One layer's output Gram is made to feel nothing that matters.
    blind = layers.specs[4]
    A = torch.full((blind.d_out,), 1e-6)
    A[0] = 1.0
    run.write_outputs(blind, Gram(torch.diag(A), 48))
    weigh_layers(runner, layers.specs, run, pattern, SOLVER)
    assert not run.weighs_outputs(blind)
    assert run.chosen_outputs(blind) is None
    assert any(run.chosen_outputs(spec) is not None for spec in layers.specs)
    with torch.no_grad():
        dense = layers.model(input_ids=ids).logits[:, :-1]
    target = Target(0, pattern.nnz(blind) if pattern else int(0.2 * blind.numel), pattern)
    weight = layers.weight(blind.name)
    gram = run.read_gram(blind.site)
    for name, outputs in (("plain", None), ("weighted", run.read_outputs(blind))):
        fitted = SOLVER.solve(SOLVER.prepare(weight, Metric(gram, outputs)), target).value.dense()
        layers.set_weight(blind.name, fitted)
        with torch.no_grad():
            loss = float(kl(dense, layers.model(input_ids=ids).logits[:, :-1]).mean())
        assert read_json(run.weighing_path(blind))[name] == pytest.approx(loss, rel=1e-3, abs=1e-6)
    layers.set_weight(blind.name, weight)


def test_under_a_pattern_only_the_rank_is_priced(tmp_path):
    layers = find_layers(tiny_model("llama"), allow_low_coverage=True)
    runner = BlockRunner(layers, [Batch(tiny_ids(2, 12))])
    run = Run.start(tmp_path / "run", {}, {})
    inputs = span_layers(runner, run, "activation", keep_inputs=True)
    fit_layers(layers, layers.specs, run, NM(2, 4), SOLVER, lambda spec: None)
    for one in price_by_gradients(runner, inputs, layers.specs, run, NM(2, 4), 0):
        surface = one.surface
        assert {(target.pattern, target.nnz) for target in surface.targets} == {(NM(2, 4), surface.spec.numel // 2)}
