"""Walking a model block by block gives what its own forward pass gives, and Grams of what its layers really see."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from globalopt.errors import CalibrationError, UnknownNameError
from globalopt.models.batch import Batch
from globalopt.models.block_runner import BlockRunner
from globalopt.models.finding import find_layers
from globalopt.models.layers import ModelLayers
from globalopt.models.walk import SAMPLED, BlockVisit, _SampledMoment, visit_blocks, walk_blocks
from tests.tiny_models import BLOCKS, KINDS, SDPA_KINDS, padded_ids, tiny_ids, tiny_layers, tiny_model


def _layer_inputs(layers: ModelLayers, batches: list[Batch]) -> dict[str, Tensor]:
    """Inputs (tokens, d) of every layer, collected by hooks on plain forward passes; padding left out."""
    seen: defaultdict[str, list[Tensor]] = defaultdict(list)

    def hook(name: str, mask: Tensor) -> Callable[..., None]:
        return lambda module, args: seen[name].append(args[0].reshape(-1, args[0].shape[-1])[mask])

    for batch in batches:
        mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
        with ExitStack() as stack, torch.no_grad():
            for spec in layers.specs:
                handle = layers.module(spec.name).register_forward_pre_hook(hook(spec.name, mask.bool().flatten()))
                stack.callback(handle.remove)
            layers.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return {name: torch.cat(rows) for name, rows in seen.items()}


@pytest.mark.parametrize("kind", SDPA_KINDS)
def test_eager_and_sdpa_give_the_same_grams(kind: str) -> None:
    batch = Batch(*padded_ids())
    eager, sdpa = (
        [visit.grams() for visit in walk_blocks(BlockRunner(tiny_layers(kind, attention), [batch]))]
        for attention in ("eager", "sdpa")
    )
    for one, other in zip(eager, sdpa, strict=True):
        assert one.keys() == other.keys()
        for site in one:
            torch.testing.assert_close(one[site].matrix, other[site].matrix, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_grams_are_those_of_a_plain_forward_pass(kind: str) -> None:
    layers = tiny_layers(kind)
    batches = [Batch(tiny_ids(2, 12, seed=1)), Batch(*padded_ids())]
    inputs = _layer_inputs(layers, batches)
    grams = {site: gram for visit in walk_blocks(BlockRunner(layers, batches)) for site, gram in visit.grams().items()}
    assert set(grams) == {spec.site for spec in layers.specs}
    for spec in layers.specs:
        x, gram = inputs[spec.name].double(), grams[spec.site]
        assert gram.tokens == len(x) == sum(batch.tokens for batch in batches)
        expected = x.mT @ x / len(x)
        scale = float(expected.abs().max())
        torch.testing.assert_close(gram.matrix.double(), expected, atol=1e-5 * scale, rtol=0)


def test_a_sampled_gram_has_the_diagonal_of_all_tokens_and_the_correlations_of_some() -> None:
    layers = tiny_layers("llama")
    batches = [Batch(tiny_ids(2, 12, seed=seed)) for seed in range(SAMPLED + 2)]
    inputs = _layer_inputs(layers, batches)
    read = _layer_inputs(layers, batches[::SAMPLED])
    for visit in walk_blocks(BlockRunner(layers, batches)):
        for site, gram in visit.grams(exact=False).items():
            x, some = (rows[site].double() for rows in (inputs, read))
            assert gram.tokens == len(x)
            torch.testing.assert_close(gram.diagonal.double(), x.square().mean(0), rtol=1e-5, atol=0)
            expected = some.mT @ some
            scale = expected.diagonal().rsqrt()
            own = gram.diagonal.double().rsqrt()
            found = gram.matrix.double() * own[:, None] * own
            torch.testing.assert_close(found, expected * scale[:, None] * scale, atol=1e-4, rtol=0)
            assert float(torch.linalg.eigvalsh(gram.matrix.double()).min()) > -1e-5 * float(gram.diagonal.max())


def test_a_sampled_gram_of_a_site_that_no_sampled_batch_reaches_is_its_diagonal() -> None:
    moment = _SampledMoment("down")
    moment.add(torch.tensor([[3.0, 1.0], [1.0, 1.0]]), batch=1)
    gram = moment.gram()
    assert gram is not None
    assert gram.matrix.tolist() == [[5.0, 0.0], [0.0, 1.0]]
    assert gram.tokens == 2


def test_blocks_can_be_visited_without_being_run() -> None:
    layers = tiny_layers("llama")
    runner = BlockRunner(layers, [Batch(tiny_ids(1, 4))])
    for block in layers.blocks:
        block.register_forward_hook(lambda *_: pytest.fail("a block was run"))
    visits = list(visit_blocks(runner))
    assert [spec for visit in visits for spec in visit.specs] == list(layers.specs)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_count(kind: str) -> None:
    layers, ids = tiny_layers(kind), tiny_ids(1, 9)
    padded = torch.cat([ids, torch.zeros(1, 3, dtype=torch.long)], dim=1)
    mask = torch.tensor([[1] * 9 + [0] * 3])
    plain, other = (
        [visit.grams() for visit in walk_blocks(BlockRunner(layers, [batch]))]
        for batch in (Batch(ids), Batch(padded, mask))
    )
    for one, two in zip(plain, other, strict=True):
        for site in one:
            assert one[site].tokens == two[site].tokens == 9
            torch.testing.assert_close(one[site].matrix, two[site].matrix, atol=1e-4, rtol=1e-4)


def _zero_one_layer(layers: ModelLayers, visit: BlockVisit) -> None:
    spec = visit.specs[-1]
    layers.set_weight(spec.name, torch.zeros(spec.d_out, spec.d_in))


@pytest.mark.parametrize("kind", KINDS)
def test_later_blocks_see_a_changed_block_only_as_it_now_is(kind: str) -> None:
    layers, batch = tiny_layers(kind), Batch(*padded_ids())
    collected = {}
    for visit in walk_blocks(BlockRunner(layers, [batch])):
        collected.update(visit.grams())
        if visit.index == 0:
            dense = visit.outputs()[0]
            _zero_one_layer(layers, visit)
            visit.replaced()
        else:
            assert not torch.allclose(visit.inputs[0], dense)
    inputs = _layer_inputs(layers, [batch])
    for spec in layers.of_block(1):
        x = inputs[spec.name]
        torch.testing.assert_close(collected[spec.site].matrix, x.mT @ x / len(x), atol=1e-3, rtol=1e-4)


def test_an_unchanged_block_is_run_once_and_a_changed_one_twice() -> None:
    layers = tiny_layers("llama")
    runner = BlockRunner(layers, [Batch(tiny_ids(1, 4)), Batch(tiny_ids(1, 5))])
    calls: list[int] = []
    for index, block in enumerate(layers.blocks):
        block.register_forward_hook(lambda *_, index=index: calls.append(index))
    for visit in walk_blocks(runner):
        visit.grams()
        visit.outputs()
    assert calls == [0, 0, 1, 1]
    calls.clear()
    for visit in walk_blocks(runner):
        visit.grams()
        visit.replaced()
    assert calls == [0, 0, 0, 0, 1, 1]


def test_some_sites_can_be_asked_for_and_unknown_ones_are_refused() -> None:
    layers = tiny_layers("llama")
    walk = walk_blocks(BlockRunner(layers, [Batch(tiny_ids(1, 4))]))
    visit = next(walk)
    down = "model.layers.0.mlp.down_proj"
    some, every = visit.grams([down]), visit.grams()
    assert list(some) == [down]
    assert torch.equal(some[down].matrix, every[down].matrix)
    with pytest.raises(UnknownNameError, match="site"):
        visit.grams(["model.layers.1.mlp.down_proj"])


def _state(model: PreTrainedModel) -> tuple[Any, ...]:
    hooks = [(m._forward_hooks, m._forward_pre_hooks, m.__dict__.get("forward")) for m in model.modules()]
    return tuple(map(str, hooks)), model(input_ids=tiny_ids(1, 6)).logits.tolist()


def _fail_during(walk: Iterator[BlockVisit]) -> None:
    for visit in walk:
        visit.grams()
        raise KeyError


@pytest.mark.parametrize("end", ["close", "raise in the consumer", "raise in a block"])
def test_a_walk_that_ends_early_leaves_the_model_as_it_was(end: str) -> None:
    layers = tiny_layers("llama")
    before = _state(layers.model)
    walk = walk_blocks(BlockRunner(layers, [Batch(tiny_ids(2, 6))]), device="cpu")
    visit = next(walk)
    if end == "raise in a block":
        fail = layers.module("model.layers.0.mlp.down_proj").register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            visit.grams()
        fail.remove()
    elif end == "raise in the consumer":
        with pytest.raises(KeyError):
            _fail_during(walk)
    else:
        visit.grams()
        walk.close()
    assert _state(layers.model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_through_tail_and_block_only_where_they_are_enabled(kind: str) -> None:
    layers = tiny_layers(kind)
    runner = BlockRunner(layers, [Batch(tiny_ids(1, 6))])
    hidden = runner.first(0).requires_grad_()
    runner.logits(0, runner.run(BLOCKS - 1, 0, hidden)).square().sum().backward()
    assert hidden.grad is not None
    assert float(hidden.grad.abs().max()) > 0
    layers.model.requires_grad_(True)
    visit = next(walk_blocks(runner))
    visit.grams()
    assert torch.is_grad_enabled()
    assert not any(x.requires_grad for x in (*visit.inputs, *visit.outputs()))


def test_inputs_that_are_not_finite_are_named() -> None:
    layers = tiny_layers("llama")
    layers.model.get_parameter("model.layers.0.mlp.down_proj.weight")[0, 0] = float("inf")
    walk = walk_blocks(BlockRunner(layers, [Batch(tiny_ids(1, 4))]))
    with pytest.raises(CalibrationError, match=r"Block model\.layers\.0"):
        next(walk).grams()

    layers = tiny_layers("llama")
    layers.model.get_parameter("model.layers.0.input_layernorm.weight")[0] = float("nan")
    layers.blocks[0].get_submodule("self_attn.o_proj").register_forward_hook(lambda *args: torch.zeros_like(args[2]))
    visit = next(walk_blocks(BlockRunner(layers, [Batch(tiny_ids(1, 4))])))
    with pytest.raises(CalibrationError, match=r"layer model\.layers\.0\.self_attn\.q_proj are not finite"):
        visit.grams()


def test_a_layer_that_no_token_reaches_has_the_inputs_that_a_norm_leaves() -> None:
    model = tiny_model("llama")
    model.get_submodule("model.layers.0").spare = nn.Linear(32, 8)
    visit = next(walk_blocks(BlockRunner(find_layers(model), [Batch(tiny_ids(1, 4))])))
    found = visit.grams()["model.layers.0.spare"]
    assert found.tokens == 0
    assert torch.equal(found.matrix, torch.eye(32))
