from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from globalopt.budgets.conversion import convert_target
from globalopt.errors import UnknownNameError, UsageError
from globalopt.kernels import precision
from globalopt.matching.block import Loss, Matching, match_block
from globalopt.matching.training import Autocast
from globalopt.models.batch import Batch
from globalopt.models.block_runner import BlockRunner
from globalopt.models.finding import find_layers
from globalopt.models.walk import walk_blocks
from globalopt.refine.blocks import Order, Refinement, refine
from globalopt.runs.artefacts import MATCHED_BLOCK, SOLVED_LAYER
from globalopt.runs.files import read_tensors
from globalopt.runs.folder import Run
from globalopt.values.budget import Budget, Target
from globalopt.values.decomposition import Decomposition, follows
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.metric import Gram
from globalopt.values.storage import Storage
from solvers import SOLVERS, get_solver
from tests.tiny_models import COVERED_KINDS, tiny_ids, tiny_model

QUICK = Matching(epochs=3, rate=0.01, loss=Loss.TOKEN)


def third(spec: LayerSpec) -> Target:
    return Target(1, spec.numel // 3)


def in_few_bits(spec: LayerSpec) -> Target:
    return Target(0, spec.numel, storage=Storage(3, 3))


def setting(
    tmp_path,
    solver="3basil",
    kind="llama",
    model=None,
    target=None,
    matching: Matching | None = QUICK,
    dtype=torch.float32,
    name="run",
):
    layers = find_layers(tiny_model(kind) if model is None else model)
    total = sum(spec.numel for spec in layers.specs)
    budget = Budget(total, total)
    made = get_solver(solver, {"steps": "20"} if solver == "3basil" else {})
    target = target or (third if made.sparse or made.low_rank else in_few_bits)
    asked = {spec: target(spec) for spec in layers.specs}
    targets = {spec.name: convert_target(asked[spec], spec, made, budget) for spec in layers.specs}
    plan = Refinement(targets, made, budget, dtype, dict.fromkeys(targets), matching=matching)
    runner = BlockRunner(layers, [Batch(tiny_ids(4, 12, seed=seed)) for seed in range(4)])
    run = Run.start(tmp_path / name, {"n": 1}, {})
    # Other settings open the same folder, as a run that goes on does.
    run.close()
    return layers, runner, plan, run


def output_error(runner: BlockRunner, dense: list[Tensor], tensors=None) -> float:
    """Relative squared error of the first block's outputs."""
    found = [runner.run(0, i, runner.first(i), tensors) for i in range(len(runner))]
    wanted = torch.cat(dense)
    return float((torch.cat(found) - wanted).square().sum() / wanted.square().sum())


@torch.no_grad()
def first_outputs(runner: BlockRunner) -> list[Tensor]:
    return [runner.run(0, i, runner.first(i)) for i in range(len(runner))]


@pytest.mark.parametrize("solver", SOLVERS)
def test_matching_helps_every_solver_and_keeps_its_support(tmp_path, solver):
    _, runner, plan, run = setting(tmp_path, solver)
    dense = first_outputs(runner)
    results = list(refine(runner, plan, run))
    layers = runner.layers
    for spec, result in zip(layers.specs, results, strict=True):
        fitted, matched = run.get(SOLVED_LAYER, spec).value, run.layer(spec)
        # Kept entries that the solver left at zero are none.
        assert torch.equal(matched.S != 0, fitted.S != 0)
        assert (matched.rank, matched.signs is None) == (fitted.rank, fitted.signs is None)
        assert (result.rank, result.nnz) == (matched.rank, matched.nnz)
        assert torch.equal(layers.weight(spec.name), matched.dense())
    first, *_ = run.matches(2)
    assert first.after < first.before
    with torch.no_grad():
        after = output_error(runner, dense)
        norms = run.get(MATCHED_BLOCK, 0).norms
        before = output_error(runner, dense, before_matching(run, runner, norms))
    # A layer that is only rounded loses little that could be made up for.
    assert after < (0.9 if plan.solver.sparse or plan.solver.low_rank else 0.95) * before


def before_matching(run: Run, runner: BlockRunner, norms) -> dict[str, Tensor]:
    """Parameters of the first block as the solver left them."""
    root = f"{runner.layers.blocks_path}.0."
    dense = tiny_model("llama")
    made = {f"{spec.name}.weight": run.get(SOLVED_LAYER, spec).value.dense() for spec in runner.layers.of_block(0)}
    made.update({name: dense.get_parameter(name) for name in norms})
    return {name.removeprefix(root): tensor for name, tensor in made.items()}


@pytest.mark.parametrize("kind", COVERED_KINDS)
def test_every_architecture_is_matched(tmp_path, kind):
    layers, runner, plan, run = setting(tmp_path, "wanda", kind)
    list(refine(runner, plan, run))
    for match in run.matches(2):
        assert match.after < match.before
    norms = {name for block in (0, 1) for name in run.get(MATCHED_BLOCK, block).norms}
    assert norms
    before = tiny_model(kind)
    assert all(not torch.equal(layers.model.get_parameter(n), before.get_parameter(n)) for n in norms)


def test_norm_biases_that_are_zero_are_trained(tmp_path):
    model = tiny_model("opt")
    biases = [p for name, p in model.named_parameters() if "layer_norm" in name and name.endswith("bias")]
    for bias in biases:
        bias.zero_()
    layers, runner, plan, run = setting(tmp_path, "wanda", model=model)
    list(refine(runner, plan, run))
    trained = [
        layers.model.get_parameter(f"model.decoder.layers.0.{n}.bias")
        for n in ("self_attn_layer_norm", "final_layer_norm")
    ]
    assert all(bias.count_nonzero() == bias.numel() for bias in trained)


def test_a_pattern_is_kept(tmp_path):
    half = NM(2, 4)
    layers, runner, plan, run = setting(tmp_path, target=lambda spec: Target(2, half.nnz(spec), half))
    list(refine(runner, plan, run))
    for spec in layers.specs:
        value = run.layer(spec)
        assert follows(value.S, half)
        assert value.nnz == half.nnz(spec)


def test_half_precision_is_what_is_saved_and_placed(tmp_path):
    layers, runner, plan, run = setting(tmp_path, dtype=torch.bfloat16)
    list(refine(runner, plan, run))
    for spec in layers.specs:
        value = run.layer(spec)
        assert value.S.dtype == value.U.dtype == torch.bfloat16
        assert torch.equal(layers.weight(spec.name), value.dense())


@pytest.mark.parametrize("order", list(Order))
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(tmp_path, order, share):
    matching = replace(QUICK, share=share)

    def refined(name: str) -> dict[int, dict[str, object]]:
        _, runner, plan, run = setting(tmp_path, matching=matching, name=name)
        list(refine(runner, replace(plan, order=order), run))
        return {block: bits(run.path(MATCHED_BLOCK, block)) for block in (0, 1)}

    whole = refined("whole")
    _, runner, plan, run = setting(tmp_path, matching=matching, name="killed")
    next(refine(runner, replace(plan, order=order), run))
    # As if it had been killed between two layers of the first block, before it was matched.
    run.path(MATCHED_BLOCK, 0).unlink()
    run.path(SOLVED_LAYER, runner.layers.of_block(0)[-1]).unlink()
    assert refined("killed") == whole


def bits(path: Path) -> dict[str, object]:
    """Tensors as bytes, and facts, but for how long it took."""
    tensors, facts = read_tensors(path)
    del facts["seconds"]
    return {"facts": facts, **{name: tensor.numpy().tobytes() for name, tensor in tensors.items()}}


def test_the_target_is_what_the_dense_block_makes_of_these_inputs_or_of_dense_ones(tmp_path, monkeypatch):
    wanted: dict[tuple[float, int], list[Tensor]] = {}
    share = 0.0

    def spy(runner, index, inputs, targets, values, *rest):
        wanted[share, index] = list(targets)
        return match_block(runner, index, inputs, targets, values, *rest)

    monkeypatch.setattr("globalopt.refine.blocks.match_block", spy)
    for share in (0.0, 0.5, 1.0):
        _, runner, plan, run = setting(tmp_path, matching=replace(QUICK, epochs=1, share=share), name=f"run{share}")
        list(refine(runner, plan, run))
    _, runner, _, _ = setting(tmp_path)
    dense = [visit.outputs() for visit in walk_blocks(runner)]
    for block in (0, 1):
        torch.testing.assert_close(wanted[1.0, block], dense[block])
    # The first block's inputs are dense ones anyhow; the second's are not.
    torch.testing.assert_close(wanted[0.0, 0], dense[0])
    assert not torch.allclose(wanted[0.0, 1][0], dense[1][0], atol=1e-3)


def test_site_by_site_every_site_sees_the_layers_before_it_replaced(tmp_path):
    _, runner, plan, run = setting(tmp_path, "wanda", matching=None)
    list(refine(runner, replace(plan, order=Order.SITE), run))
    first = [run.get(SOLVED_LAYER, spec).value.dense() for spec in runner.layers.of_block(0)]

    # By hand: wanda keeps the largest |w| |x| of every row, x being what the replaced layers before really produce.
    layers = find_layers(tiny_model("llama"))
    again = BlockRunner(layers, runner.batches)
    for spec, expected in zip(layers.of_block(0), first, strict=True):
        visit = next(walk_blocks(again))
        norms = visit.grams([spec.site])[spec.site].norms
        target = Target(0, spec.numel // 3 + spec.d_out + spec.d_in)
        W = layers.weight(spec.name)
        solver = get_solver("wanda")
        found = solver.solve(solver.prepare(W, metric_of(norms)), target).value.dense()
        torch.testing.assert_close(found, expected)
        # Layers of one site are replaced together, after the last of them.
        if spec is [s for s in layers.of_block(0) if s.site == spec.site][-1]:
            for other in layers.of_block(0):
                if other.site == spec.site:
                    layers.set_weight(other.name, run.get(SOLVED_LAYER, other).value.dense())


def metric_of(norms: Tensor):
    from globalopt.values.metric import Metric

    return Metric(Gram(torch.diag(norms.square()), 48))


# ------------------------------------------------------------------------------------------------- losses


def one_layer(layers, S: Tensor) -> dict[str, Decomposition]:
    values = {}
    for spec in layers.of_block(0):
        W = layers.weight(spec.name) if spec is not layers.specs[-1] else S
        values[spec.name] = Decomposition(W, W.new_zeros(len(W), 0), W.new_zeros(0, W.shape[1]))
    return values


@pytest.mark.parametrize("loss", list(Loss))
def test_losses_are_their_formulas(tmp_path, loss):
    layers, runner, _, _ = setting(tmp_path)
    inputs = [runner.first(i) for i in range(len(runner))]
    dense = first_outputs(runner)
    targets = [x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(i)) for i, x in enumerate(dense)]
    A = torch.randn(32, 32, generator=torch.Generator().manual_seed(9))
    A = A @ A.mT
    values = one_layer(layers, layers.weight(layers.specs[0].name))
    options = Matching(epochs=1, rate=0.0, loss=loss, held_out=0.25, damping=0.0)
    _, found = match_block(runner, 0, inputs, targets, values, options, Gram(A, 1), 0)
    if loss is Loss.BOTH:
        # The mean of the other two, each over what it is on all batches at the start.
        assert found.before == pytest.approx(1, abs=0.1)
        return
    # Of four batches the last is held out.
    e, y = (dense[-1] - targets[-1]).flatten(0, 1).double(), targets[-1].flatten(0, 1).double()
    each = {
        Loss.SUM: e.square().sum(1),
        Loss.TOKEN: e.square().sum(1) / y.square().sum(1),
        Loss.NATS: (e @ A.double() * e).sum(1) / 2,
    }[loss]
    assert found.before == pytest.approx(float(each.mean()), rel=1e-4)


def test_nats_need_the_output_gram(tmp_path):
    layers, runner, _, _ = setting(tmp_path)
    values = one_layer(layers, layers.weight(layers.specs[0].name))
    with pytest.raises(UsageError, match="loss=token"):
        match_block(runner, 0, [], [], values, Matching(loss=Loss.NATS), None, 0)


@pytest.mark.parametrize("fast", [True, False])
def test_gradients_are_rough_where_the_processor_is_faster_and_losses_exact(tmp_path, monkeypatch, fast):
    layers, runner, _, _ = setting(tmp_path)
    inputs, targets = [runner.first(i) for i in range(len(runner))], first_outputs(runner)
    pruned = {spec.name: layers.weight(spec.name) for spec in layers.of_block(0)}
    pruned = {name: W * (W.abs() > 0.02) for name, W in pruned.items()}
    values = {name: Decomposition(S, S[:, :0], S[:0]) for name, S in pruned.items()}
    monkeypatch.setattr(precision, "rough_products", lambda tensor: fast)
    found = {}
    for choice in Autocast:
        options = Matching(epochs=1, rate=0.003, loss=Loss.SUM, held_out=0.0, autocast=choice)
        found[choice] = match_block(runner, 0, inputs, targets, values, options, None, 0)[1]
    assert len({each.before for each in found.values()}) == 1
    exact = found[Autocast.OFF].after
    assert (found[Autocast.AUTO].after == exact) != fast
    assert found[Autocast.ON].after != exact
    assert [each.after for each in found.values()] == pytest.approx([exact] * 3, rel=0.05)


def test_masking_gradients_by_hand_comes_to_the_same(tmp_path):
    """The slow way: a dense weight whose gradient is masked, and Adam on it."""
    layers, runner, _, _ = setting(tmp_path)
    spec = layers.of_block(0)[-1]
    S = layers.weight(spec.name)
    S[torch.rand(S.shape, generator=torch.Generator().manual_seed(0)) < 0.5] = 0
    inputs, targets = [runner.first(i) for i in range(len(runner))], first_outputs(runner)
    values = {spec.name: Decomposition(S, S.new_zeros(len(S), 0), S.new_zeros(0, S.shape[1]))}
    exact = Autocast.OFF
    options = Matching(epochs=1, rate=0.01, floor=1.0, relative=False, loss=Loss.SUM, held_out=0.0, autocast=exact)
    trained, _ = match_block(runner, 0, inputs, targets, values, options, None, 5)

    from random import Random

    W = S.clone().requires_grad_()
    norms = {name: parameter.detach().clone().requires_grad_() for name, parameter in norm_weights(layers)}
    adam = torch.optim.Adam([W, *norms.values()], lr=0.01)
    for i in Random("5 1").sample(range(4), 4):
        adam.zero_grad()
        with torch.enable_grad():
            name = spec.name.removeprefix(f"{layers.blocks_path}.0.")
            found = runner.run(0, i, inputs[i], {f"{name}.weight": W, **norms})
            (found - targets[i]).flatten(0, 1).square().sum(1).mean().backward()
        assert W.grad is not None
        W.grad *= S != 0
        adam.step()
    torch.testing.assert_close(trained.values()[spec.name].S, W.detach(), rtol=1e-4, atol=1e-5)


def norm_weights(layers):
    from globalopt.matching.parameters import norm_parameters

    root = f"{layers.blocks_path}.0"
    return [(name.removeprefix(f"{root}."), p) for name, p in norm_parameters(layers.model, root)]


# ------------------------------------------------------------------------------------------------- options


def test_presets_and_options():
    assert Matching.read({}) == Matching()
    published = Matching.read({"preset": "tm", "epochs": "3"})
    assert (published.epochs, published.rate, published.loss, published.relative) == (3, 2e-5, Loss.SUM, False)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"preset": "no"}, UnknownNameError, "preset of matching"),
        ({"epoch": "3"}, UnknownNameError, "option of matching"),
        ({"loss": "mean"}, UsageError, "one of sum, token, nats, both"),
        ({"share": "1.5"}, UsageError, "share"),
        ({"epochs": "0"}, UsageError, "epochs"),
    ],
)
def test_options_that_cannot_be(options, error, words):
    with pytest.raises(error, match=words):
        Matching.read(options)
