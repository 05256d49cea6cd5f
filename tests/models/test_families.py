"""A model of any family that loses nothing is saved as it was: equal logits after it is read again, equal tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from globalopt.errors import UnsupportedModelError
from globalopt.models.batch import Batch
from globalopt.models.block_runner import BlockRunner
from globalopt.models.finding import find_layers
from globalopt.models.loading import load_model
from globalopt.models.origin import origin_of
from globalopt.models.saving import save_dense
from globalopt.refine.blocks import Refinement, refine
from globalopt.runs.folder import Run
from globalopt.values.budget import Budget, Target
from solvers import get_solver
from tests.families import COVERED, REFUSED, family_model
from tests.tiny_models import tiny_ids, tiny_tokenizer


def saved(folder: Path, name: str, dtype: torch.dtype) -> Path:
    family_model(name).to(dtype).save_pretrained(folder)  # pyright: ignore[reportArgumentType]
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, Any]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model.eval()(input_ids=tiny_ids(2, 12), use_cache=False).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", COVERED)
def test_nothing_is_lost_at_budget_1(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = saved(tmp_path / "model", name, dtype)
    loaded = load_model(source, device="cpu")
    layers = find_layers(loaded.model, allow_low_coverage=True)
    before = logits(loaded.model)
    targets = {spec.name: Target.dense(spec) for spec in layers.specs}
    budget = Budget.fraction(1.0, layers.specs)
    plan = Refinement(targets, get_solver("wanda"), budget, loaded.checkpoint_dtype, dict.fromkeys(targets))
    with Run.start(tmp_path / "run", {}, {}) as run:
        results = list(refine(BlockRunner(layers, [Batch(tiny_ids(2, 12))]), plan, run))
    assert sum(result.cost for result in results) == budget.total
    out = tmp_path / "saved"
    save_dense(loaded.model, loaded.tokenizer, out, loaded.checkpoint_dtype, origin_of(loaded.name))
    assert torch.equal(logits(load_model(out, device="cpu").model), before)
    if dtype == torch.float32:
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), before)
    found, expected = tensors(out), tensors(source)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), key


@pytest.mark.parametrize("name", COVERED)
def test_block_by_block_in_16_bits_is_as_whole_or_refused(name: str, tmp_path: Path) -> None:
    source = saved(tmp_path / "model", name, torch.bfloat16)
    whole = load_model(source, device="cpu")
    try:
        lazy = load_model(source, device="cpu", lazily=True)
    except UnsupportedModelError as refusal:
        said = str(refusal)
    else:
        assert torch.equal(logits(lazy.model), logits(whole.model))
        return
    assert "--max-memory" in said
    assert "\n" not in said


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compressed_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    source = saved(tmp_path / "model", name, torch.float32)
    with pytest.raises(UnsupportedModelError, match=REFUSED[name][0]) as refusal:
        BlockRunner(find_layers(load_model(source, device="cpu").model, True), [Batch(tiny_ids(2, 12))])
    assert "\n" not in str(refusal.value)
