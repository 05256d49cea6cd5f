"""Models whose layers are in few bits: what every format writes is the model of the run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from globalopt.errors import ArtefactError, GlobalOptError
from globalopt.export import guard, seal
from globalopt.export.factors import read_factors
from globalopt.export.formats import decoded_in, export
from globalopt.export.packed import load_packed
from globalopt.export.quantizer import SparseLowRankConfig, packed_layers, set_compute
from globalopt.models.finding import find_layers
from globalopt.models.loading import load_model
from globalopt.runs.artefacts import SOLVED_LAYER
from globalopt.runs.files import read_json, read_tensors, write_json, write_tensors
from globalopt.runs.folder import Run
from globalopt.runs.records import SolvedLayer
from globalopt.values.budget import Target
from globalopt.values.decomposition import Decomposition
from globalopt.values.layer import NM
from globalopt.values.storage import Storage
from tests.export.runs import ALL, assert_same_export, made_run
from tests.tiny_models import tiny_ids

STORAGES = (Storage(4, 8), Storage(8, 8), Storage(3, 16), Storage(16, 5), Storage())
PRECISION = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}


def load(folder: Path, **options) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def difference(a: Any, b: Any) -> float:
    """Largest difference of logits, relative to the largest logit."""
    with torch.inference_mode():
        x, y = (model(tiny_ids(2, 9)).logits.float() for model in (a, b))
    return float((x - y).abs().max() / y.abs().max())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return made_run(tmp_path_factory.mktemp("run") / "llama", kinds=(*ALL, "signs"), storages=STORAGES)


@pytest.fixture(scope="module")
def packed(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "llama"
    export(run, "packed", folder)
    return folder


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_packed_model_computes_what_its_dense_export_computes(kind, dtype, tmp_path):
    run = made_run(tmp_path / "run", kind, dtype, storages=STORAGES[:4])
    export(run, "packed", tmp_path / "packed")
    export(run, "dense", tmp_path / "dense")
    dense, model = load(tmp_path / "dense", dtype=dtype), load(tmp_path / "packed")
    assert model.dtype == dtype
    for compute in ("auto", "split", "merged", "unpack"):
        set_compute(model, compute)
        assert difference(model, dense) <= PRECISION[dtype]
    again = model.dequantize()
    assert not list(packed_layers(again))
    assert again.dtype == dtype
    assert difference(again, dense) <= PRECISION[dtype]


def test_files_are_as_large_as_the_budget_counts(tmp_path):
    run = made_run(tmp_path / "run", dtype=torch.bfloat16, kinds=("both", "zero", "2:4"), storages=STORAGES[:2])
    export(run, "packed", tmp_path / "packed")
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    results = {layer.name: layer for layer in Run.open(run).summary().layers}
    config = read_json(tmp_path / "packed" / "config.json")["quantization_config"]
    assert config["layers"].keys() == results.keys()
    for name, result in results.items():
        of_layer = [x for key, x in tensors.items() if key.rpartition(".")[0] == name and not key.endswith(".bias")]
        pattern = NM.parse(result.pattern) if result.pattern else None
        target = Target(result.rank, result.nnz, pattern, storage=Storage.parse(result.storage))
        assert sum(x.numel() * x.element_size() for x in of_layer) == target.bytes(result)  # pyright: ignore[reportArgumentType]
        if not result.nnz:
            assert [tuple(x.shape) for x in of_layer] == [(0,)]


def test_formats_have_the_version_that_they_need(packed, tmp_path):
    assert read_json(packed / "config.json")["quantization_config"]["format_version"] == 2
    export(made_run(tmp_path / "run", kinds=(*ALL, "signs")), "packed", tmp_path / "plain")
    config = read_json(tmp_path / "plain" / "config.json")["quantization_config"]
    assert config["format_version"] == 1
    records = config["layers"].values()
    assert {tuple(sorted(record)) for record in records} == {("d_in", "d_out", "form", "rank", "signs", "values")}
    assert {record["values"] for record in records if record["form"] == "empty"} == {1}
    types = {x.dtype for x in load_file(tmp_path / "plain" / "model.safetensors").values()}
    assert types == {torch.float32, torch.uint8}


@pytest.mark.parametrize("options", [{}, {"device_map": "auto"}, {"dtype": torch.bfloat16}, {"dtype": torch.float16}])
def test_it_loads_in_every_type_and_place(run, packed, options):
    model, dtype = load(packed, **options), options.get("dtype", torch.float32)
    assert {layer.dtype for _, layer in packed_layers(model)} == {dtype}
    assert difference(model, load(run / "model", dtype=dtype)) <= PRECISION[dtype]


def test_parts_of_it_can_be_offloaded(run, packed, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    model = load(packed, device_map=places, offload_folder=tmp_path)
    assert difference(model, load(run / "model")) <= 2e-5


@pytest.mark.parametrize("compute", [None, "split", "merged", "unpack"])
def test_saved_again_it_is_the_same_to_the_bit(packed, tmp_path, compute):
    model = load(packed)
    if compute:
        set_compute(model, compute)
        model(tiny_ids(1, 3))
    model.save_pretrained(tmp_path)
    assert_same_export(tmp_path, packed)


def test_casts_lose_no_code(run, packed, tmp_path):
    model = load(packed)
    model(tiny_ids(1, 3))
    model.to(torch.float16)
    model(tiny_ids(1, 3))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "again")
    again, before = load_file(tmp_path / "again" / "model.safetensors"), load_file(packed / "model.safetensors")
    codes = [name for name, x in before.items() if x.dtype in (torch.uint8, torch.int16)]
    assert len(codes) > 30
    assert all(torch.equal(again[name], before[name]) for name in codes)
    assert difference(load_packed(tmp_path / "again", dtype="float32"), load(run / "model")) < PRECISION[torch.bfloat16]


def test_a_lazily_loaded_source_is_packed_alike(run, packed, tmp_path, monkeypatch):
    from globalopt.export import source

    monkeypatch.setattr(source, "load_model", lambda *args: load_model(*args, lazily=True))
    export(run, "packed", tmp_path / "packed")
    again, before = load_file(tmp_path / "packed" / "model.safetensors"), load_file(packed / "model.safetensors")
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_numbers_that_are_on_no_grid_are_refused_with_the_name_of_the_layer(tmp_path):
    run = made_run(tmp_path / "run", kinds=("sparse",), storages=(Storage(4, 8),))
    opened = Run.open(run)
    spec = find_layers(load_model(run / "model").model).specs[3]
    value = opened.layer(spec)
    # As if a step after the rounding had moved the values, within what their sum is checked for.
    other = Decomposition(value.S * (1 + 3e-7), value.U, value.V, scales=value.scales)
    opened.put(SOLVED_LAYER, spec, SolvedLayer(other, {}))
    with pytest.raises(ArtefactError, match=f"{spec.name} cannot be packed. Numbers of a layer are not on the grid"):
        export(run, "packed", tmp_path / "packed")


def test_factors_hold_codes_and_make_up_the_model(run, tmp_path):
    export(run, "factors", tmp_path / "out")
    records = read_json(tmp_path / "out" / "layers.json")
    specs = {spec.name: spec for spec in find_layers(load_model(run / "model").model).specs}
    coded = 0
    for name, value in read_factors(tmp_path / "out"):
        tensors, _ = read_tensors(tmp_path / "out" / "layers" / f"{name}.safetensors")
        expected = Run.open(run).layer(specs[name])
        assert value.storage == expected.storage
        for part in ("S", "U", "V"):
            assert torch.equal(getattr(value, part), getattr(expected, part))
            assert _scales(value, part) == _scales(expected, part)
        assert ("storage" in records[name]) == (not value.storage.plain)
        for part, scales in ((x, f"{x}_scales") for x in ("values", "U", "V")):
            assert (scales in tensors) == (tensors[part].dtype == torch.uint8)
            coded += scales in tensors
    assert coded > 10


def _scales(value: Decomposition, part: str) -> list[float]:
    found = None if value.scales is None else getattr(value.scales, part)
    return [] if found is None else found.tolist()


def test_factors_that_lie_are_refused(tmp_path):
    run = made_run(tmp_path / "run", kinds=("both",), storages=(Storage(4, 8),))
    export(run, "factors", tmp_path / "out")
    name = next(iter(records := read_json(tmp_path / "out" / "layers.json")))
    path = tmp_path / "out" / "layers" / f"{name}.safetensors"
    good, _ = read_tensors(path)
    for wrong in (
        {"values": good["values"] + 16},
        {"values": good["values"].float()},
        {"values_scales": good["values_scales"] * float("inf")},
        {"U_scales": good["U_scales"][:-1]},
        {"V_scales": None},
    ):
        write_tensors(path, {key: x for key, x in {**good, **wrong}.items() if x is not None})
        with pytest.raises(ArtefactError, match="does not hold the layer"):
            next(read_factors(tmp_path / "out"))
    write_tensors(path, good)
    for wrong in ({"storage": "4/9"}, {"storage": 4}, {"dtype": "int8"}, {"dtype": None}):
        write_json(tmp_path / "out" / "layers.json", {**records, name: {**records[name], **wrong}})
        with pytest.raises(ArtefactError, match="does not hold the layer"):
            next(read_factors(tmp_path / "out"))


@pytest.mark.filterwarnings("ignore")  # what peft calls is deprecated
def test_an_adapter_holds_the_decoded_numbers_and_the_command_says_so(tmp_path):
    run = made_run(tmp_path / "run", kinds=("both", "sparse"), storages=STORAGES[:2])
    export(run, "adapter", tmp_path / "out")
    model = PeftModel.from_pretrained(load(tmp_path / "out" / "base"), str(tmp_path / "out" / "adapter"))
    assert difference(model, load(run / "model")) <= 2e-5
    assert "14 layers are written decoded" in decoded_in(run, "adapter")
    assert "--format packed" in decoded_in(run, "dense")
    assert not decoded_in(run, "packed")
    card = (tmp_path / "out" / "base" / "README.md").read_text()
    assert "| bits of values and factors | 4/8 in 7 layers, 8 in 7 layers; as codes only" in card


def resealed(folder: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    """Change tensors and layers of a packed folder, with digests that are right."""
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()[seal.KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    config = read_json(folder / "config.json")
    change(tensors, config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    metadata["config"] = seal._digest_json(guard.without_notice(config))
    metadata["tensors"] = {name: seal._digest(tensor) for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt", seal.KEY: json.dumps(metadata)})


LAYER = "model.layers.0.self_attn.q_proj"


def tensor(part: str, make: Callable[[Tensor], Tensor | None]):
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        made = make(tensors.pop(f"{LAYER}.{part}"))
        if made is not None:
            tensors[f"{LAYER}.{part}"] = made

    return change


def record(**changes: Any):
    return lambda tensors, config: config["layers"][LAYER].update(changes)


ATTACKS = {
    "fewer codes": tensor("weight", lambda x: x[:-1].clone()),
    "more codes": tensor("V", lambda x: torch.cat([x, x])),
    "no codes": tensor("U", lambda x: None),
    "codes of floats": tensor("weight", lambda x: x.float()),
    "no scales": tensor("weight_scales", lambda x: None),
    "fewer scales": tensor("U_scales", lambda x: x[:-1].clone()),
    "infinite scales": tensor("weight_scales", lambda x: torch.full_like(x, 0x7F80)),
    "scales that are no numbers": tensor("weight_scales", lambda x: torch.full_like(x, 0x7FC0)),
    "scales of floats": tensor("weight_scales", lambda x: x.view(torch.bfloat16)),
    "support of more": tensor("support", lambda x: torch.full_like(x, 255)),
    "support of fewer": tensor("support", torch.zeros_like),
    "other bits": record(storage="5/8"),
    "unknown bits": record(storage="7/8"),
    "bits that are none": record(storage=[4, 8]),
    "one value more": record(values=513),
    "signs": record(signs=True),
    "no bits": lambda tensors, config: config["layers"][LAYER].pop("storage"),
    "an older version": lambda tensors, config: config.update(format_version=1),
    "a later version": lambda tensors, config: config.update(format_version=4),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_files_that_lie_are_refused(attack, packed, tmp_path):
    folder = Path(shutil.copytree(packed, tmp_path / "packed"))
    resealed(folder, attack)
    with pytest.raises(GlobalOptError) as caught:
        load_packed(folder)
    assert "\n" not in str(caught.value)


def test_files_that_are_sealed_anew_load(packed, tmp_path):
    folder = Path(shutil.copytree(packed, tmp_path / "packed"))
    resealed(folder, lambda tensors, config: None)
    assert difference(load_packed(folder), load_packed(packed)) <= 2e-5


def test_a_version_says_what_its_reader_can_do():
    with pytest.raises(ArtefactError, match=r"format version 4, this one reads 1, 2, 3\. Upgrade"):
        SparseLowRankConfig({}, format_version=4)
    plain = {"d_out": 8, "d_in": 16, "form": "2:4", "values": 64, "rank": 2, "signs": False}
    assert SparseLowRankConfig({"a": plain}, format_version=2).format_version == 1
    assert SparseLowRankConfig({"a": plain | {"storage": "4/8"}}).format_version == 2
