"""A model whose blocks are read when they are needed gives, bit for bit, what the whole model gives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from globalopt.analysis.attribution import attribute
from globalopt.analysis.sensitivity import backward_sweep, label_gradients
from globalopt.errors import ArtefactError, GlobalOptError, NumericalError, UnsupportedModelError, UsageError
from globalopt.evaluation.perplexity import evaluate_both
from globalopt.machine.memory import in_file
from globalopt.models.batch import Batch
from globalopt.models.block_runner import BlockRunner
from globalopt.models.checkpoint import INDEX, SINGLE
from globalopt.models.finding import find_layers
from globalopt.models.identity import model_fingerprint, weights_sha256
from globalopt.models.layers import ModelLayers, check_finite
from globalopt.models.loading import LoadedModel, load_model
from globalopt.models.saving import save_dense
from globalopt.models.streaming import LazyBlocks, dtype_of, lazy_blocks
from globalopt.models.structure import load_structure
from globalopt.models.walk import walk_blocks
from globalopt.objective.kl_to_dense import ModelObjective
from globalopt.text.splits import Split
from tests.command import WINDOWS, assert_alike, contents, done, no_partial_files, read, refused, write_text
from tests.tiny_models import BLOCKS, KINDS, save_tiny, tiny_ids, tiny_model, tiny_tokenizer

CONVERTED = ("gpt_neox", "qwen3_moe")
"""Kinds whose checkpoints have other names than the model."""

LAZY_KINDS = [kind for kind in KINDS if kind not in CONVERTED]
UP = "model.layers.0.mlp.up_proj.weight"


def sharded(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.bfloat16) -> Path:
    """A tiny model in several files."""
    model: Any = tiny_model(kind).to(dtype)  # pyright: ignore[reportArgumentType]
    model.save_pretrained(folder, max_shard_size="10KB")
    tiny_tokenizer().save_pretrained(folder)
    assert (folder / INDEX).is_file()
    return folder


def both(folder: Path, dtype: str = "auto") -> tuple[LoadedModel, LoadedModel]:
    """The model whole and lazily."""
    whole, lazy = (load_model(folder, dtype, "cpu", lazily=lazily) for lazily in (False, True))
    # The whole model may lie in the mapped file at any offset, and a BLAS may sum unaligned data in another order.
    for parameter in whole.model.parameters():
        parameter.data = parameter.data.clone()
    assert lazy_blocks(whole.model) is None
    assert lazy_blocks(lazy.model) is not None
    return whole, lazy


def blocks_of(loaded: LoadedModel) -> LazyBlocks:
    lazy = lazy_blocks(loaded.model)
    assert lazy is not None
    return lazy


@contextmanager
def one_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """While open, fail when a block is read while another is in memory; gives the blocks read, in order."""
    read: list[int] = []
    load = LazyBlocks._load

    def watched(self: LazyBlocks, index: int, device: torch.device) -> None:
        assert self.opened == ()
        read.append(index)
        load(self, index, device)
        in_memory = {i for i, block in enumerate(self._blocks) if not any(p.is_meta for p in block.parameters())}
        assert in_memory == {index}

    with monkeypatch.context() as patch:
        patch.setattr(LazyBlocks, "_load", watched)
        yield read


@pytest.mark.parametrize("kind", LAZY_KINDS)
def test_a_lazy_model_is_the_whole_one(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, lazy = both(save_tiny(tmp_path, kind, dtype=torch.bfloat16))
    assert (dtype_of(lazy.model), lazy.checkpoint_dtype) == (dtype_of(whole.model), whole.checkpoint_dtype)
    ids = tiny_ids(2, 9)
    with one_block_at_a_time(monkeypatch) as read, torch.no_grad():
        assert torch.equal(lazy.model(input_ids=ids).logits, whole.model(input_ids=ids).logits)
        assert read == list(range(BLOCKS))
        here, there = find_layers(lazy.model), find_layers(whole.model)
        assert here.specs == there.specs
        assert here.coverage == there.coverage
        assert weights_sha256(here) == weights_sha256(there)
        assert model_fingerprint(here) == model_fingerprint(there)
        check_finite(here)
        for spec in here.specs:
            assert torch.equal(here.weight(spec.name), there.weight(spec.name))
    assert blocks_of(lazy).opened == ()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_walk_there_and_back_is_that_of_the_whole_model(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [Batch(tiny_ids(2, 6)), Batch(tiny_ids(1, 6, seed=1))]
    answers = []
    for loaded in both(sharded(tmp_path / "model"), dtype):
        layers = find_layers(loaded.model)
        with one_block_at_a_time(monkeypatch):
            runner = BlockRunner(layers, batches, tmp_path / "scratch" if layers.lazy else None)
            grams, inputs = [], []
            for visit in walk_blocks(runner, "cpu"):
                grams += [gram.matrix for gram in visit.grams().values()]
                inputs += [visit.inputs, visit.outputs()] if visit.index == BLOCKS - 1 else [visit.inputs]
            upstream = label_gradients(runner, inputs[-1], 0)
            swept = list(backward_sweep(runner, inputs, layers.specs, upstream, torch.device("cpu")))
            assert all(found.output_gram is not None for found in swept)
            answers.append([*grams, *(found.output_gram.matrix for found in swept if found.output_gram)])
    assert_alike(*answers)
    # Files of hidden states have no names.
    assert list((tmp_path / "scratch").iterdir()) == []


def test_the_loss_of_a_lazy_model_is_attributed_to_its_layers_as_that_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = []
    for loaded in both(sharded(tmp_path / "model"), "float32"):
        layers = find_layers(loaded.model)
        with one_block_at_a_time(monkeypatch):
            model = ModelObjective(BlockRunner(layers, [Batch(tiny_ids(2, 6)), Batch(tiny_ids(1, 6, seed=1))]))
            weights = {spec.name: 0.9 * model.dense(spec.name) for spec in layers.specs}
            found = attribute(model, weights, range(model.chunks), torch.device("cpu"))
            answers.append([found.losses, *found.shares.values()])
            model.close()
        assert weights_sha256(layers) == weights_sha256(find_layers(load_model(tmp_path / "model", device="cpu").model))
    assert len(answers[0]) == 15
    assert float(answers[0][0].min()) > 0
    assert_alike(*answers)


def test_what_was_put_in_place_is_there_at_every_visit(tmp_path: Path) -> None:
    whole, lazy = (find_layers(loaded.model) for loaded in both(sharded(tmp_path)))
    assert lazy.lazy is not None
    first, last = whole.specs[0], whole.specs[-1]
    W = torch.randn(last.d_out, last.d_in)
    made: list[str] = []

    def make() -> Tensor:
        made.append(last.name)
        return W

    norm = "model.layers.0.input_layernorm.weight"
    for layers in (whole, lazy):
        with layers.resident(first.block):
            layers.set_weight(first.name, torch.zeros(first.d_out, first.d_in))
            layers.set_parameter(norm, torch.ones(first.d_in))
            assert not layers.module(first.name).weight.any()
        layers.place(last.name, make)
    assert made == [last.name]
    ids = tiny_ids(1, 7)
    with torch.no_grad():
        assert torch.equal(lazy.model(input_ids=ids).logits, whole.model(input_ids=ids).logits)
        assert torch.equal(lazy.model(input_ids=ids).logits, whole.model(input_ids=ids).logits)
    assert made == [last.name] * 3
    assert torch.equal(lazy.weight(last.name), W)
    assert weights_sha256(lazy) == weights_sha256(whole)
    # The dense weights are still to be had.
    dense = find_layers(load_model(tmp_path, device="cpu").model)
    assert torch.equal(lazy.originals()[last.name], dense.weight(last.name))
    assert list(lazy.originals()) == [spec.name for spec in lazy.specs]
    with lazy.resident(last.block):
        lazy.restore(last.name, lazy.originals())
        assert torch.equal(lazy.module(last.name).weight, dense.module(last.name).weight)
    assert torch.equal(lazy.weight(last.name), dense.weight(last.name))


def test_what_does_not_fit_in_place_is_refused(tmp_path: Path) -> None:
    layers = find_layers(load_model(save_tiny(tmp_path), device="cpu", lazily=True).model)
    name = layers.specs[0].name
    layers.place(name, lambda: torch.full((32, 32), float("nan")))
    with pytest.raises(NumericalError, match=rf"weight of layer {name} is not finite"):
        layers.model(input_ids=tiny_ids(1, 3))
    layers.place(name, lambda: torch.zeros(3, 3))
    with pytest.raises(ArtefactError, match=r"is \(32, 32\); its replacement is \(3, 3\)"):
        layers.weight(name)
    with pytest.raises(UsageError, match="the new weight is"):
        layers.set_weight(name, torch.zeros(3, 3))
    assert layers.lazy is not None
    assert layers.lazy.opened == ()


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: x for path in sorted(folder.glob("*.safetensors")) for name, x in load_file(path).items()}


@pytest.mark.parametrize("kind", LAZY_KINDS)
def test_a_lazy_model_is_saved_as_the_whole_one(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny(tmp_path / "source", kind, dtype=torch.bfloat16)
    pair = both(source)
    for loaded, out in zip(pair, ("whole", "lazy"), strict=True):
        layers = find_layers(loaded.model)
        spec = layers.specs[2]
        layers.set_weight(spec.name, torch.ones(spec.d_out, spec.d_in))
        with one_block_at_a_time(monkeypatch):
            save_dense(loaded.model, loaded.tokenizer, tmp_path / out, loaded.checkpoint_dtype)
    expected, found = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "lazy")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype == torch.bfloat16
        assert torch.equal(found[name], tensor), name
    files = {path.name for path in (tmp_path / "whole").iterdir()} - {SINGLE}
    shards = {f"model-{i + 1:05}-of-{BLOCKS + 1:05}.safetensors" for i in range(BLOCKS + 1)}
    assert {path.name for path in (tmp_path / "lazy").iterdir()} == files | shards | {INDEX}
    for file in files:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "lazy" / file).read_bytes(), file
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "lazy")
    ids = tiny_ids(1, 5)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")(input_ids=ids).logits
    # The weights are equal; they lie elsewhere in their files, and a BLAS may sum in another order there.
    torch.testing.assert_close(again(input_ids=ids).logits, expected)
    size = sum(tensor.nbytes for tensor in found.values())
    assert json.loads((tmp_path / "lazy" / INDEX).read_text())["metadata"]["total_size"] == size


def test_evaluation_of_lazy_models_gives_the_same_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = Split("validation", tiny_ids(5, 8), tuple(range(0, 40, 8)), (0, 40), "random", "no text", 0)
    folders = sharded(tmp_path / "dense"), save_tiny(tmp_path / "other", seed=1)
    dense, other = both(folders[0]), both(folders[1])
    whole = evaluate_both(other[0].model, dense[0].model, split, 2)
    with one_block_at_a_time(monkeypatch) as read:
        lazy = evaluate_both(other[1].model, dense[1].model, split, 2, scratch=tmp_path / "scratch")
    # Each model: once for the kind of its first block's output, once to walk it.
    assert read == [0, 0, 1, 0, 0, 1]
    for here, there in zip(lazy, whole, strict=True):
        assert here.nll == pytest.approx(there.nll, rel=1e-6)
        assert here.kl == (there.kl if there.kl is None else pytest.approx(there.kl, rel=1e-5))
        assert here.dtype == there.dtype


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    for loaded in both(save_tiny(tmp_path, "gemma2")):
        head = loaded.model.get_output_embeddings()
        assert head is not None
        assert head.weight is loaded.model.get_input_embeddings().weight


def test_a_tied_head_may_be_in_the_checkpoint_if_it_is_the_same(tmp_path: Path) -> None:
    tensors = load_file(save_tiny(tmp_path, "gemma2") / SINGLE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    load_model(tmp_path, device="cpu", lazily=True)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match="different weights"):
        load_model(tmp_path, device="cpu", max_memory=2**40, lazily=True)


def _edit(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / json.loads((folder / INDEX).read_text())["weight_map"][UP]
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return damage


def _cut(folder: Path) -> None:
    path = sorted(folder.glob("model-*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])


def _forget(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"][UP]
    (folder / INDEX).write_text(json.dumps(index))


BROKEN: dict[str, tuple[Callable[[Path], object], type[GlobalOptError], str]] = {
    "a tensor missing in its file": (_edit(lambda t: t.pop(UP)), ArtefactError, rf"that its index names, {UP}"),
    "a tensor missing in the index": (_forget, ArtefactError, rf"holds the tensor {UP}, which .* does not place there"),
    "a tensor of another shape": (
        _edit(lambda t: t.update({UP: torch.zeros(3, 3)})),
        ArtefactError,
        rf"shapes its config.json says: {UP} is \(3, 3\), not \(48, 32\)",
    ),
    "a shard cut off": (_cut, ArtefactError, "broken or cut off"),
    "a shard missing": (lambda f: next(f.glob("model-*")).unlink(), ArtefactError, "lacks the file model-"),
    "an index that is none": (lambda f: (f / INDEX).write_text("[]"), ArtefactError, "no index of weights"),
    "a quantised model": (
        lambda f: (f / "config.json").write_text(
            json.dumps({**json.loads((f / "config.json").read_text()), "quantization_config": {"quant_method": "x"}})
        ),
        UnsupportedModelError,
        "quantised",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_one_line(case: str, tmp_path: Path) -> None:
    damage, kind, message = BROKEN[case]
    damage(sharded(tmp_path))
    with pytest.raises(GlobalOptError, match=message) as caught:
        load_model(tmp_path, device="cpu", max_memory=2**40, lazily=True)
    assert isinstance(caught.value, kind)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", CONVERTED)
def test_a_checkpoint_that_must_be_converted_is_loaded_whole_or_refused(kind: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, kind, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedModelError, match=r"must be converted .* Raise --max-memory"):
        load_model(tmp_path, device="cpu", max_memory=2**40, lazily=True)
    whole = load_model(tmp_path, device="cpu", lazily=True)
    assert lazy_blocks(whole.model) is None
    assert whole.checkpoint_dtype == torch.bfloat16


def test_a_model_that_is_too_large_and_cannot_be_read_block_by_block_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path, CONVERTED[0])
    monkeypatch.setattr("globalopt.models.loading.available", lambda place: 1000)
    monkeypatch.setattr("globalopt.models.loading.resident", lambda: 0)
    too_large = r"does not fit into memory: a run that loads it whole needs \S+ KiB, and "
    why = r"The checkpoint has .* must be converted .* Raise --max-memory"
    with pytest.raises(UnsupportedModelError, match=rf"{too_large}1000 B are available\. {why}"):
        load_model(tmp_path, device="cpu")
    with pytest.raises(UnsupportedModelError, match=rf"{too_large}110 KiB are left of --max-memory\. {why}"):
        load_model(tmp_path, device="cpu", max_memory=110 * 2**10)
    # A larger --max-memory, as the message says, or the caller's explicit wish.
    assert lazy_blocks(load_model(tmp_path, device="cpu", max_memory=2**30).model) is None
    assert lazy_blocks(load_model(tmp_path, device="cpu", lazily=False).model) is None


def test_memory_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(sharded(tmp_path / "model"), tmp_path / "copy")
    monkeypatch.setattr("globalopt.models.loading.resident", lambda: 1000)
    size = 2 * sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert lazy_blocks(load_model(folder, device="cpu", max_memory=1000 + 3 * size).model) is None
    assert lazy_blocks(load_model(folder, device="cpu", max_memory=999 + 3 * size).model) is not None
    # Hidden states of 10 tokens, in float32, in front of both blocks and behind the last.
    assert lazy_blocks(load_model(folder, device="cpu", max_memory=1000 + 3 * size, tokens=10).model) is not None
    beside = 10 * 32 * 3 * 4
    assert lazy_blocks(load_model(folder, device="cpu", max_memory=1000 + 3 * size + beside, tokens=10).model) is None
    with pytest.raises(UsageError, match=r"--max-memory 1.95 KiB is too little: even block by block copy needs"):
        load_model(folder, device="cpu", max_memory=2000)
    assert lazy_blocks(load_model(folder, device="cpu").model) is None
    monkeypatch.setattr("globalopt.models.loading.available", lambda place: size)
    assert lazy_blocks(load_model(folder, device="cpu").model) is not None


def test_a_structure_has_the_layers_and_sites_of_the_model_and_no_weights(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    whole = find_layers(load_model(folder, device="cpu").model)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    structure: ModelLayers = find_layers(load_structure(folder)[0])
    assert structure.specs == whole.specs
    assert structure.coverage == whole.coverage
    assert not structure.weight(structure.specs[0].name).any()


def test_hidden_states_in_a_file_are_the_same_and_leave_nothing(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        states = torch.randn(2, 3, 5).to(dtype)
        kept = in_file(states, tmp_path / "scratch")
        assert torch.equal(kept, states)
        assert kept.dtype == dtype
    assert list((tmp_path / "scratch").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match="Cannot keep hidden states"):
        in_file(torch.zeros(1), tmp_path / "file")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")


def test_a_lazy_run_ends_as_a_whole_one(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sharded(tmp_path / "model")
    monkeypatch.setattr("globalopt.models.loading.resident", lambda: 0)
    # Also no hidden state has room in memory.
    monkeypatch.setattr("globalopt.pipeline.session.resident", lambda: 10**9)
    options = ("--calibration", text, *WINDOWS, "--device", "cpu", "--quiet")
    method = ("--allocator", "knapsack", "--set", "steps=10", "--batch-size", "4")
    method += ("--match", "block", "--match-set", "epochs=2,share=0.5,held-out=0", "--no-cache")
    done("search", model, "--budget", "0.5", "--out", tmp_path / "whole", *method, *options)
    with one_block_at_a_time(monkeypatch):
        limited = (*options, "--max-memory", "200KB")
        done("search", model, "--budget", "0.5", "--out", tmp_path / "lazy", *method, *limited)
        other = ("--budget-file", tmp_path / "whole" / "budget.json", "--solver", "hassle-free", "--set", "steps=4")
        done("compress", model, *other, "--out", tmp_path / "again", *limited)
    whole, lazy = contents(tmp_path / "whole"), contents(tmp_path / "lazy")
    made = {name for name in whole if name.partition("/")[0] not in ("model", "report") and name.count("/")}
    stages = {name.split("/")[1] for name in made if name.startswith("work/")}
    assert stages >= {"refinement", "anchors", "spans", "grams", "labels"}
    for name in (*sorted(made), "budget.json"):
        if name.endswith(".safetensors"):
            assert_alike(load_file(tmp_path / "lazy" / name), load_file(tmp_path / "whole" / name), name)
        elif name.endswith(".json"):
            assert_alike(json.loads(lazy[name]), json.loads(whole[name]), name)
    expected, found = (tensors_of(tmp_path / out / "model") for out in ("whole", "lazy"))
    assert_alike(found, expected)
    summaries = [read(tmp_path / out / "summary.json") for out in ("whole", "lazy")]
    for which in ("dense", "compressed"):
        for here, there in zip(*(summary[which] for summary in summaries), strict=True):
            assert here["nll"] == pytest.approx(there["nll"], rel=1e-6)
            assert here["text_sha256"] == there["text_sha256"]
    assert no_partial_files(tmp_path / "lazy")
    assert [match["kept_epoch"] for match in summaries[0]["matching"]] == [2, 2]
    norms = [name for name in expected if "norm" in name and ".layers." in name]
    dense = tensors_of(model)
    assert norms
    assert not any(torch.equal(found[name], dense[name]) for name in norms)
    # A run that was made lazily is the same run when it is gone on with whole.
    done("search", model, "--budget", "0.5", "--out", tmp_path / "lazy", *method, *options)


def test_memory_that_is_no_size_or_too_little_is_refused(tmp_path: Path, text: Path) -> None:
    model = sharded(tmp_path / "model")
    words = (model, "--calibration", text, "--out", tmp_path / "run", "--device", "cpu", "--quiet")
    assert "'8 apples' is no amount of memory" in refused(2, "search", *words, "--max-memory", "8 apples")
    assert "--max-memory 100 KiB is too little" in refused(2, "search", *words, "--max-memory", "100KiB")
    assert not (tmp_path / "run").exists()
