"""Walking a model block by block gives what its own forward pass gives, and Grams of what its layers really see."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from globalopt.errors import CalibrationError, UnknownNameError, UnsupportedModelError
from globalopt.models.layers import ModelLayers, find_layers
from globalopt.models.walk import Batch, BlockRunner, BlockVisit, context_length, walk_blocks
from tests.tiny_models import BLOCKS, KINDS, VOCAB, tiny_ids, tiny_model

TOKENS = 12


def _layers(kind: str, attention: str | None = None) -> ModelLayers:
    model = tiny_model(kind)
    if attention is not None:
        model.set_attn_implementation(attention)
    return find_layers(model, allow_low_coverage=True)


def _padded() -> tuple[Tensor, Tensor]:
    """Two windows, one padded on the left and one on the right, and their mask."""
    ids = tiny_ids(2, TOKENS)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[1, 8:] = 0
    return ids, mask


def _through_blocks(runner: BlockRunner, i: int) -> Tensor:
    hidden = runner.first(i)
    for block in range(len(runner.layers.blocks)):
        hidden = runner.run(block, i, hidden)
    return hidden


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


# The soft cap of Gemma 2 is not available under sdpa.
SDPA_KINDS = [kind for kind in KINDS if kind != "gemma2"]
ATTENTIONS = [*((kind, "eager") for kind in KINDS), *((kind, "sdpa") for kind in SDPA_KINDS)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("kind", "attention"), ATTENTIONS)
def test_the_blocks_one_by_one_are_the_model(kind: str, attention: str, padded: bool) -> None:
    layers = _layers(kind, attention)
    ids, mask = _padded()
    given = mask if padded else None
    runner = BlockRunner(layers, [Batch(tiny_ids(3, 5, seed=1)), Batch(ids, given)])
    with torch.no_grad():
        logits = runner.logits(1, _through_blocks(runner, 1))
        expected = layers.model(input_ids=ids, attention_mask=given).logits
    real = mask.bool() if padded else torch.ones_like(mask).bool()
    torch.testing.assert_close(logits[real], expected[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", SDPA_KINDS)
def test_eager_and_sdpa_give_the_same_grams(kind: str) -> None:
    batch = Batch(*_padded())
    eager, sdpa = (
        [visit.grams() for visit in walk_blocks(BlockRunner(_layers(kind, attention), [batch]))]
        for attention in ("eager", "sdpa")
    )
    for one, other in zip(eager, sdpa, strict=True):
        assert one.keys() == other.keys()
        for site in one:
            torch.testing.assert_close(one[site].matrix, other[site].matrix, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_grams_are_those_of_a_plain_forward_pass(kind: str) -> None:
    layers = _layers(kind)
    batches = [Batch(tiny_ids(2, TOKENS, seed=1)), Batch(*_padded())]
    inputs = _layer_inputs(layers, batches)
    grams = {site: gram for visit in walk_blocks(BlockRunner(layers, batches)) for site, gram in visit.grams().items()}
    assert set(grams) == {spec.site for spec in layers.specs}
    for spec in layers.specs:
        x, gram = inputs[spec.name].double(), grams[spec.site]
        assert gram.tokens == len(x) == sum(batch.tokens for batch in batches)
        expected = x.mT @ x / len(x)
        scale = float(expected.abs().max())
        torch.testing.assert_close(gram.matrix.double(), expected, atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_count(kind: str) -> None:
    layers, ids = _layers(kind), tiny_ids(1, 9)
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
    layers, batch = _layers(kind), Batch(*_padded())
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
    layers = _layers("llama")
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
    layers = _layers("llama")
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
    layers = _layers("llama")
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


def test_a_forward_that_was_already_exchanged_is_put_back() -> None:
    layers = _layers("llama")
    block = layers.blocks[0]
    own = block.forward
    replacement = lambda *args, **kwargs: own(*args, **kwargs)  # noqa: E731
    block.forward = replacement
    BlockRunner(layers, [Batch(tiny_ids(1, 4))]).first(0)
    assert block.forward is replacement


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_through_tail_and_block_only_where_they_are_enabled(kind: str) -> None:
    layers = _layers(kind)
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


class _OlderBlock(nn.Module):
    """Takes its hidden states by name, answers with a tuple, and uses a cache if it gets one."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.caches: list[object] = []

    def forward(self, hidden_states: Tensor, past_key_values: DynamicCache | None = None) -> tuple[Tensor, None]:
        self.caches.append(past_key_values)
        return hidden_states + self.proj(hidden_states).relu(), None


class _OlderModel(PreTrainedModel):
    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(VOCAB, 8)
        self.layers = nn.ModuleList(_OlderBlock() for _ in range(BLOCKS))
        self.head = nn.Linear(8, VOCAB)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = True
    ) -> CausalLMOutput:
        hidden, cache = self.embed(input_ids), DynamicCache()
        for block in self.layers:
            hidden = block(hidden_states=hidden, past_key_values=cache)[0]
        return CausalLMOutput(logits=self.head(hidden))


