"""The formats besides packed: what others load is the model of the run."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from globalopt.errors import ArtefactError, GlobalOptError, UnknownNameError, UsageError
from globalopt.export.adapter import RANKS, _lora_config
from globalopt.export.factors import read_factors
from globalopt.export.formats import FORMATS, export, loading
from globalopt.export.packed import load_packed
from globalopt.models.finding import find_layers
from globalopt.models.loading import load_model
from globalopt.runs.files import PARTIAL, replacing
from globalopt.runs.folder import Run
from tests.command import contents, no_partial_files
from tests.export.runs import ALL, made_run
from tests.tiny_models import tiny_ids

KINDS = ("llama", "qwen2", "gpt2", "gemma2", "opt")
PRECISION = {torch.float32: 2e-5, torch.bfloat16: 6e-2}


def load(folder: Path, **options) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(tiny_ids(2, 9)).logits.float()


def difference(a: Any, b: Any) -> float:
    """Largest difference of logits, relative to the largest logit."""
    x, y = logits(a), logits(b)
    return float((x - y).abs().max() / y.abs().max())


@pytest.fixture(scope="module", params=[(kind, dtype) for kind in KINDS for dtype in PRECISION], ids=str)
def case(request, tmp_path_factory) -> tuple[Path, torch.dtype]:
    kind, dtype = request.param
    return made_run(tmp_path_factory.mktemp("run") / kind, kind, dtype), dtype


def test_dense_is_the_saved_model_to_the_bit(case, tmp_path):
    run, _ = case
    size = export(run, "dense", tmp_path / "out")
    assert {n: b for n, b in contents(tmp_path / "out").items() if n != "README.md"} == contents(run / "model")
    assert size == sum(len(body) for body in contents(tmp_path / "out").values())
    assert difference(load(tmp_path / "out"), load(run / "model")) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a cat")["input_ids"]


@pytest.mark.filterwarnings("ignore")  # peft's advice about Conv1D
@pytest.mark.parametrize("ranks", RANKS)
def test_an_adapter_on_its_base_is_the_model_and_merges_into_it(ranks, case, tmp_path):
    run, dtype = case
    out = tmp_path / "out"
    export(run, "adapter", out, ranks=ranks)
    dense, base = load(run / "model"), load(out / "base")
    assert difference(base, dense) > 0.1
    model = PeftModel.from_pretrained(base, str(out / "adapter"))
    found: list[Any] = [
        module for module in model.modules() if hasattr(module, "scaling") and hasattr(module, "lora_A")
    ]
    specs = {layer.name: layer for layer in Run.open(run).summary().layers if layer.rank}
    assert len(found) == len(specs)
    assert {module.scaling["default"] for module in found} == {1.0}
    own = [layer.rank for layer in specs.values()]
    shown = sorted(own) if ranks == "own" else [max(own)] * len(own)
    assert sorted(module.r["default"] for module in found) == shown
    assert difference(model, dense) <= PRECISION[dtype]
    merged = model.merge_and_unload()
    assert difference(merged, dense) <= PRECISION[dtype]
    assert type(merged) is type(dense)
    # The base is the sparse parts and nothing else.
    layers = find_layers(load_model(out / "base").model, allow_low_coverage=True)
    for spec in layers.specs:
        value = Run.open(run).layer(spec)
        assert torch.equal(layers.weight(spec.name), value.S.float())


@pytest.mark.parametrize("scaling", ["alpha over the rank of the layer", "alpha over the rank of the config"])
def test_a_program_that_knows_one_alpha_and_one_rank_reads_an_adapter_rightly(scaling, tmp_path):
    """As llama.cpp and vLLM do, which do not read the patterns of PEFT."""
    run = made_run(tmp_path / "run")
    export(run, "adapter", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    factors = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    base, dense = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out" / "base", run / "model"))
    names = [name.removesuffix(".lora_A.weight") for name in factors if "lora_A" in name]
    assert len(names) > 3
    for name in names:
        A, B = factors[f"{name}.lora_A.weight"], factors[f"{name}.lora_B.weight"]
        rank = A.shape[0] if "layer" in scaling else config["r"]
        key = f"{name.removeprefix('base_model.model.')}.weight"
        found = base[key] + config["lora_alpha"] / rank * B @ A
        torch.testing.assert_close(found, dense[key], atol=2e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")  # what peft calls is deprecated
def test_an_adapter_finds_its_base_from_inside_the_export(tmp_path, monkeypatch):
    run = made_run(tmp_path / "run")
    export(run, "adapter", tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    assert difference(AutoPeftModelForCausalLM.from_pretrained("adapter"), load(run / "model")) < 2e-5


@pytest.mark.filterwarnings("ignore")  # what peft calls is deprecated
def test_an_adapter_finds_its_base_from_anywhere(tmp_path, monkeypatch):
    run = made_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    export(run, "adapter", Path("out"))
    name = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert name == str((tmp_path / "out" / "base").resolve())
    monkeypatch.chdir("/")
    found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out" / "adapter")
    assert difference(found, load(run / "model")) < 2e-5


@pytest.mark.parametrize("name", ["dense", "adapter", "packed", "factors"])
def test_the_files_beside_the_weights_are_in_every_export(name, tmp_path):
    run = made_run(tmp_path / "run")
    files = {"preprocessor_config.json": '{"size": 28}', "chat_template.jinja": "{{ messages }}", "LICENSE": "free"}
    for file, content in files.items():
        (run / "model" / file).write_text(content)
    export(run, name, tmp_path / "out")
    folder = tmp_path / "out" / ("base" if name == "adapter" else "")
    assert {file: (folder / file).read_text() for file in files} == files
    tokenizer = "tokenizer_config.json"
    assert (folder / tokenizer).read_bytes() == (run / "model" / tokenizer).read_bytes()
    assert load_model(folder).tokenizer("ab") if name != "factors" else AutoTokenizer.from_pretrained(folder)("ab")


@pytest.mark.parametrize("name", ["dense", "adapter", "packed", "factors"])
def test_an_export_clears_what_a_killed_one_left(name, tmp_path):
    run = made_run(tmp_path / "run")
    with replacing(tmp_path / "out") as temporary:
        words = temporary.name.removesuffix(PARTIAL).rsplit(".", 3)
        temporary.mkdir()
    (tmp_path / "out").rmdir()
    left = tmp_path / f"{words[0]}.{words[1]}.{2**22 + 1}.{words[3]}{PARTIAL}"
    (left / "base").mkdir(parents=True)
    export(run, name, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}


def test_a_pattern_of_ranks_means_its_layers_and_no_others():
    ranks = {f"model.layers.{i}.mlp.up_proj": 1 + i % 3 for i in range(23)}
    config = _lora_config(ranks, transposed=False)
    patterns = config.rank_pattern or {}
    assert len(patterns) == 3
    assert patterns == config.alpha_pattern
    for name, rank in ranks.items():
        # As peft matches them: the first that fits the end of a name.
        fitting = [r for pattern, r in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name)]
        assert fitting == [rank]
    assert config.r == config.lora_alpha == 3


@pytest.mark.parametrize(
    ("kinds", "words"), [(("both", "signs"), "plane of signs"), (("sparse", "dense"), "No layer of .* has rank")]
)
def test_what_no_adapter_holds_is_refused(kinds, words, tmp_path):
    run = made_run(tmp_path / "run", kinds=kinds)
    with pytest.raises(UsageError, match=words):
        export(run, "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_factors_make_up_the_model(case, tmp_path):
    run, dtype = case
    out = tmp_path / "out"
    export(run, "factors", out)
    model = load_model(run / "model", str(dtype).removeprefix("torch.")).model
    layers = find_layers(model, allow_low_coverage=True)
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.zero_()
    values = dict(read_factors(out))
    assert values.keys() == {spec.name for spec in layers.specs}
    for name, value in values.items():
        assert value.S.dtype == dtype
        layers.set_weight(name, value.dense())
    with safe_open(out / "rest.safetensors", "pt") as rest:
        names = set(rest.keys())
        model.load_state_dict({name: rest.get_tensor(name) for name in names}, strict=False)
    assert names == saved.keys() - {f"{name}.weight" for name in values}
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, saved[name], rtol=0, atol=0)
    assert json.loads((out / "config.json").read_text())["model_type"] == model.config.model_type


def test_signs_are_factors_too(tmp_path):
    run = made_run(tmp_path / "run", kinds=("signs", "both"))
    export(run, "factors", tmp_path / "out")
    opened = Run.open(run)
    layers = find_layers(load_model(run / "model").model)
    values = dict(read_factors(tmp_path / "out"))
    for spec in layers.specs:
        value = opened.layer(spec)
        assert torch.equal(values[spec.name].dense(), value.dense())
        assert (values[spec.name].signs is None) == (value.signs is None)


@pytest.mark.parametrize("name", FORMATS)
def test_bad_runs_and_folders_are_refused_and_leave_nothing(name, tmp_path):
    run = made_run(tmp_path / "run", kinds=("both", "sparse"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").touch()
    (tmp_path / "file").touch()
    for target in ("full", "file"):
        with pytest.raises(ArtefactError, match="choose another --out"):
            export(run, name, tmp_path / target)
    with pytest.raises(ArtefactError, match="holds no run"):
        export(tmp_path / "none", name, tmp_path / "out")

    def broken(change) -> str:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run, copy)
        change(copy)
        with pytest.raises(ArtefactError) as caught:
            export(copy, name, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert no_partial_files(tmp_path)
        return str(caught.value)

    layer = next((run / "layers").iterdir()).name
    assert "did not finish" in broken(lambda copy: (copy / "summary.json").unlink())
    assert "did not finish" in broken(lambda copy: shutil.rmtree(copy / "model"))
    assert layer in broken(lambda copy: (copy / "layers" / layer).unlink())
    assert layer in broken(lambda copy: (copy / "layers" / layer).write_bytes(b"nothing"))
    assert "broken" in broken(lambda copy: (copy / "model" / "model.safetensors").write_bytes(b"nothing"))

    def other_model(copy: Path) -> None:
        shutil.rmtree(copy / "model")
        shutil.copytree(made_run(tmp_path / "other", kinds=("sparse", "both")) / "model", copy / "model")
        shutil.rmtree(tmp_path / "other")

    assert "does not make up the weight" in broken(other_model)


def test_a_dropped_layer_and_a_full_disk(tmp_path, monkeypatch):
    run = made_run(tmp_path / "run", kinds=("zero", "zero"))
    export(run, "packed", tmp_path / "packed")
    assert difference(load(tmp_path / "packed"), load(run / "model")) == 0

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(ArtefactError, match="the disk is full"):
        export(run, "dense", tmp_path / "dense")
    assert no_partial_files(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_model_that_does_not_fit_is_exported_block_by_block(name, kind, tmp_path, monkeypatch):
    run = made_run(tmp_path / "run", kind, torch.bfloat16)
    export(run, name, tmp_path / "whole")
    monkeypatch.setattr("globalopt.export.source.load_model", partial(load_model, lazily=True))
    export(run, name, tmp_path / "lazily")
    whole, lazily = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "lazily")
    assert whole.keys() == lazily.keys()
    assert all(torch.equal(whole[key], lazily[key]) for key in whole)
    if name == "packed":
        load_packed(tmp_path / "lazily")


def tensors_of(folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Every tensor below `folder`, by its folder and its name."""
    found = {}
    for path in folder.rglob("*.safetensors"):
        place = path.stem if path.parent.name == "layers" else str(path.parent.relative_to(folder))
        found |= {(place, name): tensor for name, tensor in load_file(path).items()}
    return found


def test_formats_are_named(tmp_path):
    with pytest.raises(UnknownNameError, match="did you mean 'packed'"):
        export(tmp_path, "pakced", tmp_path / "out")
    assert all(loading(name, Path("x")) for name in FORMATS)
    assert set(ALL) >= {"both", "zero"}


FACTORS = {
    "layers.json": [b"[]", b"{", b'{"../x": {}}', b'{"a/b": {}}', b'{"": {}}'],
    "layers/NAME.safetensors": [b"", b"nothing"],
}


@pytest.mark.parametrize(("name", "body"), [(name, body) for name, bodies in FACTORS.items() for body in bodies])
def test_broken_factors_are_refused(name, body, tmp_path):
    export(made_run(tmp_path / "run"), "factors", tmp_path / "out")
    layer = next((tmp_path / "out" / "layers").iterdir()).stem
    (tmp_path / "out" / name.replace("NAME", layer)).write_bytes(body)
    with pytest.raises(GlobalOptError):
        list(read_factors(tmp_path / "out"))
