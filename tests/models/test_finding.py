"""Layers, their kinds and their shared inputs are found by structure, and models without them are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from globalopt.errors import UnsupportedModelError
from globalopt.models.finding import find_layers
from tests.tiny_models import BLOCKS, KINDS, tiny_ids, tiny_model

LLAMA_KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FOUND = {
    "llama": LLAMA_KINDS,
    "qwen2": LLAMA_KINDS,
    "qwen3": LLAMA_KINDS,
    "mistral": LLAMA_KINDS,
    "gemma2": LLAMA_KINDS,
    "gpt2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "opt": ["k_proj", "v_proj", "q_proj", "out_proj", "fc1", "fc2"],
    "phi3": ["o_proj", "qkv_proj", "gate_up_proj", "down_proj"],
    "qwen3_moe": ["q_proj", "k_proj", "v_proj", "o_proj"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_has_its_linear_layers_in_model_order(kind: str) -> None:
    layers = find_layers(tiny_model(kind), allow_low_coverage=kind == "qwen3_moe")
    assert len(layers.blocks) == BLOCKS
    for block in range(BLOCKS):
        specs = layers.of_block(block)
        assert [spec.kind for spec in specs] == FOUND[kind]
        assert all(spec.name.startswith(f"{layers.blocks_path}.{block}.") for spec in specs)
    assert layers.specs == layers.of_block(0) + layers.of_block(1)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma2"])
def test_query_key_value_and_gate_up_share_a_site(kind: str) -> None:
    prefix = "model.layers.1"
    site = {spec.kind: spec.site for spec in find_layers(tiny_model(kind)).of_block(1)}
    attention, mlp = f"{prefix}.self_attn.q_proj", f"{prefix}.mlp.gate_proj"
    assert [site[k] for k in ("q_proj", "k_proj", "v_proj")] == [attention] * 3
    assert [site["gate_proj"], site["up_proj"]] == [mlp] * 2
    assert site["o_proj"] == f"{prefix}.self_attn.o_proj"
    assert site["down_proj"] == f"{prefix}.mlp.down_proj"


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "phi3"])
def test_layers_with_different_inputs_do_not_share_a_site(kind: str) -> None:
    specs = find_layers(tiny_model(kind)).specs
    assert [spec.site for spec in specs] == [spec.name for spec in specs]


def test_a_change_in_place_ends_a_site() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(32, 48)
            self.extra = nn.Linear(32, 48)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) + self.extra(x.add_(1.0))

    model = tiny_model("llama")
    model.get_submodule("model.layers.0.mlp").gate_proj = InPlace()
    site = {spec.name: spec.site for spec in find_layers(model).of_block(0)}
    assert site["model.layers.0.mlp.gate_proj.extra"] != site["model.layers.0.mlp.gate_proj.inner"]
    assert site["model.layers.0.mlp.up_proj"] == site["model.layers.0.mlp.gate_proj.extra"]


def test_layers_the_forward_pass_never_calls_have_sites_of_their_own() -> None:
    model = tiny_model("llama")
    block = model.get_submodule("model.layers.0")
    block.spare, block.other = nn.Linear(32, 8, bias=False), nn.Linear(32, 8, bias=False)
    spare, other = find_layers(model).of_block(0)[-2:]
    assert (spare.kind, spare.site, spare.d_out, spare.d_in) == ("spare", "model.layers.0.spare", 8, 32)
    assert other.site == "model.layers.0.other"


def test_finding_layers_leaves_no_hook_and_changes_no_output() -> None:
    model, ids = tiny_model("llama"), tiny_ids(1, 6)
    before = model(input_ids=ids).logits
    find_layers(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_model_without_blocks_is_refused() -> None:
    model = tiny_model("llama")
    model.config.num_hidden_layers = 5
    with pytest.raises(UnsupportedModelError, match="5 entries"):
        find_layers(model)


def test_blocks_without_linear_layers_are_refused() -> None:
    model = tiny_model("llama")
    model.model.layers = nn.ModuleList(nn.LayerNorm(32) for _ in range(BLOCKS))  # pyright: ignore[reportArgumentType]
    with pytest.raises(UnsupportedModelError, match="no linear layer"):
        find_layers(model)


@pytest.mark.parametrize("shared", ["weight", "module"])
def test_one_weight_under_two_names_is_refused(shared: str) -> None:
    model = tiny_model("llama")
    first, second = (model.get_submodule(f"model.layers.{i}.mlp.up_proj") for i in range(2))
    if shared == "weight":
        second.weight = first.weight
    else:
        model.get_submodule("model.layers.1.mlp").up_proj = first
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp\.up_proj and model\.layers\.1\.mlp\.up_proj"):
        find_layers(model)


def test_quantised_weights_are_refused() -> None:
    model = tiny_model("llama")
    packed = nn.Parameter(torch.zeros(512, 1, dtype=torch.uint8), requires_grad=False)
    model.get_submodule("model.layers.0.self_attn.q_proj").weight = packed
    with pytest.raises(UnsupportedModelError, match=r"q_proj.*uint8"):
        find_layers(model)


def test_the_largest_of_several_lists_is_the_decoder() -> None:
    model = tiny_model("llama")
    model.draft_heads = nn.ModuleList(nn.Linear(32, 4) for _ in range(BLOCKS))
    assert find_layers(model).blocks_path == "model.layers"
