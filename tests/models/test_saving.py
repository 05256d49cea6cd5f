"""A saved model is its checkpoint again, but for the layers that were replaced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from globalopt.models import saving
from globalopt.models.finding import find_layers
from globalopt.models.loading import load_model
from globalopt.models.origin import complete_config, origin_of
from globalopt.models.saving import save_dense
from tests.tiny_models import KINDS, save_tiny, tiny_model, tiny_tokenizer


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: x for path in sorted(folder.glob("*.safetensors")) for name, x in load_file(path).items()}


def edit(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; None removes one."""
    record = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in record.items() if value is not None}))


def saved_again(source: Path, out: Path, lazily: bool = False, dtype: str = "auto", replaced: str = "") -> Path:
    """Load a model, replace a layer of it, and save it."""
    loaded = load_model(source, device="cpu", dtype=dtype, lazily=lazily)
    if replaced:
        layers = find_layers(loaded.model, allow_low_coverage=True)
        layers.set_weight(replaced, torch.full_like(layers.weight(replaced), 1.5))
    save_dense(loaded.model, loaded.tokenizer, out, loaded.checkpoint_dtype, origin_of(source))
    return out


def equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_that_were_not_replaced_keep_their_bytes_and_types(tmp_path: Path, lazily: bool, dtype: str) -> None:
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    before = tensors_of(source)
    norm, layer = "model.layers.1.input_layernorm.weight", "model.layers.0.mlp.up_proj"
    # Not a number of bfloat16; and one tensor that the model does not use.
    before[norm] = before[norm].float() + 1e-4
    before["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.rand(3)
    save_file(before, source / "model.safetensors", metadata={"format": "pt"})
    after = tensors_of(saved_again(source, tmp_path / "saved", lazily, dtype, replaced=layer))
    assert after.keys() == before.keys()
    assert [name for name in before if not equal(before[name], after[name])] == [f"{layer}.weight"]
    assert after[f"{layer}.weight"].dtype == torch.bfloat16
    assert bool((after[f"{layer}.weight"] == 1.5).all())


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_every_naming_come_back_to_the_bit(tmp_path: Path, kind: str) -> None:
    source = save_tiny(tmp_path / "source", kind, dtype=torch.bfloat16)
    before, after = tensors_of(source), tensors_of(saved_again(source, tmp_path / "saved"))
    assert after.keys() == before.keys()
    assert all(equal(before[name], after[name]) for name in before)


def test_a_changed_tensor_keeps_the_type_it_was_stored_in(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    before = tensors_of(source)
    before["model.norm.weight"] = before["model.norm.weight"].float()
    save_file(before, source / "model.safetensors", metadata={"format": "pt"})
    loaded = load_model(source, device="cpu")
    loaded.model.get_parameter("model.norm.weight").add_(1e-5)
    save_dense(loaded.model, loaded.tokenizer, tmp_path / "saved", loaded.checkpoint_dtype, source)
    found = tensors_of(tmp_path / "saved")["model.norm.weight"]
    assert equal(found, loaded.model.get_parameter("model.norm.weight"))


def test_a_checkpoint_of_the_base_model_alone_keeps_its_names(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "gpt2")
    before = {name.removeprefix("transformer."): x for name, x in tensors_of(source).items()}
    save_file(before, source / "model.safetensors", metadata={"format": "pt"})
    after = tensors_of(saved_again(source, tmp_path / "saved"))
    assert after.keys() == before.keys()
    assert all(equal(before[name], after[name]) for name in before)


def older(source: Path) -> None:
    """Spell the config and the tokenizer of a model as transformers 4 does."""
    edit(
        source / "config.json",
        rope_parameters=None,
        dtype=None,
        rope_theta=5e5,
        rope_scaling={"type": "linear", "factor": 2.0},
        torch_dtype="float32",
        use_sliding_window=False,
        transformers_version="4.46.0",
    )
    edit(source / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", backend=None, own="kept")


def test_a_folder_of_transformers_4_keeps_its_spelling(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    older(source)
    out = saved_again(source, tmp_path / "saved")
    config = json.loads((out / "config.json").read_text())
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"] == {"type": "linear", "factor": 2.0}
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert config["use_sliding_window"] is False
    assert (out / "tokenizer_config.json").read_bytes() == (source / "tokenizer_config.json").read_bytes()
    before, after = AutoConfig.from_pretrained(source), AutoConfig.from_pretrained(out)
    assert before.rope_parameters == after.rope_parameters


def test_a_model_in_memory_is_saved_in_both_spellings(tmp_path: Path) -> None:
    save_dense(tiny_model("llama"), tiny_tokenizer(), tmp_path / "saved", torch.bfloat16)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    tokenizer = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] != "TokenizersBackend"
    AutoTokenizer.from_pretrained(tmp_path / "saved")


def test_a_model_in_memory_keeps_in_float32_what_its_class_says(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model._keep_in_fp32_modules_strict = {"norm"}
    save_dense(model, tiny_tokenizer(), tmp_path / "saved", torch.bfloat16)
    found = tensors_of(tmp_path / "saved")
    assert [name for name, x in found.items() if x.dtype != torch.bfloat16] == ["model.norm.weight"]
    assert equal(found["model.norm.weight"], model.get_parameter("model.norm.weight"))


def test_a_field_that_would_change_the_model_is_not_taken_from_its_origin(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"rope_theta": 1.0, "rope_scaling": {"factor": 2.0, "type": "linear"}})
    )
    config = tiny_model("llama").config
    written = json.loads(config.to_json_string())
    made = complete_config(written, tmp_path, type(config))
    assert type(config).from_dict(dict(made)).rope_parameters == config.rope_parameters


def test_files_beside_the_weights_come_along(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    files = {
        "preprocessor_config.json": '{"size": 28}',
        "processor_config.json": '{"image_seq_length": 4}',
        "chat_template.jinja": "{{ messages }}",
        "generation_config.json": '{"temperature": 0.6, "do_sample": true}',
        "LICENSE": "free",
    }
    for name, content in files.items():
        (source / name).write_text(content)
    left = ("README.md", "notes.txt", "trainer_state.json", "pytorch_model.bin.index.json", "optimizer.pt")
    for name in left:
        (source / name).write_text("{}")
    out = saved_again(source, tmp_path / "saved")
    assert {name: (out / name).read_text() for name in files} == files
    assert not [name for name in left if (out / name).exists()]


def test_a_tokenizer_that_changed_in_memory_is_saved_as_it_is(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    loaded = load_model(source, device="cpu")
    loaded.tokenizer.add_tokens(["<new>"])
    save_dense(loaded.model, loaded.tokenizer, tmp_path / "saved", torch.float32, source)
    assert "<new>" in AutoTokenizer.from_pretrained(tmp_path / "saved").get_vocab()


def test_a_name_that_is_no_folder_and_no_hub_id_has_no_origin() -> None:
    assert origin_of("x" * 300) is None
    assert origin_of("no model/ at all") is None


@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (7, 3), (5, 2, 3)])
def test_tensors_are_compared_in_parts_as_in_one(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "_COMPARED_AT_ONCE", 6)
    stored = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert saving._equal_as(torch.bfloat16, stored, stored.float())
    if stored.numel():
        changed = stored.float()
        changed.view(-1)[-1] += 1e-6
        assert not saving._equal_as(torch.bfloat16, stored, changed)
    wide = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert saving._equal_as(torch.bfloat16, wide, wide.bfloat16().float())
