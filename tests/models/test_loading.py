"""Loading, naming and saving models, and the one-line errors of that border."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from globalopt.errors import ArtefactError, GlobalOptError, UnknownNameError, UnsupportedModelError
from globalopt.models.loading import load_model
from globalopt.models.saving import save_dense
from tests.tiny_models import KINDS, save_tiny, tiny_ids, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "llama", "llama", dtype=torch.bfloat16)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def test_a_folder_is_loaded_in_float32_on_a_cpu_and_frozen(folder: Path) -> None:
    loaded = load_model(folder, device="cpu")
    assert (loaded.model.dtype, loaded.checkpoint_dtype) == (torch.float32, torch.bfloat16)
    assert (loaded.name, loaded.device) == (str(folder), torch.device("cpu"))
    assert (loaded.model.training, loaded.model.config.use_cache) == (False, False)
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    ids = tiny_ids(1, 5)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=ids).logits
    assert torch.equal(loaded.model(input_ids=ids).logits, expected)
    assert loaded.tokenizer.decode(loaded.tokenizer("Two words.")["input_ids"]) == "Two words."


def test_a_type_can_be_asked_for(folder: Path) -> None:
    assert load_model(folder, dtype="bfloat16", device="cpu").model.dtype == torch.bfloat16


def test_a_local_folder_asks_no_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a local folder went to the network")

    asked: list[bool] = []
    for loader in (AutoConfig, AutoModelForCausalLM, AutoTokenizer):

        def spy(*args: Any, load: Any = loader.from_pretrained, **kwargs: Any) -> Any:
            asked.append(kwargs["local_files_only"])
            return load(*args, **kwargs)

        monkeypatch.setattr(loader, "from_pretrained", spy)
    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    load_model(folder, device="cpu")
    assert set(asked) == {True}
    assert len(asked) >= 3


def _cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def _without_one_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _of_wrong_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 3, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def _config(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(text)


BROKEN = {
    "no folder": (shutil.rmtree, ArtefactError, "There is no model folder"),
    "no config": (lambda f: (f / "config.json").unlink(), ArtefactError, "has no config.json"),
    "config is no json": (_config('{"model_type":'), ArtefactError, "not a valid JSON file"),
    "no model type": (_config("{}"), UnsupportedModelError, "model_type"),
    "unknown model type": (_config('{"model_type": "zorp"}'), UnsupportedModelError, "zorp"),
    "value of a wrong type": (_config('{"model_type": "llama", "hidden_size": "x"}'), UnsupportedModelError, "hidden"),
    "impossible shape": (
        _config('{"model_type": "llama", "hidden_size": 8, "num_attention_heads": 3}'),
        UnsupportedModelError,
        "not a multiple",
    ),
    "no causal model": (_config('{"model_type": "t5"}'), UnsupportedModelError, "t5; only decoder-only causal"),
    "code of its own": (
        _config('{"model_type": "zorp", "auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "c.M"}}'),
        ArtefactError,
        "--trust-remote-code",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ArtefactError, "no file named model.safetensors"),
    "no safetensors": (lambda f: (f / "model.safetensors").write_text("?"), ArtefactError, "broken or cut off"),
    "weights cut off": (_cut, ArtefactError, "broken or cut off"),
    "a tensor missing": (_without_one_tensor, ArtefactError, r"lack 1 tensors, model\.layers\.0\.mlp\.up_proj\.weight"),
    "a tensor of another shape": (_of_wrong_shape, ArtefactError, "do not have the shapes"),
    "no tokenizer": (_without_tokenizer, ArtefactError, "no usable tokenizer"),
    "tokenizer cut off": (lambda f: (f / "tokenizer.json").write_text('{"ver'), ArtefactError, "no usable tokenizer"),
    "tokenizer of another kind": (lambda f: (f / "tokenizer.json").write_text("{}"), ArtefactError, "no usable tok"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_one_line(case: str, folder: Path) -> None:
    damage, kind, message = BROKEN[case]
    damage(folder)
    with pytest.raises(GlobalOptError, match=message) as caught:
        load_model(folder, device="cpu")
    assert isinstance(caught.value, kind)
    assert "\n" not in str(caught.value)


def test_a_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(ArtefactError, match="is a file"):
        load_model(folder / "config.json")


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ArtefactError, match=r"nobody/nothing is neither a local folder.*a local folder works"
    ) as caught:
        load_model("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_unknown_types_are_refused_before_anything_is_read() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'bfloat16'"):
        load_model("nobody/nothing", dtype="bfloat")


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_comes_back_the_same(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    model.config.use_cache = False
    save_dense(model, tiny_tokenizer(), tmp_path / "saved", torch.float32)
    ids = tiny_ids(2, 6)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.config.use_cache
    # The loaded weights lie in a mapped file at any offset: a BLAS may sum in another order there.
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("ab")["input_ids"] == tiny_tokenizer()("ab")["input_ids"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_computed_in_float32_is_saved_in_the_type_of_its_checkpoint(kind: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", kind, dtype=torch.bfloat16)
    loaded = load_model(source, device="cpu")
    save_dense(loaded.model, loaded.tokenizer, tmp_path / "saved", loaded.checkpoint_dtype)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "saved"))
    assert before.keys() == after.keys()
    assert all(after[name].dtype == torch.bfloat16 and torch.equal(after[name], before[name]) for name in before)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"
    assert loaded.model.dtype == torch.float32


def test_saving_over_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(ArtefactError, match="not empty"):
        save_dense(tiny_model("llama"), tiny_tokenizer(), tmp_path, torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_an_empty_folder_may_be_saved_into(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    save_dense(tiny_model("llama"), tiny_tokenizer(), tmp_path / "saved", torch.float32)
    assert (tmp_path / "saved" / "model.safetensors").is_file()


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", full)
    with pytest.raises(ArtefactError, match="No space left on device"):
        save_dense(tiny_model("llama"), tokenizer, tmp_path / "saved", torch.float32)
    assert not list(tmp_path.iterdir())
