"""Layers that no calibration token reaches, or whose loss cannot be had, do not end a job and are not destroyed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV32Config

import globalopt
from globalopt.budgets.conversion import convert_target
from globalopt.models.batch import Batch
from globalopt.models.block_runner import BlockRunner
from globalopt.models.finding import find_layers
from globalopt.models.walk import walk_blocks
from globalopt.pipeline.unreached import without_tokens
from globalopt.protocols import Needs
from globalopt.refine.blocks import Order, Refinement, refine
from globalopt.runs.folder import Run
from globalopt.values.budget import Budget, Target
from globalopt.values.storage import Storage
from solvers import SOLVERS, get_solver
from tests.command import WINDOWS, done, write_text
from tests.command import read as read_json
from tests.linear_experts import linear_experts
from tests.tiny_models import tiny_ids, tiny_tokenizer

SIZES: dict[str, Any] = {"nsamples": 4, "seqlen": 16, "eval_windows": 2, "batch_size": 2, "progress": False}
NEVER = 2


def searched(folder: Path, called: str = "chosen", **options: Any) -> globalopt.Compressed:
    text = write_text(folder / "text.txt")
    return globalopt.search(linear_experts(called, NEVER), tiny_tokenizer(), text, **{**SIZES, **options})


def kept(found: globalopt.Compressed, expert: int) -> float:
    """The fraction kept of an expert, on the mean over its layers."""
    layers = [layer for layer in found.summary.layers if f".experts.{expert}." in layer.name]
    assert len(layers) == 6
    return sum(layer.cost for layer in layers) / sum(layer.dense_cost for layer in layers)


@pytest.mark.parametrize("called", ["chosen", "empty", "all"])
def test_an_expert_that_no_token_chose_is_treated_like_the_others(called: str, tmp_path: Path) -> None:
    refining = globalopt.RefineOptions()
    if called == "chosen":
        short = {"epochs": "1"}
        refining = globalopt.RefineOptions(match="model", match_options=short, distill_options=short)
    method = {"allocator": "knapsack", "solver": "3basil", "solver_options": {"steps": 5}, "refining": refining}
    found = searched(tmp_path, called, budget=0.5, **method)
    others = [kept(found, expert) for expert in (0, 1)]
    assert 0.5 * min(others) < kept(found, NEVER) < 2 * max(others)
    assert all(layer.predicted is not None and layer.predicted > 0 for layer in found.summary.layers)
    for layer in found.summary.layers:
        assert layer.relative < 1, layer.name
    assert all(bool(torch.isfinite(parameter).all()) for parameter in found.model.parameters())
    notes = [note for note in found.summary.notes if note.startswith("No calibration token reached 6 layers (")]
    assert len(notes) == 1
    assert ".mlp.experts.2." in notes[0]
    assert "--nsamples" in notes[0]


@pytest.mark.parametrize(("solver", "order"), [*((solver, Order.BLOCK) for solver in SOLVERS), ("wanda", Order.SITE)])
def test_every_solver_refines_an_expert_that_no_token_chose(solver: str, order: Order, tmp_path: Path) -> None:
    layers = find_layers(linear_experts(never=NEVER))
    budget = Budget.fraction(0.6, layers.specs)
    method = get_solver(solver)
    few = Storage(4, 4)
    parts = method.sparse or method.low_rank
    asked = {s: Target(1, s.numel // 2) if parts else Target(0, s.numel, storage=few) for s in layers.specs}
    targets = {spec.name: convert_target(target, spec, method, budget) for spec, target in asked.items()}
    plan = Refinement(targets, method, budget, torch.float32, dict.fromkeys(targets), order=order)
    with Run.start(tmp_path / "run", {}, {}) as run:
        results = list(refine(BlockRunner(layers, [Batch(tiny_ids(2, 16))]), plan, run))
        notes = without_tokens(run, layers)
    assert all(result.relative < 1 for result in results)
    if plan.reads is Needs.NOTHING:
        assert not notes
        return
    (note,) = notes
    assert note.startswith("No calibration token reached 6 layers (model.layers.0.mlp.experts.2.gate_proj, ")


@pytest.mark.parametrize("how", [{"sensitivity": "none", "allocator": "owl"}, {"search_tokens": 2000}])
def test_every_way_to_search_gets_through(how: dict[str, Any], tmp_path: Path) -> None:
    method = {"allocator": "auto", "solver": "sparsegpt", "refining": globalopt.RefineOptions(), **how}
    found = searched(tmp_path, budget=0.5, search_tokens=method.pop("search_tokens", 1000), **method)
    assert kept(found, NEVER) > 0.1


def test_grams_of_an_expert_that_no_token_chose_are_the_mean_of_those_of_its_siblings() -> None:
    layers = find_layers(linear_experts(never=NEVER))
    visit = next(walk_blocks(BlockRunner(layers, [Batch(tiny_ids(2, 16))])))
    grams = visit.grams()
    down = [grams[f"model.layers.0.mlp.experts.{expert}.down_proj"] for expert in range(3)]
    assert [gram.tokens for gram in down][NEVER] == 0
    assert down[0].tokens + down[1].tokens == 32
    torch.testing.assert_close(down[NEVER].matrix, (down[0].matrix + down[1].matrix) / 2)
    (site,) = {spec.site for spec in layers.of_block(0) if spec.name.endswith("experts.2.down_proj")}
    torch.testing.assert_close(visit.grams([site])[site].matrix, down[NEVER].matrix)


def test_layers_without_gradients_stay_dense_and_are_named(tmp_path: Path) -> None:
    config = DeepseekV32Config(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8, moe_intermediate_size=8, n_routed_experts=4, num_experts_per_tok=2,
        n_group=1, topk_group=1, n_shared_experts=1, first_k_dense_replace=1, index_n_heads=2, index_head_dim=16,
        index_topk=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    text, out = write_text(tmp_path / "text.txt"), tmp_path / "run"
    options = "--allow-low-coverage", "--allocator", "knapsack", "--solver", "wanda", "--match", "none"
    said = done("search", tmp_path / "model", "--calibration", text, *WINDOWS, *options, "--out", out).stderr
    found = read_json(out / "summary.json")
    names = [layer["name"] for layer in found["layers"]]
    assert names
    assert not any("indexer" in name for name in names)
    (note,) = [note for note in found["notes"] if "stay dense" in note]
    assert "model.layers.0.self_attn.indexer." in note
    assert " ".join(note.split()) in " ".join(said.split())
    whole = {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "indexer" in name
    }
    saved: Any = AutoModelForCausalLM.from_pretrained(out / "model")
    for name in whole:
        assert torch.equal(saved.get_submodule(name).weight, model.get_submodule(name).weight)
