"""A packed checkpoint that was changed is refused in one line, or is the same model; never another one."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from globalopt.errors import ArtefactError, GlobalOptError
from globalopt.export import guard, seal
from globalopt.export.formats import export
from globalopt.export.packed import load_packed
from globalopt.export.quantizer import packed_layers
from tests.export.runs import ALL, made_run

WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
MUTATIONS = 1000


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    export(made_run(folder / "run", kinds=(*ALL, "signs")), "packed", folder / "packed")
    return folder / "packed"


@pytest.fixture(scope="module")
def sharded(whole, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "sharded"
    load_packed(whole).save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "packed"))


def everything(model: Any) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    config = {k: v for k, v in model.config.to_dict().items() if k != "_name_or_path"}
    return model.state_dict(), config, model.generation_config.to_dict()


def identical(a: Any, b: Any) -> bool:
    tensors, *configs = everything(a)
    others, *other_configs = everything(b)
    same = tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)
    return same and configs == other_configs


def refused(folder: Path) -> str:
    """What our loader says, in one line."""
    with pytest.raises(GlobalOptError) as caught:
        load_packed(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def mutated(body: bytes, draw: random.Random, end: int | None = None) -> bytes:
    """`body` with one change before `end`."""
    changed, length = bytearray(body), len(body) if end is None else end
    place = draw.randrange(length)
    match draw.randrange(8):
        case 0 | 1:
            changed[place] ^= 1 << draw.randrange(8)
        case 2:
            changed[place] = draw.randrange(256)
        case 3:
            del changed[place]
        case 4:
            changed.insert(place, draw.randrange(256))
        case 5:
            del changed[place:]
        case 6:
            size = draw.randrange(1, 40)
            changed[place : place + size] = bytes(len(changed[place : place + size]))
        case _:
            # Digits make other numbers, and so other shapes, counts and offsets.
            digits = [i for i in range(length) if 48 <= body[i] <= 57] or [place]
            changed[draw.choice(digits)] = draw.choice(b"0123456789")
    return bytes(changed)


def test_a_thousand_changes_never_make_another_model(whole, sharded, tmp_path):
    draw = random.Random(0)
    counts, said = {"refused": 0, "identical": 0}, set()
    for source, share in ((whole, 3), (sharded, 1)):
        original = load_packed(source)
        copy = Path(shutil.copytree(source, tmp_path / source.name))
        files = [path for path in copy.iterdir() if not path.name.startswith(("token", "README"))]
        bodies = {path: path.read_bytes() for path in files}
        header = {path: 8 + struct.unpack("<Q", body[:8])[0] for path, body in bodies.items() if path.suffix != ".json"}
        for _ in range(MUTATIONS * share // 4):
            path = draw.choice(files)
            inside = header.get(path) if draw.random() < 0.6 else None
            path.write_bytes(mutated(bodies[path], draw, inside))
            try:
                loaded = load_packed(copy)
            except GlobalOptError as error:
                counts["refused"] += 1
                said.add(str(error))
            else:
                assert identical(loaded, original)
                counts["identical"] += 1
            path.write_bytes(bodies[path])
    assert sum(counts.values()) == MUTATIONS
    assert counts["refused"] > MUTATIONS * 3 // 4
    assert all(message and "\n" not in message for message in said)


def test_transformers_refuses_the_same_changes(folder):
    """Through `from_pretrained`, where any error may come first: a changed model does not load."""
    draw = random.Random(1)
    original = AutoModelForCausalLM.from_pretrained(folder)
    body = (folder / WEIGHTS).read_bytes()
    refusals = 0
    for _ in range(40):
        (folder / WEIGHTS).write_bytes(mutated(body, draw))
        try:
            loaded = AutoModelForCausalLM.from_pretrained(folder)
        except Exception:
            refusals += 1
        else:
            assert identical(loaded, original)
    assert refusals > 30


def resealed(
    folder: Path,
    change: Callable[[dict[str, Tensor], dict[str, Any]], None],
    record: Callable[[dict[str, Any]], None] = lambda record: None,
) -> None:
    """Change tensors and config of a packed folder as an attacker would, with digests that are right."""
    path = folder / WEIGHTS
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()[seal.KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    config = json.loads((folder / CONFIG).read_text())
    change(tensors, config)
    (folder / CONFIG).write_text(json.dumps(config))
    metadata["config"] = seal._digest_json(guard.without_notice(config))
    metadata["tensors"] = {name: seal._digest(tensor) for name, tensor in tensors.items()}
    record(metadata)
    save_file(tensors, path, metadata={"format": "pt", seal.KEY: json.dumps(metadata)})


def layer_of(config: dict[str, Any], form: str) -> str:
    layers = config["quantization_config"]["layers"]
    return next(name for name, record in layers.items() if record["form"] == form)


def set_record(form: str, /, **changes: Any) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        config["quantization_config"]["layers"][layer_of(config, form)].update(changes)

    return change


def set_tensor(form: str, part: str, make: Callable[[Tensor], Tensor | None]):
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        name = f"{layer_of(config, form)}.{part}"
        made = make(tensors.pop(name))
        if made is not None:
            tensors[name] = made

    return change


def set_config(**changes: Any) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda tensors, config: config.update(changes)


SEALED_ATTACKS = {
    "shape": set_record("bitmask", d_out=31),
    "many values": set_record("bitmask", values=1023),
    "negative": set_record("bitmask", values=-1),
    "huge": set_record("bitmask", d_out=2**40, d_in=2**40, values=2**60),
    "form": set_record("bitmask", form="columns"),
    "unknown form": set_record("bitmask", form="zip"),
    "rank": set_record("bitmask", rank=4),
    "signs": set_record("bitmask", signs=True),
    "float count": set_record("bitmask", values=512.0),
    "long number": set_record("2:4", form="1:" + "9" * 5000),
    "set bits": set_tensor("bitmask", "support", lambda x: torch.full_like(x, 255)),
    "no bits": set_tensor("bitmask", "support", torch.zeros_like),
    "positions": set_tensor("2:4", "support", torch.zeros_like),
    "columns": set_tensor("columns", "support", lambda x: torch.full_like(x, 255)),
    "short support": set_tensor("bitmask", "support", lambda x: x[:-1].clone()),
    "no support": set_tensor("bitmask", "support", lambda x: None),
    "no weight": set_tensor("bitmask", "weight", lambda x: None),
    "type of values": set_tensor("bitmask", "weight", lambda x: x.to(torch.int64)),
    "type of support": set_tensor("bitmask", "support", lambda x: x.to(torch.float32)),
    "dense under the name": set_tensor("bitmask", "weight", lambda x: torch.zeros(32, 32)),
    "not finite": set_tensor("bitmask", "weight", lambda x: torch.full_like(x, float("nan"))),
    "factor": set_tensor("2:4", "U", lambda x: x[:-1].contiguous()),
    "another tensor": lambda tensors, config: tensors.update({"model.layers.0.more": torch.zeros(2)}),
    "a tensor less": lambda tensors, config: tensors.__delitem__("model.norm.weight"),
    "no layers": set_config(quantization_config={"quant_method": "globalopt", "format_version": 1}),
    "a list of layers": set_config(quantization_config={"quant_method": "globalopt", "layers": [1]}),
    "version": set_config(quantization_config={"quant_method": "globalopt", "layers": {}, "format_version": 99}),
    "no method": set_config(quantization_config={}),
    "method": set_config(quantization_config={"quant_method": "gptq", "bits": 4}),
    "another architecture": set_config(model_type="gpt2", architectures=["GPT2LMHeadModel"]),
    "no architecture": set_config(model_type="nothing"),
    "sizes": set_config(hidden_size=64),
    "types in config": set_config(hidden_size="large"),
    "own code": set_config(auto_map={"AutoModelForCausalLM": "evil.Model"}, model_type="evil"),
    "where weights are": set_config(transformers_weights="../elsewhere.safetensors"),
}


@pytest.mark.parametrize("attack", SEALED_ATTACKS.values(), ids=SEALED_ATTACKS.keys())
def test_what_is_sealed_must_still_fit(attack, folder):
    resealed(folder, attack)
    refused(folder)


def test_a_seal_that_is_made_anew_without_an_attack_loads(folder, whole):
    resealed(folder, lambda tensors, config: None)
    assert identical(load_packed(folder), load_packed(whole))


SEALS: dict[str, Callable[[dict[str, Any]], None]] = {
    "empty": lambda record: record.clear(),
    "version": lambda record: record.update(version=2),
    "no tensors": lambda record: record.__delitem__("tensors"),
    "tensors of another kind": lambda record: record.update(tensors=[1]),
    "config": lambda record: record.update(config="0" * 64),
    "renamed": lambda record: record.update(tensors={}, renamed=None),
}


@pytest.mark.parametrize("change", SEALS.values(), ids=SEALS.keys())
def test_broken_seals_are_refused(change, folder):
    resealed(folder, lambda tensors, config: None, change)
    refused(folder)


def test_a_pickle_is_not_opened(folder, tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "opened",)

    shutil.move(folder / WEIGHTS, tmp_path / "kept")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    assert "no weight file" in refused(folder)
    torch.save({"x": torch.zeros(1)}, folder / "pytorch_model.bin")
    with pytest.raises(ArtefactError, match="no pickle is opened"):
        AutoModelForCausalLM.from_pretrained(folder)
    # Under the name of a safetensors file it is none.
    (folder / WEIGHTS).write_bytes(pickle.dumps(Trap()))
    assert "broken" in refused(folder)
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize(
    "name", ["../elsewhere.safetensors", "/tmp/x.safetensors", "a/../b.safetensors", "..", "", "."]
)
def test_an_index_that_leads_outside_is_refused(name, sharded, tmp_path):
    folder = Path(shutil.copytree(sharded, tmp_path / "packed"))
    index = json.loads((folder / INDEX).read_text())
    first = next(iter(index["weight_map"]))
    shutil.copy(folder / index["weight_map"][first], tmp_path / "elsewhere.safetensors")
    index["weight_map"][first] = name
    (folder / INDEX).write_text(json.dumps(index))
    assert INDEX in refused(folder) or "no weight file" in refused(folder) or "no safetensors" in refused(folder)
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 1}}', b"{" * 5000])
def test_a_broken_index_is_refused(body, sharded, tmp_path):
    folder = Path(shutil.copytree(sharded, tmp_path / "packed"))
    (folder / INDEX).write_bytes(body)
    assert INDEX in refused(folder)


def test_shards_of_another_save_or_twice_or_none_are_refused(whole, sharded, tmp_path):
    folder = Path(shutil.copytree(sharded, tmp_path / "packed"))
    shutil.copy(whole / WEIGHTS, folder)
    assert "holds both" in refused(folder)
    (folder / WEIGHTS).unlink()
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    body = first.read_bytes()
    first.write_bytes(second.read_bytes())
    refused(folder)
    first.unlink()
    assert "no weight file" in refused(folder)
    first.write_bytes(body)
    load_packed(folder)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"3", b'{"quantization_config": 3}', b"[" * 5000, b"\xff"])
def test_a_broken_config_is_refused(body, folder):
    (folder / CONFIG).write_bytes(body)
    assert str(folder) in refused(folder)


def test_no_folder_a_dense_model_and_a_file_are_refused(folder, tmp_path):
    assert "There is no folder" in refused(tmp_path / "none")
    assert "There is no folder" in refused(folder / CONFIG)
    export(made_run(tmp_path / "run"), "dense", tmp_path / "dense")
    assert "holds no packed model" in refused(tmp_path / "dense")


def test_an_offloaded_tensor_cannot_be_sealed():
    with pytest.raises(ArtefactError, match="offloaded"):
        seal._digest(torch.empty(3, device="meta"))


def test_packed_layers_are_what_is_attacked(whole):
    assert {layer.shape.sparse.form for _, layer in packed_layers(load_packed(whole))} == {
        "bitmask",
        "columns",
        "2:4",
        "empty",
    }
