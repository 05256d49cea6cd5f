"""Models in GGUF files are found, read as transformers reads them, and refused where it would misread them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

from globalopt.errors import ArtefactError, GlobalOptError, UnsupportedModelError, UsageError
from globalopt.models.example import example_gguf, gguf_llama, write_gguf
from globalopt.models.gguf import find_gguf, load_gguf, read_gguf
from globalopt.models.loading import load_model
from globalopt.models.quantised import find_quantised
from globalopt.models.rotary_factors import FACTORS
from tests.tiny_models import save_tiny, tiny_ids

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5}
LLAMA3 |= {"original_max_position_embeddings": 8192}


def logits(model: Any) -> torch.Tensor:
    return model.eval().float()(input_ids=tiny_ids(2, 24)).logits


def dense(path: Path, folder: Path) -> Any:
    """Write the dequantised copy of a GGUF file, and load it."""
    found = find_quantised(str(path))
    assert found is not None
    found.write(folder)
    return load_model(folder, device="cpu")


TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "Q8_0": torch.bfloat16}
TYPES |= {"Q4_1": torch.bfloat16}


@pytest.mark.parametrize("kind", TYPES)
def test_the_copy_computes_what_transformers_does_from_the_file(kind: str, tmp_path: Path) -> None:
    path = example_gguf(tmp_path / "tiny.gguf", kind)
    loaded = dense(path, tmp_path / "dense")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=TYPES[kind])
    for field in ("hf_quantizer", "is_quantized"):
        vars(expected).pop(field, None)
    assert loaded.checkpoint_dtype == TYPES[kind]
    assert torch.equal(logits(loaded.model), logits(expected))


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"rope_parameters": LLAMA3, "head_dim": 32}])
def test_an_unquantised_file_is_the_model_that_it_was_made_from(changes: dict[str, Any], tmp_path: Path) -> None:
    model: Any = gguf_llama(**changes, max_position_embeddings=16384)
    loaded = dense(write_gguf(tmp_path / "tiny.gguf", model, "F32"), tmp_path / "dense")
    assert torch.allclose(logits(loaded.model), logits(model), atol=1e-5)
    assert loaded.model.config.rope_parameters["rope_type"] == model.config.rope_parameters["rope_type"]


def test_the_copy_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    loaded = dense(example_gguf(tmp_path / "tiny.gguf"), tmp_path / "dense")
    files = {path.name for path in (tmp_path / "dense").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json"} <= files
    assert "quantization" not in (tmp_path / "dense" / "config.json").read_text()
    assert (tmp_path / "dense" / "README.md").read_text() == '---\nlicense: "mit"\n---\n'
    tokenizer = loaded.tokenizer
    assert tokenizer.decode(tokenizer("the cat").input_ids) == "the cat"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    assert loaded.model.generation_config.eos_token_id == 2


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("says", [True, False])
def test_a_file_is_called_by_its_type(kind: str, says: bool, tmp_path: Path) -> None:
    path = example_gguf(tmp_path / "tiny.gguf", kind)
    if not says:
        path.write_bytes(path.read_bytes().replace(b"general.file_type", b"general.file_tipe"))
    assert read_gguf(path).quantisation == kind


# ------------------------------------------------------------------------------------------------- finding


def test_names_that_mean_a_file(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    path = example_gguf(tmp_path / "one" / "tiny.gguf")
    assert find_gguf(str(path)) == path
    assert find_gguf(str(path.parent)) == path
    assert find_gguf(str(path.parent), "tiny.gguf") == path
    for name in ("nobody/nothing", str(tmp_path), str(tmp_path / ("x" * 300))):
        assert find_gguf(name) is None


def test_a_folder_with_a_config_is_read_as_ever(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    path = example_gguf(folder / "tiny.gguf")
    assert find_gguf(str(folder)) is None
    assert find_gguf(str(folder), "tiny.gguf") == path


def test_a_name_that_means_no_file_or_several_is_refused(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.GGUF", "notes.txt"):
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match=r"holds 2 GGUF files; choose one with --gguf-file: a\.gguf, b\.GGUF\.$"):
        find_gguf(str(tmp_path))
    with pytest.raises(ArtefactError, match=r"no file c\.gguf in .*; its GGUF files are a\.gguf, b\.GGUF\.$"):
        find_gguf(str(tmp_path), "c.gguf")
    with pytest.raises(ArtefactError, match=r"no file .*c\.gguf\.$"):
        find_gguf(str(tmp_path / "c.gguf"))
    with pytest.raises(UsageError, match=r"a\.gguf is a file"):
        find_gguf(str(tmp_path / "a.gguf"), "a.gguf")


def test_a_file_on_the_hub_without_a_network_is_one_line() -> None:
    with pytest.raises(ArtefactError, match="nor to be had from the hub") as caught:
        find_gguf("nobody/nothing", "a.gguf")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------- refusing


def refused(path: Path, kind: type[GlobalOptError], *words: str) -> None:
    with pytest.raises(kind) as caught:
        load_gguf(read_gguf(path))
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in (str(path), *words)), message


@pytest.mark.parametrize(
    "content", [b"", b"<html>", b"version https://git-lfs.github.com/spec/v1\n", b"GGUF\x03\0\0\0"]
)
def test_what_is_no_gguf_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(content)
    refused(path, ArtefactError, "cannot be read as a GGUF file", "Fetch it again")


def test_a_file_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    path = example_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:-5000])
    refused(path, ArtefactError, "cannot be read as a GGUF file")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = example_gguf(tmp_path / "tiny.gguf")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest))
    refused(path, ArtefactError, "pip install gguf")


def test_a_part_of_a_split_file_is_refused(tmp_path: Path) -> None:
    refused(write_gguf(tmp_path / "a.gguf", gguf_llama(), split_count=3), UnsupportedModelError, "one of 3 parts")


def test_an_architecture_that_transformers_does_not_read_is_refused(tmp_path: Path) -> None:
    path = example_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes().replace(b"llama", b"zorps"))
    refused(path, UnsupportedModelError, "zorps", "Use the model that it was made from")


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_scaled_rotary_embeddings_that_transformers_passes_over_are_refused(kind: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", gguf_llama(), llama_rope_scaling_type=kind)
    refused(path, UnsupportedModelError, f"scales its rotary embeddings ({kind})")


def test_rotary_factors_of_another_kind_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("globalopt.models.rotary_factors.llama3_factors", lambda *sizes: torch.linspace(1, 3, 16))
    model = gguf_llama(rope_parameters=LLAMA3, head_dim=32, max_position_embeddings=16384)
    path = write_gguf(tmp_path / "tiny.gguf", model)
    monkeypatch.undo()
    refused(path, UnsupportedModelError, FACTORS, "not those of Llama 3.1")


def test_weights_that_transformers_passes_over_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = gguf.GGUFWriter.add_block_count
    monkeypatch.setattr(gguf.GGUFWriter, "add_block_count", lambda writer, blocks: add(writer, blocks - 1))
    path = example_gguf(tmp_path / "tiny.gguf")
    refused(path, UnsupportedModelError, "some would be lost")


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    model: Any = gguf_llama()
    del model.model.layers[1].mlp.up_proj
    refused(write_gguf(tmp_path / "tiny.gguf", model), ArtefactError, "model.layers.1.mlp.up_proj.weight")


def test_no_bar_of_transformers_is_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_gguf(read_gguf(example_gguf(tmp_path / "tiny.gguf")))
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")
