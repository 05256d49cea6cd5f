"""A packed model through transformers: it loads as what was exported, and saves again."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import globalopt
from globalopt.errors import ArtefactError, UsageError
from globalopt.export.formats import export
from globalopt.export.linear import SparseLowRankLinear
from globalopt.export.loading import unpacked
from globalopt.export.packed import load_packed
from globalopt.export.quantizer import METHOD, SparseLowRankConfig, packed_layers, set_compute
from globalopt.models.loading import load_model
from globalopt.models.saving import save_dense
from tests.command import contents
from tests.export.runs import ALL, made_run
from tests.tiny_models import tiny_ids

WITH_SIGNS = (*ALL, "signs")
KINDS = ("llama", "qwen3", "gpt2", "gemma2", "opt", "gpt_neox", "qwen3_moe")
PRECISION = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return made_run(tmp_path_factory.mktemp("run") / "llama", kinds=WITH_SIGNS)


@pytest.fixture(scope="module")
def packed(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "llama"
    export(run, "packed", folder)
    return folder


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(tiny_ids(2, 9)).logits.float()


def same(a: PreTrainedModel, b: PreTrainedModel, precision: float) -> bool:
    """Whether logits are; of a mixture of experts those before rounding sends a token to another expert."""
    x, y = logits(a), logits(b)
    alike = torch.ones(x.shape[:2], dtype=torch.bool)
    if experts := getattr(b.config, "num_experts_per_tok", None):
        for here, there in zip(routers(a), routers(b), strict=True):
            chosen = (router.topk(experts).indices.sort().values for router in (here, there))
            alike &= torch.eq(*chosen).all(-1).view(alike.shape)
        # Attention hands on to later tokens what became of one.
        alike = alike.cummin(1).values
        assert float(alike.float().mean()) > 0.6
    return float((x - y).abs()[alike].max()) <= precision * float(y.abs().max())


def routers(model: PreTrainedModel) -> tuple[torch.Tensor, ...]:
    with torch.inference_mode():
        return model(tiny_ids(2, 9), output_router_logits=True).router_logits


def load(folder: Path, **options) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_loads_as_what_was_exported(kind, dtype, tmp_path):
    run = made_run(tmp_path / "run", kind, dtype, WITH_SIGNS)
    export(run, "packed", tmp_path / "packed")
    dense, model = load(run / "model"), load(tmp_path / "packed")
    assert model.dtype == dense.dtype == dtype
    assert len(list(packed_layers(model))) > 5
    for compute in ("split", "merged", "unpack"):
        set_compute(model, compute)
        assert same(model, dense, PRECISION[dtype])
    assert model.num_parameters() > 0
    if kind != "qwen3_moe":  # little of it is packed
        size = (tmp_path / "packed" / "model.safetensors").stat().st_size
        assert size < (run / "model" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}, {"device_map": "auto"}, {"device_map": {"": "cpu"}}])
@pytest.mark.parametrize("dtype", [None, "auto", torch.float32, torch.bfloat16, torch.float16])
def test_it_loads_in_every_type_and_place(run, packed, options, dtype):
    given = {} if dtype is None else {"dtype": dtype}
    model = load(packed, **given, **options)
    expected = dtype if isinstance(dtype, torch.dtype) else torch.float32
    assert model.dtype == expected
    assert model.device.type == "cpu"
    assert not any(p.requires_grad for _, layer in packed_layers(model) for p in layer.parameters())
    assert same(model, load(run / "model", **given), PRECISION[expected])


def test_parts_of_it_can_be_offloaded(run, packed, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    model = load(packed, device_map=places, offload_folder=tmp_path)
    assert same(model, load(run / "model"), 2e-5)
    assert {layer.path for _, layer in packed_layers(model.get_submodule("model.layers.1"))} == {"unpack"}


def test_it_generates_what_the_dense_model_generates(run, packed):
    ids = tiny_ids(1, 5)
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = load(run / "model").generate(ids, **options)
    assert torch.equal(load(packed).generate(ids, **options), expected)
    assert AutoTokenizer.from_pretrained(packed)("a cat")["input_ids"]
    assert json.loads((packed / "config.json").read_text())["use_cache"] is True


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_dequantized_it_is_an_ordinary_model(kind, tmp_path):
    run = made_run(tmp_path / "run", kind, kinds=WITH_SIGNS)
    export(run, "packed", tmp_path / "packed")
    dense, model = load(run / "model"), load(tmp_path / "packed").dequantize()
    assert not list(packed_layers(model))
    assert same(model, dense, 2e-6)
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    again, names = load(tmp_path / "plain", output_loading_info=True)
    assert not names["missing_keys"]
    assert same(again, dense, 2e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_bfloat16_it_becomes_dense_in_the_type_that_it_has(dtype, tmp_path):
    run = made_run(tmp_path / "run", dtype=torch.bfloat16)
    export(run, "packed", tmp_path / "packed")
    loaded = unpacked(load_model(tmp_path / "packed", dtype=dtype, device="cpu"))
    assert {p.dtype for p in loaded.model.parameters()} == {loaded.model.dtype} == {getattr(torch, dtype)}
    assert loaded.checkpoint_dtype == torch.bfloat16
    assert same(loaded.model, load(run / "model", dtype=getattr(torch, dtype)), PRECISION[torch.bfloat16])
    # A dense copy has nothing of the packed tensors.
    save_dense(loaded.model, loaded.tokenizer, tmp_path / "dense", torch.bfloat16, tmp_path / "packed")
    again, names = load(tmp_path / "dense", output_loading_info=True)
    assert not names["missing_keys"]
    assert not names["unexpected_keys"]
    assert same(again, load(run / "model"), PRECISION[torch.bfloat16])


def test_saved_packed_it_becomes_dense_and_so_does_the_copy(tmp_path):
    run = made_run(tmp_path / "run", dtype=torch.bfloat16)
    export(run, "packed", tmp_path / "packed")
    model = load(tmp_path / "packed", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "again")
    expected = logits(model)
    for dense in (model.dequantize(), load(tmp_path / "again", dtype=torch.bfloat16).dequantize()):
        assert dense.dtype == torch.bfloat16
        torch.testing.assert_close(logits(dense), expected, atol=0.1, rtol=0.1)
    other = load(tmp_path / "again").dequantize(dtype="float32")
    assert {p.dtype for p in other.parameters()} == {torch.float32}
    logits(other)


@pytest.mark.parametrize("compute", [None, "split", "merged", "unpack"])
def test_saved_again_it_is_the_same_to_the_bit(packed, tmp_path, compute):
    model = load(packed)
    if compute:
        set_compute(model, compute)
        logits(model)
    model.save_pretrained(tmp_path)
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (packed / name).read_bytes()
    again, before = load_file(tmp_path / "model.safetensors"), load_file(packed / "model.safetensors")
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_saved_in_another_type_or_in_shards_it_loads_again(run, packed, tmp_path):
    model = load(packed, dtype=torch.bfloat16)
    logits(model)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for again in (load(tmp_path), load_packed(tmp_path)):
        assert again.dtype == torch.bfloat16
        assert same(again, load(run / "model", dtype=torch.bfloat16), PRECISION[torch.bfloat16])


def test_a_model_that_is_saved_as_transformers_names_its_tensors_loads_again(tmp_path):
    run = made_run(tmp_path / "run", "qwen3_moe", kinds=("both", "sparse"))
    export(run, "packed", tmp_path / "packed")
    model = load(tmp_path / "packed")
    model.save_pretrained(tmp_path / "again", save_original_format=False)
    assert same(load(tmp_path / "again"), load(run / "model"), 2e-5)


def test_layers_that_packing_does_not_make_smaller_stay_ordinary(packed, run):
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    names = list(load(run / "model").state_dict())
    kept = [name.removesuffix(".weight") for name in names if "_proj" in name and "weight" in name]
    ordinary = [name for index, name in enumerate(kept) if WITH_SIGNS[index % len(WITH_SIGNS)] in ("dense", "full")]
    assert set(kept) - set(ordinary) == set(config["layers"])
    assert config["quant_method"] == METHOD
    with safe_open(packed / "model.safetensors", "pt") as tensors:
        assert {len(tensors.get_slice(f"{name}.weight").get_shape()) for name in config["layers"]} == {1}
        assert {len(tensors.get_slice(f"{name}.weight").get_shape()) for name in ordinary} == {2}


def test_options_of_our_own_loader(packed, run):
    model = load_packed(packed, dtype="bfloat16", device="cpu", compute="merged")
    logits(model)
    assert {layer.path for _, layer in packed_layers(model)} == {"merged", "split"}
    assert {layer.path for _, layer in packed_layers(model) if layer.shape.rank} == {"merged"}
    assert same(model, load(run / "model", dtype=torch.bfloat16), PRECISION[torch.bfloat16])
    for options in ({"compute": "fast"}, {"dtype": "int8"}, {"device": "nowhere"}):
        with pytest.raises((UsageError, LookupError), match=r"int8|fast|nowhere"):
            load_packed(packed, **options)
    with pytest.raises(UsageError, match="no packed layer"):
        set_compute(load(run / "model"), "split")


def test_a_dense_model_cannot_be_loaded_as_packed(run):
    with pytest.raises(ValueError, match="pre-quantized"):
        load(run / "model", quantization_config=SparseLowRankConfig({}))


@pytest.mark.parametrize(
    "record",
    [{"format_version": 4}, {"format_version": True}, {"more": 1}, {"layers": [1]}, {"quant_method": "gptq"}],
)
def test_configs_of_other_versions_are_refused(record):
    with pytest.raises(ArtefactError):
        SparseLowRankConfig(**{"layers": {}, **record})


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_the_package_loading_ends_in_an_error_and_with_it_no_more(packed, tmp_path):
    load(packed).save_pretrained(tmp_path / "again")
    code = f"""
