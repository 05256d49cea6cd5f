"""The true loss: what a search is told is the KL that evaluation would measure."""

from __future__ import annotations

import itertools

import pytest
import torch

from globalopt.errors import NumericalError, UnknownNameError, UsageError
from globalopt.evaluation.perplexity import evaluate
from globalopt.kernels import precision
from globalopt.kernels.top_kl import Teacher
from globalopt.models.batch import Batch
from globalopt.models.block_runner import BlockRunner
from globalopt.models.finding import find_layers
from globalopt.models.layers import ModelLayers
from globalopt.objective import kl_to_dense
from globalopt.objective.kl_to_dense import ModelObjective, TargetObjective
from globalopt.text.splits import Split
from globalopt.values.budget import Target
from globalopt.values.layer import LayerSpec
from globalopt.values.span import Mask
from tests.tiny_models import tiny_ids, tiny_model

WINDOWS, TOKENS = 6, 10


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL by windows in float64, from logits, as written on paper."""
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean(-1)


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 5, 40, generator=generator)


def test_with_the_whole_vocabulary_it_is_the_kl(logits):
    p, q = logits
    teacher = Teacher.of(p, top=40)
    assert float(teacher.tail.max()) == 0.0
    torch.testing.assert_close(teacher.kl(q), kl(p, q), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(teacher.kl(p), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-6)


def test_a_lumped_tail_gives_a_lower_bound_that_tightens(logits):
    p, q = logits
    found = [Teacher.of(p, top=top).kl(q) for top in (5, 20, 39, 40)]
    for coarse, fine in itertools.pairwise(found):
        assert bool((coarse <= fine + 1e-6).all())
    assert float(found[0].min()) > 0
    # By hand: the symbols outside of the top as one.
    chosen = p[0, 0].topk(5).indices
    rest = torch.ones(40, dtype=torch.bool).scatter(0, chosen, False)
    a, b = p[0, 0].double().softmax(-1), q[0, 0].double().softmax(-1)
    by_hand = (a[chosen] * (a[chosen] / b[chosen]).log()).sum() + a[rest].sum() * (a[rest].sum() / b[rest].sum()).log()
    one = Teacher.of(p[:1, :1], top=5).kl(q[:1, :1])
    torch.testing.assert_close(one[0], by_hand, rtol=1e-5, atol=0)


def shrunk(spec: LayerSpec, weight: torch.Tensor, target: Target | Mask) -> torch.Tensor:
    """A stand-in for a candidate that depends on every number of its target."""
    assert isinstance(target, Target)
    return weight * (target.nnz / spec.numel) + 0.01 * target.rank


def made(kind: str, size: int = 2):
    layers = find_layers(tiny_model(kind), allow_low_coverage=True)
    runner = BlockRunner(layers, [Batch(ids) for ids in tiny_ids(WINDOWS, TOKENS).split(size)])
    dense = {spec.name: layers.weight(spec.name) for spec in layers.specs}
    model = ModelObjective(runner, top=1000)
    return layers, TargetObjective(model, lambda spec, kept: shrunk(spec, dense[spec.name], kept))


def candidates(specs, count: int = 6):
    generator = torch.Generator().manual_seed(1)
    base = {spec.name: Target(0, spec.numel // 2) for spec in specs}
    found = [base]
    for _ in range(count - 1):
        spec = specs[int(torch.randint(len(specs), (), generator=generator))]
        found.append({**base, spec.name: Target(1, int(torch.randint(spec.numel, (), generator=generator)))})
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_losses_are_what_evaluation_measures(kind):
    layers, objective = made(kind)
    dense_model = tiny_model(kind)
    asked = candidates(layers.specs, 3)
    losses = objective.losses(asked, range(objective.model.chunks))
    assert losses.shape == (3, WINDOWS)
    objective.close()
    ids = tiny_ids(WINDOWS, TOKENS)
    split = Split("selection", ids, tuple(range(0, WINDOWS * TOKENS, TOKENS)), (0, WINDOWS * TOKENS), "tiny", "", 0)
    for candidate, found in zip(asked, losses, strict=True):
        for spec in layers.specs:
            layers.set_weight(
                spec.name, shrunk(spec, find_layers(dense_model, True).weight(spec.name), candidate[spec.name])
            )
        measured = evaluate(layers.model, split, dense_model)
        assert float(found.mean()) == pytest.approx(measured.kl, rel=1e-4, abs=1e-7)


def test_answers_do_not_depend_on_what_is_asked_with_them():
    layers, objective = made("llama")
    asked = candidates(layers.specs)
    together = objective.losses(asked, range(objective.model.chunks))
    for i in reversed(range(len(asked))):
        for chunk in (2, 0, 1):
            alone = objective.losses([asked[i]], [chunk])
            assert torch.equal(alone[0], together[i, 2 * chunk : 2 * chunk + 2])


def counted(monkeypatch) -> list[int]:
    """The blocks that are run from now on."""
    run: list[int] = []
    real = BlockRunner.run
    monkeypatch.setattr(BlockRunner, "run", lambda self, block, *rest: run.append(block) or real(self, block, *rest))
    return run


def least_work(layers, candidates) -> int:
    """Block runs of the best order: one for every different start of a candidate, up to each block."""
    names = [[spec.name for spec in layers.of_block(block)] for block in range(len(layers.blocks))]
    starts = {
        tuple(candidate[name] for block in names[: end + 1] for name in block)
        for candidate in candidates
        for end in range(len(names))
    }
    return len(starts)


@pytest.mark.parametrize("seed", range(3))
def test_in_any_order_no_block_is_run_more_often_than_in_the_best(monkeypatch, seed):
    layers, objective = made("llama")
    asked = candidates(layers.specs, 8)
    shuffled = [asked[i] for i in torch.randperm(8, generator=torch.Generator().manual_seed(seed))]
    run = counted(monkeypatch)
    objective.losses(shuffled, [0, 2])
    assert len(run) == 2 * least_work(layers, asked)
    # Equal targets of the next call are the same weights.
    objective.losses(shuffled, [1])
    assert len(run) == 3 * least_work(layers, asked)


def test_blocks_before_the_first_change_are_not_run_again(monkeypatch):
    layers, objective = made("llama", WINDOWS)
    base = {spec.name: Target(0, spec.numel // 2) for spec in layers.specs}
    last = layers.of_block(len(layers.blocks) - 1)
    asked = [{**base, spec.name: Target(0, spec.numel // 3)} for spec in last]
    run = counted(monkeypatch)
    objective.losses([base, *asked], [0])
    assert run.count(0) == 1
    assert run.count(len(layers.blocks) - 1) == len(asked) + 1


def test_closing_puts_the_dense_weights_back_to_the_bit():
    layers, objective = made("gpt2")
    before = {spec.name: layers.weight(spec.name) for spec in layers.specs}
    objective.losses(candidates(layers.specs), [0])
    assert any(not torch.equal(layers.weight(name), weight) for name, weight in before.items())
    objective.close()
    assert all(torch.equal(layers.weight(name), weight) for name, weight in before.items())


def test_a_candidate_that_breaks_the_model_is_named_by_its_chunk():
    layers = find_layers(tiny_model("llama"), allow_low_coverage=True)
    runner = BlockRunner(layers, [Batch(tiny_ids(2, TOKENS))])
    huge = {spec.name: layers.weight(spec.name) * 1e30 for spec in layers.specs}
    with pytest.raises(NumericalError, match="selection chunk 0"):
        ModelObjective(runner).losses_of([huge], [0])


def test_padding_is_refused():
    ids = tiny_ids(2, TOKENS)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    layers = find_layers(tiny_model("llama"), allow_low_coverage=True)
    with pytest.raises(UsageError, match="padding"):
        ModelObjective(BlockRunner(layers, [Batch(ids, mask)]))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_layers_that_are_not_named_are_dense(kind, monkeypatch):
    layers, objective = made(kind)
    model = objective.model
    first, last = layers.specs[0], layers.specs[-1]
    weight = {spec.name: 0.5 * model.dense(spec.name) for spec in (first, last)}
    asked = [{}, {last.name: weight[last.name]}, weight, {first.name: lambda: weight[first.name]}]
    run = counted(monkeypatch)
    losses = model.losses_of(asked, [0])
    # One and two share the first block, and the others differ there.
    assert len(run) == 4 * len(layers.blocks) - (len(layers.blocks) - 1)
    assert float(losses[0].abs().max()) < 1e-6
    everything = {spec.name: model.dense(spec.name) for spec in layers.specs}
    for replaced, found in zip(asked, losses, strict=True):
        whole = {**everything, **replaced}
        assert torch.equal(model.losses_of([whole], [0])[0], found)
    model.close()
    assert all(torch.equal(layers.weight(name), weight) for name, weight in everything.items())


def test_a_weight_is_made_once_for_all_chunks():
    layers = find_layers(tiny_model("llama"), allow_low_coverage=True)
    model = ModelObjective(BlockRunner(layers, [Batch(ids) for ids in tiny_ids(WINDOWS, TOKENS).split(2)]))
    asked: list[tuple[str, Target | Mask]] = []

    def materialise(spec: LayerSpec, kept: Target | Mask) -> torch.Tensor:
        asked.append((spec.name, kept))
        return shrunk(spec, model.dense(spec.name), kept)

    objective = TargetObjective(model, materialise)
    objective.losses(candidates(layers.specs), range(3))
    assert len(asked) == len(set(asked))


def test_the_next_call_puts_only_changed_weights_into_the_model(monkeypatch):
    layers, objective = made("llama", WINDOWS)
    base = candidates(layers.specs, 1)[0]
    objective.losses([base], [0])
    placed = []
    real = ModelLayers.place
    monkeypatch.setattr(ModelLayers, "place", lambda self, name, make: placed.append(name) or real(self, name, make))
    last = layers.specs[-1]
    objective.losses([base, {**base, last.name: Target(0, 1)}], [0])
    assert placed == [last.name]


def test_a_name_that_is_no_layer_is_refused():
    _, objective = made("llama")
    with pytest.raises(UnknownNameError, match="head"):
        objective.model.losses_of([{"head": torch.zeros(2, 2)}], [0])


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_gradient_is_that_of_the_loss_of_every_window(kind):
    layers, objective = made(kind)
    model = objective.model
    weights = {spec.name: 0.9 * model.dense(spec.name) for spec in layers.specs}
    *_, last = model.hidden_states(weights, 1)
    losses, gradient = model.kl_gradient(1, last)
    torch.testing.assert_close(losses, model.losses_of([weights], [1])[0], rtol=1e-4, atol=1e-8)
    assert gradient.shape == last.shape
    # Window by window, along a random direction: no window's gradient is in another's.
    step = torch.randn(last.shape, generator=torch.Generator().manual_seed(0)) * float(last.std())
    up, down = (model.kl_gradient(1, last + sign * 0.01 * step)[0] for sign in (1, -1))
    slopes = (gradient * step).flatten(1).double().sum(1)
    torch.testing.assert_close((up - down) / 0.02, slopes, rtol=0.02, atol=0.01 * float(slopes.abs().max()))
    # The dense model is a minimum of the loss.
    model.close()
    dense, flat = model.kl_gradient(1, model.hidden_states({}, 1)[-1])
    assert float(dense.abs().max()) < 1e-6
    assert float(flat.norm()) < 1e-3 * float(gradient.norm())


def test_hidden_states_are_those_of_the_model_that_holds_the_weights():
    layers, objective = made("llama")
    model = objective.model
    dense = model.hidden_states({}, 0)
    assert len(dense) == len(layers.blocks) + 1
    last = layers.of_block(len(layers.blocks) - 1)[0]
    changed = model.hidden_states({last.name: 0.5 * model.dense(last.name)}, 0)
    torch.testing.assert_close(changed[-2], dense[-2], rtol=1e-5, atol=1e-6)
    assert float((changed[-1] - dense[-1]).norm()) > 0.01 * float(dense[-1].norm())


def test_a_loss_that_is_not_finite_has_no_gradient():
    layers, objective = made("llama")
    huge = {spec.name: objective.model.dense(spec.name) * 1e30 for spec in layers.specs}
    with pytest.raises(NumericalError, match="chunk 1 is not finite"):
        objective.model.kl_gradient(1, objective.model.hidden_states(huge, 1)[-1])


def test_rough_losses_are_above_what_rounding_costs_the_dense_model(monkeypatch):
    for module in (precision, kl_to_dense):
        monkeypatch.setattr(module, "cpu_has_bfloat16", lambda: True)  # slower without, and the same numbers
    monkeypatch.setattr(precision, "ROUGH_FROM", 1)
    layers = find_layers(tiny_model("llama"), allow_low_coverage=True)
    runner = BlockRunner(layers, [Batch(ids) for ids in tiny_ids(WINDOWS, TOKENS).split(4)])
    exact, rough = ModelObjective(runner), ModelObjective(runner, rough=True)
    generator = torch.Generator().manual_seed(3)
    candidates = [{}]
    for size in (0.05, 0.2):
        noise = {spec.name: torch.randn(spec.d_out, spec.d_in, generator=generator) for spec in layers.specs}
        candidates.append({name: exact.dense(name) + size * exact.dense(name).std() * noise[name] for name in noise})
    true = exact.losses_of(candidates, range(2))
    exact.close()
    found = rough.losses_of(candidates, range(2))
    assert bool((found[0] == 0).all())
    torch.testing.assert_close(found[1:].mean(1), true[1:].mean(1), rtol=0.1, atol=0)
    # Rounding costs something, and it is none of the candidate's.
    assert not torch.equal(found[1:], true[1:])
    hidden = rough.hidden_states(candidates[2], 1)[-1]
    torch.testing.assert_close(rough.kl_gradient(1, hidden)[0], found[2, 4:])
    rough.close()
