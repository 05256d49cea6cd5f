"""A search over rank, nonzeros and bits, from the command line to the budget file and the solved layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from globalopt.budgets import budget_file
from globalopt.models.finding import find_layers
from globalopt.runs.folder import Run
from globalopt.values.results import Summary
from tests.command import WINDOWS, done, refused

SETTINGS = ("--solver", "3basil", "--set", "steps=4", *WINDOWS, "--match", "none", "--samples", 0, "--quiet")


@pytest.fixture(scope="module")
def searched(tiny_llama, tmp_path_factory, tiny_text) -> tuple[Path, Summary]:
    folder = tmp_path_factory.mktemp("bits") / "run"
    options = ("--budget", 0.3, "--storage", "16,8,4/8", "--calibration", tiny_text)
    done("search", tiny_llama, *options, *SETTINGS, "--out", folder)
    return folder, Run.open(folder).summary()


def test_the_budget_is_in_bytes_and_every_layer_has_bits_of_the_menu(searched):
    folder, summary = searched
    file = budget_file.read(folder / "budget.json")
    assert (file.accounting, file.schema_version) == ("bytes", 2)
    assert {entry.storage for entry in file.layers} <= {"16", "8", "4/8"}
    assert len({entry.storage for entry in file.layers}) > 1
    assert [layer.storage for layer in summary.layers] == [entry.storage for entry in file.layers]
    assert sum(layer.bytes for layer in summary.layers) <= file.limit


def test_a_menu_needs_bytes_and_predicted_losses(tiny_llama, tiny_text):
    model = (tiny_llama, "--calibration", tiny_text)
    assert "Add --accounting bytes" in refused(2, "search", *model, "--storage", "8,4/8", "--accounting", "params")
    assert "cannot choose among" in refused(2, "search", *model, "--storage", "auto", "--allocator", "uniform")
    assert "got '4/8/3'" in refused(2, "search", *model, "--storage", "4/8/3")
    assert "stored in 16, 8, 6, 5, 4, 3 bits; got 7" in refused(2, "search", *model, "--storage", "7")


def test_bits_alone_for_a_solver_that_drops_no_weight(tiny_llama, tmp_path, tiny_text):
    words = ("--budget", 0.45, "--storage", "8,6,4", "--solver", "gptq", "--allocator", "knapsack")
    words += ("--calibration", tiny_text, *WINDOWS, "--match", "none", "--samples", 0, "--quiet")
    done("search", tiny_llama, *words, "--out", tmp_path / "run")
    layers = budget_file.read(tmp_path / "run" / "budget.json").layers
    assert all((layer.rank, layer.nnz) == (0, layer.d_out * layer.d_in) for layer in layers)
    assert len({layer.storage for layer in layers}) > 1


@pytest.mark.parametrize("match", ["none", "block"])
def test_exact_zeros_of_a_model_take_no_bytes_beyond_the_budget(tiny_llama, tmp_path, tiny_text, match):
    """Weights that went through few bits before have zeros, which whole layers keep a code for."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        for spec in find_layers(model).specs:
            weight = model.get_parameter(f"{spec.name}.weight")
            weight.copy_((weight / weight.abs().max() * 7).round() * weight.abs().max() / 7)
            assert (weight == 0).any()
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "model")
    words = ("--budget", 0.55, "--storage", "8", "--calibration", tiny_text, "--solver", "3basil", "--set", "steps=4")
    words += (*WINDOWS, "--match", match, "--samples", 0, "--quiet")
    done("search", tmp_path / "model", *words, "--out", tmp_path / "run")
    file, summary = budget_file.read(tmp_path / "run" / "budget.json"), Run.open(tmp_path / "run").summary()
    whole = [layer for layer in summary.layers if layer.nnz == layer.d_out * layer.d_in]
    assert whole
    assert summary.used <= file.limit
    done("export", tmp_path / "run", "--format", "packed", "--out", tmp_path / "packed")
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    for layer in whole:
        held = [x for name, x in tensors.items() if name.rpartition(".")[0] == layer.name]
        assert sum(x.numel() * x.element_size() for x in held) == layer.bytes