import sys
sys.modules["globalopt"] = None
from transformers import AutoModelForCausalLM, LlamaForCausalLM
for loader in (AutoModelForCausalLM, LlamaForCausalLM):
    for folder in ({str(packed)!r}, {str(tmp_path / "again")!r}):
        for ignore in (False, True):
            try:
                loader.from_pretrained(folder, ignore_mismatched_sizes=ignore)
            except ValueError as error:
                print("\\n" not in str(error) and "run `import globalopt`" in str(error))
del sys.modules["globalopt"]
import globalopt
for folder in ({str(packed)!r}, {str(tmp_path / "again")!r}):
    model = AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)
    print("SparseLowRankLinear" in str(model))
"""
    assert python(code).split() == ["True"] * 10


def test_another_name_of_the_weights_is_not_followed(packed, tmp_path):
    folder = Path(shutil.copytree(packed, tmp_path / "packed"))
    config = json.loads((folder / "config.json").read_text())
    assert "import globalopt" in config["transformers_weights"]
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    with pytest.raises(ArtefactError, match=r"config\.json is not the file"):
        load_packed(folder)


def test_a_model_that_was_packed_before_the_notice_loads(run, packed, tmp_path):
    folder = Path(shutil.copytree(packed, tmp_path / "packed"))
    config = json.loads((folder / "config.json").read_text())
    del config["transformers_weights"]
    (folder / "config.json").write_text(json.dumps(config))
    assert same(load(folder), load(run / "model"), 2e-5)


def test_it_is_copied_with_its_way_of_saving_and_not_pushed_while_saved(packed, tmp_path):
    model = copy.deepcopy(load(packed))
    model.save_pretrained(tmp_path / "copy")
    assert contents(tmp_path / "copy")["config.json"] == (packed / "config.json").read_bytes()
    assert model.save_pretrained.args[0] is model
    with pytest.raises(UsageError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "pushed", push_to_hub=True)
    model.dequantize().save_pretrained(tmp_path / "dense")
    assert "transformers_weights" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_the_import_costs_nothing_and_registers_once_transformers_is_there():
    code = """
import sys
import globalopt
print(bool({"torch", "transformers", "numpy", "pydantic"} & set(sys.modules)))
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
print("globalopt" in AUTO_QUANTIZER_MAPPING and "globalopt" in AUTO_QUANTIZATION_CONFIG_MAPPING)
"""
    assert python(code).split() == ["False", "True"]


def test_registering_twice_changes_nothing():
    globalopt.register()
    globalopt.register()


def test_the_module_says_what_it_is(packed):
    model = load(packed)
    layer = next(module for module in model.modules() if isinstance(module, SparseLowRankLinear))
    assert "S=bitmask, rank=3, compute=auto" in repr(layer)