def test_blocks_that_take_names_and_caches_and_return_tuples_are_walked() -> None:
    model = _OlderModel(LlamaConfig(num_hidden_layers=BLOCKS, hidden_size=8, num_attention_heads=2)).eval()
    layers = find_layers(model)
    ids = tiny_ids(2, 5)
    runner = BlockRunner(layers, [Batch(ids)])
    caches = layers.blocks[0].caches
    assert isinstance(caches, list)
    caches.clear()
    with torch.no_grad():
        hidden = _through_blocks(runner, 0)
        assert caches == [None]
        torch.testing.assert_close(runner.logits(0, hidden), model(ids).logits)


@pytest.mark.parametrize("what", ["order", "between", "skipped"])
def test_a_model_that_does_not_chain_its_blocks_is_refused(what: str) -> None:
    layers = _layers("llama")
    if what == "order":
        layers = ModelLayers(layers.model, nn.ModuleList(reversed(layers.blocks)), "model.layers", (), layers.coverage)
    elif what == "between":
        layers.blocks[1].register_forward_pre_hook(lambda module, args: (args[0] + 1, *args[1:]))
    else:
        spare = nn.ModuleList([nn.Linear(2, 2)])
        layers = ModelLayers(layers.model, spare, "model.spare", (), layers.coverage)
    with pytest.raises(UnsupportedModelError, match=r"straight to the next|never calls"):
        BlockRunner(layers, [Batch(tiny_ids(1, 4))])


def test_inputs_that_are_not_finite_are_named() -> None:
    layers = _layers("llama")
    layers.model.get_parameter("model.layers.0.mlp.down_proj.weight")[0, 0] = float("inf")
    walk = walk_blocks(BlockRunner(layers, [Batch(tiny_ids(1, 4))]))
    with pytest.raises(CalibrationError, match=r"Block model\.layers\.0"):
        next(walk).grams()

    layers = _layers("llama")
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


def test_padding_that_cannot_be_told_apart_is_refused() -> None:
    batch = Batch(*_padded())
    with pytest.raises(CalibrationError, match="without padding"):
        batch.select(torch.zeros(5, 4))
    assert len(Batch(batch.input_ids).select(torch.zeros(5, 4))) == 5


def test_a_batch_is_checked() -> None:
    with pytest.raises(CalibrationError, match="int64"):
        Batch(torch.zeros(2, 3))
    with pytest.raises(CalibrationError, match="does not match"):
        Batch(tiny_ids(1, 4), torch.ones(1, 3))
    with pytest.raises(CalibrationError, match="leaves no token"):
        Batch(tiny_ids(1, 4), torch.zeros(1, 4))


def test_text_that_does_not_fit_the_model_is_refused() -> None:
    layers = _layers("gpt2")
    with pytest.raises(CalibrationError, match="no batches"):
        BlockRunner(layers, [])
    with pytest.raises(CalibrationError, match=f"Token id {VOCAB} is outside"):
        BlockRunner(layers, [Batch(torch.full((1, 4), VOCAB))])
    with pytest.raises(CalibrationError, match="129 tokens is longer than the model's 128"):
        BlockRunner(layers, [Batch(tiny_ids(1, 129))])


def test_equal_masks_and_positions_are_kept_once() -> None:
    layers = _layers("llama")
    runner = BlockRunner(layers, [Batch(tiny_ids(1, 6, seed=seed)) for seed in range(3)])
    tables = {id(call.kwargs["position_embeddings"][0]) for calls in runner._calls for call in calls}
    assert len(tables) == 1


def made(**fields: Any) -> transformers.PreTrainedConfig:
    """A configuration of no class in particular."""
    return transformers.PreTrainedConfig(**fields)


@pytest.mark.parametrize(
    ("config", "context"),
    [
        (transformers.LlamaConfig(max_position_embeddings=48), 48),
        (transformers.GPT2Config(n_positions=32), 32),
        (transformers.MptConfig(max_seq_len=64), 64),
        (made(n_ctx=40), 40),
        (made(seq_length=40, max_position_embeddings=80), 80),
        (made(max_sequence_length=24), 24),
        (made(max_position_embeddings=-1), None),
        (
            made(max_position_embeddings=9, text_config=transformers.MptConfig(max_seq_len=7)),
            7,
        ),
        (made(llm_config={"max_position_embeddings": 20}), 20),
        (transformers.Gemma3Config(text_config={"max_position_embeddings": 96}), 96),
        (made(), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_context_is_found_under_the_names_that_models_use(config, context):
    assert context_length(config) == context
