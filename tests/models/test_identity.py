"""Layers are told by their shapes, weights by their values, and a model by all that it computes with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from globalopt.models.finding import find_layers
from globalopt.models.identity import model_fingerprint, model_sha256, tokenizer_sha256, weights_sha256
from globalopt.models.loading import load_model
from tests.tiny_models import KINDS, save_tiny, tiny_model, tiny_tokenizer


def test_the_fingerprint_is_of_the_shapes_and_never_of_weights_or_place(tmp_path: Path) -> None:
    here = find_layers(load_model(save_tiny(tmp_path / "a", seed=0), device="cpu").model)
    there = find_layers(load_model(save_tiny(tmp_path / "b", seed=1), device="cpu").model)
    assert model_fingerprint(here) == model_fingerprint(there)
    assert weights_sha256(here) != weights_sha256(there)
    fingerprints = {model_fingerprint(find_layers(tiny_model(k), allow_low_coverage=True)) for k in KINDS}
    assert len(fingerprints) == len(KINDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_hash_of_the_weights_sees_one_changed_value(dtype: torch.dtype, tmp_path: Path) -> None:
    layers = find_layers(load_model(save_tiny(tmp_path, dtype=dtype), dtype=str(dtype)[6:], device="cpu").model)
    before = weights_sha256(layers)
    weight = layers.module(layers.specs[-1].name).weight
    value = weight[0, 0].clone()
    weight[0, 0] = value + 1
    assert weights_sha256(layers) != before
    weight[0, 0] = value
    assert weights_sha256(layers) == before


def digest_of(folder: Path, **options: Any) -> str:
    loaded = load_model(folder, device="cpu", **options)
    return model_sha256(find_layers(loaded.model, allow_low_coverage=True), loaded.tokenizer)


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    """A model with biases, with norms inside of attention and without tied weights."""
    return save_tiny(tmp_path / "qwen", "qwen2")


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "qwen3", "opt"])
def test_every_tensor_of_a_model_decides_its_hash(tmp_path, kind):
    loaded = load_model(save_tiny(tmp_path / kind, kind), device="cpu")
    layers = find_layers(loaded.model, allow_low_coverage=True)
    before = model_sha256(layers, loaded.tokenizer)
    tensors = {**dict(loaded.model.named_parameters()), **dict(loaded.model.named_buffers())}
    assert len(tensors) > 20
    tokens = tokenizer_sha256(loaded.tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("globalopt.models.identity.tokenizer_sha256", lambda tokenizer: tokens)
        for name, tensor in tensors.items():
            flat = tensor.view(-1)
            held = flat[-1].clone()
            flat[-1] = held + 1 if tensor.is_floating_point() else 1 - held.to(tensor.dtype)
            assert model_sha256(layers, loaded.tokenizer) != before, name
            flat[-1] = held
        assert model_sha256(layers, loaded.tokenizer) == before


def test_a_persistent_buffer_decides_the_hash(qwen):
    loaded = load_model(qwen, device="cpu")
    layers = find_layers(loaded.model)
    layers.blocks[1].register_buffer("offset", torch.zeros(3))
    before = model_sha256(layers, loaded.tokenizer)
    layers.blocks[1].get_buffer("offset")[1] = 1
    assert model_sha256(layers, loaded.tokenizer) != before


CONFIG: dict[str, Any] = {
    "rms_norm_eps": 1e-3,
    "hidden_act": "gelu",
    "use_sliding_window": True,
    "attention_dropout": 0.5,
    "max_position_embeddings": 64,
    "bos_token_id": 5,
    "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
}


@pytest.mark.parametrize("field", CONFIG)
def test_the_configuration_decides_the_hash(qwen, field):
    before = digest_of(qwen)
    config = json.loads((qwen / "config.json").read_text())
    assert config.get(field) != CONFIG[field]
    (qwen / "config.json").write_text(json.dumps({**config, field: CONFIG[field]}))
    assert digest_of(qwen) != before


def test_who_wrote_a_configuration_does_not(qwen):
    before = digest_of(qwen)
    config = json.loads((qwen / "config.json").read_text())
    (qwen / "config.json").write_text(json.dumps({**config, "transformers_version": "0", "_name_or_path": "x"}))
    assert digest_of(qwen) == before


def test_every_entry_of_a_tokenizer_decides_the_hash(qwen):
    before = digest_of(qwen)
    path = qwen / "tokenizer.json"
    whole = path.read_text()
    edited = json.loads(whole)
    entries = edited["model"]["vocab"]
    entries["a"], entries["b"] = entries["b"], entries["a"]
    path.write_text(json.dumps(edited))
    assert digest_of(qwen) != before
    path.write_text(whole)
    assert digest_of(qwen) == before
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "</s>"
    tokenizer.save_pretrained(qwen)
    assert digest_of(qwen) != before


def test_the_place_of_a_model_does_not_decide_its_hash(qwen, tmp_path, monkeypatch):
    before = digest_of(qwen)
    assert digest_of(shutil.copytree(qwen, tmp_path / "copied")) == before
    assert digest_of(qwen.rename(tmp_path / "moved")) == before
    monkeypatch.chdir(tmp_path)
    assert digest_of(Path("moved")) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_lazily_loaded_model_has_the_hash_of_the_whole(tmp_path, kind):
    folder = save_tiny(tmp_path / kind, kind, dtype=torch.bfloat16)
    for dtype in ("float32", "bfloat16"):
        assert digest_of(folder, dtype=dtype, lazily=True) == digest_of(folder, dtype=dtype, lazily=False)
    # In another type it computes other numbers.
    assert digest_of(folder, dtype="float32") != digest_of(folder, dtype="bfloat16")
