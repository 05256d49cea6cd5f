"""Checkpoints that would be read wrongly are refused in one line, whether they are loaded whole or lazily."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from globalopt.errors import ArtefactError, GlobalOptError, UnsupportedModelError
from globalopt.models import loading
from globalopt.models.checkpoint import INDEX, SINGLE
from globalopt.models.decoder import decoder_blocks
from globalopt.models.finding import find_layers
from globalopt.models.loading import load_model
from globalopt.models.quantised import find_quantised
from globalopt.models.refusals import DEQUANTISED
from globalopt.models.structure import load_structure
from tests.command import WINDOWS, done
from tests.tiny_models import KINDS, save_tiny, tiny_model, tiny_tokenizer

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / SINGLE, metadata={"format": "pt"})


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def refused(folder: Path, *words: str, **options: Any) -> None:
    """Check that the folder is refused in one line with all of `words`, whole and lazily."""
    for lazily in (False, True):
        with pytest.raises(GlobalOptError) as caught:
            load_model(folder, device="cpu", lazily=lazily, **options)
        message = str(caught.value)
        assert "\n" not in message
        assert len(message) < 700
        for word in words:
            assert word in message


METHODS = ("gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors", "mxfp4", "hqq", "modelopt", "of_tomorrow")


@pytest.mark.parametrize("method", METHODS)
def test_a_quantised_config_is_refused_by_its_method(method: str, folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": method, "bits": 4})
    refused(folder, "is quantised", method, "dequantise")
    with pytest.raises(UnsupportedModelError, match=method):
        load_structure(folder)


@pytest.mark.parametrize(
    ("method", "way"),
    [
        ("gptq", "the model that it was made from"),
        ("awq", "the model that it was made from"),
        ("bitsandbytes", "model.dequantize()"),
        ("compressed-tensors", "CompressedTensorsConfig(dequantize=True)"),
        ("fp8", "Give its folder or hub id to a command"),
        ("of_tomorrow", "dequantise this one to bfloat16"),
    ],
)
def test_a_refusal_names_the_way_out(method: str, way: str, folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": method, "bits": 4})
    refused(folder, "is quantised", method, way)
    if method not in DEQUANTISED:
        assert find_quantised(str(folder)) is None


def test_a_config_quantised_without_a_method_is_refused(folder: Path) -> None:
    change_config(folder, quantization={"group_size": 64, "bits": 4})
    refused(folder, "is quantised", "dequantise")


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json"])
def test_the_file_of_a_quantiser_beside_the_weights_is_refused(name: str, folder: Path) -> None:
    (folder / name).write_text("{}")
    refused(folder, "is quantised", name)


def _scaled(dtype: torch.dtype) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[UP] = tensors[UP].to(dtype)
        tensors[f"{UP}_scale"] = torch.tensor(0.5)

    return change


def _codes(dtype: torch.dtype) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[UP]
        tensors[UP.replace("weight", "qweight")] = torch.ones(6, 32, dtype=dtype)

    return change


QUANTISED = {
    "fp8": _scaled(torch.float8_e4m3fn),
    "fp8 e5m2": _scaled(torch.float8_e5m2),
    "int8": _scaled(torch.int8),
    "packed bytes": _codes(torch.uint8),
    "packed integers": _codes(torch.int32),
    "fp8 without scales": lambda tensors: tensors.update({UP: tensors[UP].to(torch.float8_e4m3fn)}),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_tensors_are_refused_whatever_the_config_says(kind: str, folder: Path) -> None:
    change_tensors(folder, QUANTISED[kind])
    refused(folder, "is quantised", "model.layers.0.mlp.up_proj")


def test_quantised_tensors_are_refused_in_a_pickled_checkpoint(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    _scaled(torch.float8_e4m3fn)(tensors)
    (folder / SINGLE).unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    refused(folder, "is quantised", UP)


EXTRA = {
    "a layer for prediction": {"model.layers.2.eh_proj.weight": torch.ones(32, 64)},
    "scales of plain weights": {f"{UP}_scale": torch.ones(48)},
    "another head": {"score.weight": torch.ones(2, 32)},
    "biases": {UP.replace("weight", "bias"): torch.ones(48)},
}


@pytest.mark.parametrize("kind", EXTRA)
def test_tensors_that_the_class_does_not_use_are_named(kind: str, folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update(EXTRA[kind]))
    refused(folder, "LlamaForCausalLM does not use 1 tensor of the checkpoint", *EXTRA[kind])


def test_buffers_of_older_versions_are_no_reason_to_refuse(folder: Path) -> None:
    old = {f"model.layers.{index}.self_attn.rotary_emb.inv_freq": torch.ones(4) for index in range(2)}
    change_tensors(folder, lambda tensors: tensors.update(old))
    for lazily in (False, True):
        assert load_model(folder, device="cpu", lazily=lazily).unused == ()


def test_masks_of_older_versions_are_no_quantised_weights(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "gpt2", "gpt2")
    masks = {f"transformer.h.{index}.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8) for index in range(2)}
    change_tensors(folder, lambda tensors: tensors.update(masks))
    for lazily in (False, True):
        assert load_model(folder, device="cpu", lazily=lazily).unused == ()


def test_trained_tensors_that_the_class_declares_ignorable_are_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp\."])
    change_tensors(folder, lambda tensors: tensors.update({"mtp.fc.weight": torch.ones(2, 2)}))
    for lazily in (False, True):
        assert load_model(folder, device="cpu", lazily=lazily).unused == ("mtp.fc.weight",)


def test_a_result_says_which_trained_tensors_it_lacks(
    folder: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp\."])
    change_tensors(folder, lambda tensors: tensors.update({"mtp.fc.weight": torch.ones(2, 2)}))
    cheap = ("--allocator", "uniform", "--solver", "wanda", "--match", "none", "--calibration", tiny_text, *WINDOWS)
    done("search", folder, "--budget", "0.5", *cheap, "--out", tmp_path / "run", "-q")
    notes = json.loads((tmp_path / "run" / "summary.json").read_text())["notes"]
    assert any("lacks 1 tensor of the checkpoint: mtp.fc.weight" in note for note in notes)


_BERT: dict[str, Any] = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_BERT |= {"intermediate_size": 64, "max_position_embeddings": 128}


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "Electra", "ModernBert", "DistilBert"])
def test_encoders_are_refused_by_what_they_are(kind: str, tmp_path: Path) -> None:
    config = getattr(transformers, f"{kind}Config")(**_BERT, pad_token_id=0)
    save(getattr(transformers, f"{kind}ForMaskedLM")(config), tmp_path)
    refused(tmp_path, f"{kind}ForMaskedLM", "no causal language model")


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "Electra", "BigBird", "RoFormer", "XLMRoberta", "Ernie"])
def test_encoders_are_refused_where_no_config_tells(kind: str) -> None:
    config = getattr(transformers, f"{kind}Config")(**_BERT, pad_token_id=0)
    with pytest.raises(UnsupportedModelError, match="is an encoder here"):
        find_layers(transformers.AutoModelForCausalLM.from_config(config).eval())


def test_an_encoder_made_a_decoder_is_one() -> None:
    model = transformers.BertLMHeadModel(transformers.BertConfig(**_BERT, pad_token_id=0, is_decoder=True))
    assert len(find_layers(model.eval()).blocks) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_models_are_not_taken_for_encoders(kind: str, dtype: torch.dtype) -> None:
    find_layers(tiny_model(kind).to(dtype), allow_low_coverage=True)  # pyright: ignore[reportArgumentType]


def test_a_model_that_cannot_compute_is_one_line() -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 5}
    config = transformers.Qwen3MoeConfig(**_BERT | sizes, num_key_value_heads=2)
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    with pytest.raises(UnsupportedModelError, match="cannot compute a text of 8 tokens"):
        find_layers(model, allow_low_coverage=True)


_BART: dict[str, Any] = {"vocab_size": 128, "d_model": 32, "decoder_start_token_id": 2, "encoder_layers": 2}
_BART |= {"decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
_BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 128}
_T5 = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}


@pytest.mark.parametrize(("kind", "sizes"), [("Bart", _BART), ("Pegasus", _BART), ("T5", _T5)])
def test_encoder_decoders_are_refused_by_what_they_are(kind: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    config = getattr(transformers, f"{kind}Config")(**sizes, pad_token_id=0)
    save(getattr(transformers, f"{kind}ForConditionalGeneration")(config), tmp_path)
    refused(tmp_path, "encoder-decoder", kind.lower())


def test_an_adapter_beside_the_weights_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "base"}))
    refused(folder, "adapter_config.json", "beside its weights")
    (folder / "config.json").unlink()
    refused(folder, "is an adapter and no model")


def test_an_adapter_on_the_hub_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "find_adapter_config_file", lambda source: "adapter_config.json")
    with pytest.raises(ArtefactError, match="holds an adapter"):
        loading._check_files("nobody/nothing", None, tiny_model("llama").config, {"local_files_only": False})


@pytest.mark.parametrize("text", ["{", "[]", '{"max_new_tokens": -1}', '{"cache_implementation": "silly"}'])
def test_a_broken_generation_config_is_no_traceback(text: str, folder: Path) -> None:
    (folder / "generation_config.json").write_text(text)
    for lazily in (False, True):
        with contextlib.suppress(GlobalOptError):
            load_model(folder, device="cpu", lazily=lazily)


@pytest.mark.parametrize("kind", ["Llava", "Qwen2VL", "Idefics3"])
def test_image_text_models_without_a_causal_class_are_refused(kind: str, tmp_path: Path) -> None:
    getattr(transformers, f"{kind}Config")().save_pretrained(tmp_path)
    refused(tmp_path, "image-text")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
        (lambda path: path.write_text("<html>"), "no checkpoint that torch can read"),
        (lambda path: path.write_bytes(b""), "no checkpoint that torch can read"),
        (lambda path: torch.save({"epoch": 3, "model": {}}, path), "other things than tensors"),
    ],
)
def test_a_pickle_that_is_no_checkpoint_is_refused_by_its_name(
    damage: Callable[[Path], object], words: str, folder: Path
) -> None:
    (folder / SINGLE).unlink()
    damage(folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", words)


def test_a_pickled_checkpoint_is_loaded(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert torch.equal(load_model(folder, device="cpu").model.get_parameter(UP), tensors[UP])


def test_a_single_file_beside_shards_is_refused(tmp_path: Path, original: Path) -> None:
    model: Any = tiny_model("llama", seed=1)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    shutil.copy(original / SINGLE, tmp_path)
    refused(tmp_path, SINGLE, INDEX, "another checkpoint")


def test_an_index_of_the_single_file_is_no_second_checkpoint(folder: Path) -> None:
    names = load_file(folder / SINGLE)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, SINGLE)}))
    for lazily in (False, True):
        load_model(folder, device="cpu", lazily=lazily)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_parameters": {"rope_type": "newrope", "rope_theta": 1e4}}, ("rope_parameters.rope_type", "newrope")),
        ({"dtype": "bf16"}, ("dtype", "bf16")),
        ({"hidden_act": "silly"}, ("hidden_act", "silly")),
        ({"num_hidden_layers": "two"}, ("num_hidden_layers",)),
    ],
)
def test_an_unknown_word_in_the_config_is_named(change: dict[str, Any], words: tuple[str, ...], folder: Path) -> None:
    change_config(folder, **change)
    refused(folder, "config.json", *words)


@pytest.mark.parametrize(
    ("code", "word"),
    [
        ("import kernels_of_yesterday\n", "kernels_of_yesterday"),
        ("from transformers import NameOfYesterday\n", "NameOfYesterday"),
        ("raise RuntimeError('not with this version')\n", "not with this version"),
    ],
)
def test_model_code_that_cannot_be_imported_is_one_line(
    code: str, word: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    text = "from transformers import LlamaForCausalLM\nclass Mine(LlamaForCausalLM): pass\n"
    (folder / "modeling_mine.py").write_text(code + text)
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    refused(folder, word, trust_remote_code=True)


def test_a_tokenizer_of_another_version_is_refused(folder: Path) -> None:
    path = folder / "tokenizer.json"
    record = json.loads(path.read_text())
    record["model"]["type"], record["model"]["vocab"] = "NewKind", [["a", 0]]
    path.write_text(json.dumps(record))
    refused(folder, "no usable tokenizer", "tokenizer.json")


_TEXT: dict[str, Any] = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}
_SIGHT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
_SIGHT |= {"image_size": 28, "patch_size": 14}


def test_the_blocks_are_the_texts_where_a_vision_tower_is_as_deep_and_larger() -> None:
    config = transformers.Gemma3Config(
        text_config=_TEXT,
        vision_config=_SIGHT,
        mm_tokens_per_image=4,
        image_token_index=120,
        boi_token_index=121,
        eoi_token_index=122,
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    assert decoder_blocks(model)[0] == "model.language_model.layers"
    monkey: Any = model
    monkey.get_decoder = lambda: model  # a class that names the whole of it
    assert decoder_blocks(model)[0] == "model.language_model.layers"


def test_a_checkpoint_whose_vision_tower_would_be_lost_is_refused(tmp_path: Path) -> None:
    sizes = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
    sizes |= {"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
    sight = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen3_5Config(text_config=_TEXT | sizes, vision_config=sight)
    save(transformers.Qwen3_5ForConditionalGeneration(config), tmp_path)
    refused(tmp_path, "image-text", "vision_config")
