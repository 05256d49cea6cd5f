"""Exports of models whose embeddings are in few bits: packed holds their codes, and computes what dense computes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from globalopt.errors import ArtefactError, GlobalOptError
from globalopt.export.embedding import PackedEmbedding, TiedHead
from globalopt.export.formats import decoded_in, export
from globalopt.export.packed import load_packed
from globalopt.export.quantizer import packed_embeddings, packed_layers, set_compute
from globalopt.models.loading import load_model
from globalopt.models.saving import save_dense
from globalopt.runs.files import read_json
from globalopt.runs.folder import Run
from globalopt.values.budget import Target
from globalopt.values.storage import Storage
from tests.command import WINDOWS, done
from tests.export.runs import assert_same_export
from tests.export.test_few_bits import PRECISION, difference, resealed
from tests.tiny_models import tiny_ids, tiny_model, tiny_tokenizer

KINDS = {"llama": False, "gpt2": True, "gemma2": True}
"""Whether the head is tied; gemma2 multiplies its embeddings by a number."""


def load(folder: Path, **options) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def made(folder: Path, kind: str, text: Path, dtype: torch.dtype = torch.bfloat16, bits: int = 6) -> Path:
    """A finished run of a tiny model that was saved in `dtype`, with embeddings and layers in few bits."""
    save_dense(tiny_model(kind), tiny_tokenizer(), folder / "model", dtype)
    options = ("--embeddings", bits, "--storage", 8, "--solver", "magnitude", "--samples", 0, *WINDOWS, "-q")
    done("compress", folder / "model", "--budget", 0.4, *options, "--calibration", text, "--out", folder / "run")
    return folder / "run"


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory, tiny_text) -> tuple[str, Path]:
    return request.param, made(tmp_path_factory.mktemp("run"), request.param, tiny_text)


@pytest.fixture(scope="module")
def packed(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "packed"
    export(run[1], "packed", folder)
    return folder


def test_the_packed_model_computes_what_its_dense_export_computes(run, packed, tmp_path):
    export(run[1], "dense", tmp_path / "dense")
    for dtype in (torch.bfloat16, torch.float32):
        dense, model = load(tmp_path / "dense", dtype=dtype), load(packed, dtype=dtype)
        assert isinstance(model.get_input_embeddings(), PackedEmbedding)
        assert isinstance(model.get_output_embeddings(), TiedHead) == KINDS[run[0]]
        # The dense export was rounded to bfloat16 once, the codes were not.
        for compute in ("auto", "split", "merged", "unpack"):
            set_compute(model, compute)
            assert difference(model, dense) <= PRECISION[torch.bfloat16]
    again = model.dequantize()
    assert not list(packed_embeddings(again))
    assert not list(packed_layers(again))
    assert difference(again, dense) <= PRECISION[torch.bfloat16]
    assert (again.get_input_embeddings().weight is again.get_output_embeddings().weight) == KINDS[run[0]]
    assert type(again.get_input_embeddings()) is type(dense.get_input_embeddings())


@pytest.mark.parametrize("kind", KINDS)
def test_in_float32_the_packed_model_is_the_dense_one(kind, tiny_text, tmp_path):
    folder = made(tmp_path, kind, tiny_text, torch.float32, bits=8)
    export(folder, "packed", tmp_path / "packed")
    assert difference(load(tmp_path / "packed"), load(folder / "model")) <= PRECISION[torch.float32]


def test_files_are_as_large_as_the_budget_counts(run, packed):
    tensors = load_file(packed / "model.safetensors")
    summary = Run.open(run[1]).summary()
    assert read_json(packed / "config.json")["quantization_config"]["format_version"] == 3

    def size(name: str) -> int:
        return sum(x.nbytes for key, x in tensors.items() if key.rpartition(".")[0] == name and "bias" not in key)

    for each in summary.embeddings:
        assert size(each.name) == each.bytes
    for layer in summary.layers:
        target = Target(layer.rank, layer.nnz, storage=Storage.parse(layer.storage))
        assert size(layer.name) == target.bytes(layer)  # pyright: ignore[reportArgumentType]
    names = [each.name for each in (*summary.embeddings, *summary.layers)]
    assert sum(size(name) for name in names) == summary.used


def test_saved_again_it_is_the_same_to_the_bit(packed, tmp_path):
    model = load(packed)
    model(tiny_ids(1, 3))
    model.save_pretrained(tmp_path / "again")
    assert_same_export(tmp_path / "again", packed)


def test_casts_lose_no_code(run, packed, tmp_path):
    model = load(packed)
    model(tiny_ids(1, 3))
    model.to(torch.float16)
    model.to(torch.float32)
    assert difference(model, load(packed, dtype=torch.float32)) <= PRECISION[torch.bfloat16]
    codes = {name: x for name, x in load_file(packed / "model.safetensors").items() if x.dtype == torch.uint8}
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], codes[name]) for name in codes)


def test_it_is_loaded_and_evaluated_like_any_model(run, packed):
    model = load_packed(packed, device="cpu", compute="unpack")
    assert difference(model, load(packed)) <= PRECISION[torch.bfloat16]
    assert next(iter(packed_embeddings(model)))[1]._held is None
    ids = cast("Any", model).generate(tiny_ids(1, 4), max_new_tokens=3, do_sample=False)
    assert ids.shape == (1, 7)
    loaded = load_model(packed, device="cpu")
    assert loaded.model.dtype == torch.float32


def test_rows_are_decoded_alone_where_groups_do_not_span_them():
    from globalopt.embeddings.coding import encode_matrix

    W = torch.randn(50, 128, generator=torch.Generator().manual_seed(0))
    for bits in (8, 6):
        embedding = PackedEmbedding.of(encode_matrix(W, bits), torch.nn.Embedding(50, 128), torch.float32)
        ids = torch.tensor([[3, 49, 3], [0, 1, 2]])
        rows = embedding(ids)
        assert embedding._held is None
        assert torch.equal(rows, embedding.matrix()[ids])
        assert embedding(ids[:0]).shape == (0, 3, 128)


@pytest.mark.parametrize("name", ["dense", "adapter", "factors"])
def test_the_other_formats_say_that_they_hold_decoded_embeddings(run, name):
    count = len(Run.open(run[1]).summary().embeddings)
    assert f"{count} embeddings are written decoded" in decoded_in(run[1], name)
    assert not decoded_in(run[1], "packed")
    card = (run[1] / "model" / "README.md").read_text()
    assert "| bits of embeddings | 6 of " in card
    assert "layers and of the embeddings: " in card


def test_codes_of_another_run_are_refused(run, tmp_path):
    folder = Path(shutil.copytree(run[1], tmp_path / "run"))
    name = Run.open(folder).summary().embeddings[0].name
    path = folder / "embeddings" / f"{name}.safetensors"
    body = bytearray(path.read_bytes())
    body[-200] ^= 0x7F
    path.unlink()
    path.write_bytes(bytes(body))
    with pytest.raises(ArtefactError, match="different runs"):
        export(folder, "packed", tmp_path / "packed")
    path.unlink()
    with pytest.raises(ArtefactError):
        export(folder, "packed", tmp_path / "packed")


NAME = "model.embed_tokens"


def tensor(part: str, make):
    def change(tensors, config):
        found = make(tensors.pop(f"{NAME}.{part}"))
        if found is not None:
            tensors[f"{NAME}.{part}"] = found

    return change


def record(**changes):
    return lambda tensors, config: config["embeddings"][NAME].update(changes)


ATTACKS = {
    "fewer codes": tensor("weight", lambda x: x[:-1].clone()),
    "codes of floats": tensor("weight", lambda x: x.float()),
    "no scales": tensor("weight_scales", lambda x: None),
    "infinite scales": tensor("weight_scales", lambda x: torch.full_like(x, 0x7F80)),
    "other bits": record(bits=8),
    "unknown bits": record(bits=7),
    "more rows": record(rows=129),
    "another head": record(head="model.norm"),
    "no head": record(head="nothing"),
    "more facts": record(more=1),
    "no number": record(rows="128"),
    "another name": lambda tensors, config: config.update(embeddings={"x": config["embeddings"][NAME]}),
    "a layer": lambda tensors, config: config.update(embeddings={"model.norm": config["embeddings"][NAME]}),
    "an older version": lambda tensors, config: config.update(format_version=2),
    "no embeddings": lambda tensors, config: config.pop("embeddings"),
    "a list": lambda tensors, config: config.update(embeddings=[NAME]),
}


@pytest.fixture(scope="module")
def untied(tmp_path_factory, tiny_text) -> Path:
    folder = tmp_path_factory.mktemp("untied")
    export(made(folder, "llama", tiny_text), "packed", folder / "packed")
    return folder / "packed"


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_files_that_lie_are_refused(attack, untied, tmp_path):
    folder = Path(shutil.copytree(untied, tmp_path / "packed"))
    resealed(folder, attack)
    with pytest.raises(GlobalOptError) as caught:
        load_packed(folder)
    assert "\n" not in str(caught.value)
