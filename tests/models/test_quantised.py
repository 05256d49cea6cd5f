"""Models in fp8 and mxfp4 are dequantised to the weights that their numbers stand for, and saved as ordinary ones."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from globalopt.errors import ArtefactError, UnsupportedModelError
from globalopt.models import quantised
from globalopt.models.checkpoint import SINGLE
from globalopt.models.example import example_gguf
from globalopt.models.loading import load_model
from globalopt.models.quantised import QuantisedModel, find_quantised
from tests.quantised_models import save_fp8, save_mxfp4
from tests.tiny_models import save_tiny


def found(folder: Path) -> QuantisedModel:
    model = find_quantised(str(folder))
    assert model is not None
    return model


@pytest.mark.parametrize("blocks", [True, False])
def test_fp8_is_dequantised(blocks: bool, tmp_path: Path) -> None:
    real = save_fp8(tmp_path / "fp8", blocks)
    (tmp_path / "fp8" / "README.md").write_text("---\nlicense: mit\n---\n")
    model = found(tmp_path / "fp8")
    assert model.quantisation == "fp8"
    model.write(tmp_path / "dense")
    written = load_file(tmp_path / "dense" / SINGLE)
    assert written.keys() == real.keys()
    assert all(torch.equal(written[name], weight) for name, weight in real.items())
    assert "quantization" not in (tmp_path / "dense" / "config.json").read_text()
    assert (tmp_path / "dense" / "README.md").is_file()
    assert load_model(tmp_path / "dense", device="cpu").checkpoint_dtype == torch.bfloat16


def test_mxfp4_is_dequantised(tmp_path: Path) -> None:
    real = save_mxfp4(tmp_path / "mxfp4")
    found(tmp_path / "mxfp4").write(tmp_path / "dense")
    assert torch.equal(load_file(tmp_path / "dense" / SINGLE)["model.layers.0.mlp.experts.down_proj"], real)
    load_model(tmp_path / "dense", device="cpu")


def test_an_incomplete_folder_is_one_line_and_writes_nothing(tmp_path: Path) -> None:
    save_fp8(tmp_path / "fp8", blocks=True)
    (tmp_path / "fp8" / SINGLE).unlink()
    with pytest.raises(ArtefactError, match=SINGLE) as caught:
        found(tmp_path / "fp8").write(tmp_path / "dense")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "dense").exists()


def test_the_identity_is_that_of_the_content(tmp_path: Path) -> None:
    save_fp8(tmp_path / "fp8", blocks=True)
    before = found(tmp_path / "fp8").sha256()
    shutil.copytree(tmp_path / "fp8", tmp_path / "other")
    assert found(tmp_path / "other").sha256() == before
    (tmp_path / "other" / "tokenizer_config.json").write_text("{}")
    assert found(tmp_path / "other").sha256() != before
    first, second = (example_gguf(tmp_path / f"{kind}.gguf", kind) for kind in ("F16", "Q8_0"))
    assert found(first).sha256() != found(second).sha256()


def test_too_little_memory_is_said_before_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "available", lambda device: 1000)
    with pytest.raises(UnsupportedModelError, match="does not fit into memory dequantised"):
        found(example_gguf(tmp_path / "tiny.gguf")).write(tmp_path / "dense")


def test_the_structure_needs_no_weights(tmp_path: Path) -> None:
    save_fp8(tmp_path / "fp8", blocks=True)
    (tmp_path / "fp8" / SINGLE).unlink()
    model, stored = found(tmp_path / "fp8").structure()
    assert (model.num_parameters() > 0, stored) == (True, torch.bfloat16)


@pytest.mark.parametrize("text", ["{", "[]", "{}", "[[[[", '{"quantization_config": 3}'])
def test_a_broken_config_is_left_to_the_loading(text: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    (folder / "config.json").write_text(text)
    assert find_quantised(str(folder)) is None


def test_an_unquantised_model_is_loaded_as_it_is(tmp_path: Path) -> None:
    names: list[Any] = [save_tiny(tmp_path / "model"), tmp_path / "nothing", "nobody/nothing"]
    assert [find_quantised(str(name)) for name in names] == [None] * 3
