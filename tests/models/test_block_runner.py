"""The decoder blocks run one at a time are the model, and models whose blocks cannot be are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from globalopt.errors import CalibrationError, UnsupportedModelError
from globalopt.models.batch import Batch
from globalopt.models.block_runner import BlockRunner
from globalopt.models.finding import find_layers
from globalopt.models.layers import ModelLayers
from tests.tiny_models import BLOCKS, KINDS, SDPA_KINDS, VOCAB, padded_ids, tiny_ids, tiny_layers


def _through_blocks(runner: BlockRunner, i: int) -> Tensor:
    hidden = runner.first(i)
    for block in range(len(runner.layers.blocks)):
        hidden = runner.run(block, i, hidden)
    return hidden


ATTENTIONS = [*((kind, "eager") for kind in KINDS), *((kind, "sdpa") for kind in SDPA_KINDS)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("kind", "attention"), ATTENTIONS)
def test_the_blocks_one_by_one_are_the_model(kind: str, attention: str, padded: bool) -> None:
    layers = tiny_layers(kind, attention)
    ids, mask = padded_ids()
    given = mask if padded else None
    runner = BlockRunner(layers, [Batch(tiny_ids(3, 5, seed=1)), Batch(ids, given)])
    with torch.no_grad():
        logits = runner.logits(1, _through_blocks(runner, 1))
        expected = layers.model(input_ids=ids, attention_mask=given).logits
    real = mask.bool() if padded else torch.ones_like(mask).bool()
    torch.testing.assert_close(logits[real], expected[real], atol=1e-5, rtol=1e-5)


def test_a_forward_that_was_already_exchanged_is_put_back() -> None:
    layers = tiny_layers("llama")
    block = layers.blocks[0]
    own = block.forward
    replacement = lambda *args, **kwargs: own(*args, **kwargs)  # noqa: E731
    block.forward = replacement
    BlockRunner(layers, [Batch(tiny_ids(1, 4))]).first(0)
    assert block.forward is replacement


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
    layers = tiny_layers("llama")
    if what == "order":
        layers = ModelLayers(layers.model, nn.ModuleList(reversed(layers.blocks)), "model.layers", (), layers.coverage)
    elif what == "between":
        layers.blocks[1].register_forward_pre_hook(lambda module, args: (args[0] + 1, *args[1:]))
    else:
        spare = nn.ModuleList([nn.Linear(2, 2)])
        layers = ModelLayers(layers.model, spare, "model.spare", (), layers.coverage)
    with pytest.raises(UnsupportedModelError, match=r"straight to the next|never calls"):
        BlockRunner(layers, [Batch(tiny_ids(1, 4))])


def test_text_that_does_not_fit_the_model_is_refused() -> None:
    layers = tiny_layers("gpt2")
    with pytest.raises(CalibrationError, match="no batches"):
        BlockRunner(layers, [])
    with pytest.raises(CalibrationError, match=f"Token id {VOCAB} is outside"):
        BlockRunner(layers, [Batch(torch.full((1, 4), VOCAB))])
    with pytest.raises(CalibrationError, match="129 tokens is longer than the model's 128"):
        BlockRunner(layers, [Batch(tiny_ids(1, 129))])


def test_equal_masks_and_positions_are_kept_once() -> None:
    layers = tiny_layers("llama")
    runner = BlockRunner(layers, [Batch(tiny_ids(1, 6, seed=seed)) for seed in range(3)])
    tables = {id(call.kwargs["position_embeddings"][0]) for calls in runner._calls for call in calls}
    assert len(tables) == 1
