"""Embeddings in few bits, from the command line to the budget file, the saved model, the summary and the exports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from globalopt.budgets import budget_file
from globalopt.embeddings.coding import decode_matrix, encode_matrix
from globalopt.pipeline import session
from globalopt.runs.artefacts import EMBEDDING
from globalopt.runs.folder import Run
from tests.command import WINDOWS, assert_alike, done, read, refused, results
from tests.tiny_models import save_tiny

QUICK = ("--solver", "magnitude", *WINDOWS, "--samples", 0, "-q")
NAMES = {"llama": ("model.embed_tokens", "lm_head"), "gpt2": ("transformer.wte",)}


@pytest.fixture(scope="module", params=NAMES)
def model(request, tmp_path_factory) -> tuple[str, Path]:
    """An untied model, and a tied one."""
    return request.param, save_tiny(tmp_path_factory.mktemp("model") / request.param, request.param)


@pytest.fixture(scope="module")
def compressed(model, tiny_text, tmp_path_factory) -> tuple[str, Path, Path]:
    kind, path = model
    folder = tmp_path_factory.mktemp("compressed") / "run"
    done("compress", path, "--budget", 0.55, "--embeddings", 6, "--calibration", tiny_text, *QUICK, "--out", folder)
    return kind, path, folder


def test_a_budget_counts_the_embeddings_and_the_saved_model_has_them_rounded(compressed):
    kind, path, folder = compressed
    file, summary = budget_file.read(folder / "budget.json"), Run.open(folder).summary()
    assert (file.schema_version, file.accounting, file.asked) == (2, "bytes", 0.55)
    assert [(each.name, each.bits) for each in file.embeddings] == [(name, 6) for name in NAMES[kind]]
    numbers = [128 * 32 for _ in file.embeddings]
    assert [each.cost for each in file.embeddings] == [n * 6 // 8 + 2 * n // 64 for n in numbers]
    assert file.total == 2 * (sum(numbers) + sum(layer.d_out * layer.d_in for layer in file.layers))
    assert file.limit == int(0.55 * file.total)
    assert 0.98 * file.limit <= file.used <= file.limit
    assert (summary.limit, summary.used, summary.total) == (file.limit, file.used, file.total)
    assert summary.used == sum(layer.cost for layer in summary.layers) + sum(each.bytes for each in summary.embeddings)
    saved, dense = load_file(folder / "model" / "model.safetensors"), load_file(path / "model.safetensors")
    run = Run.open(folder)
    for each in file.embeddings:
        name = next(name for name in dense if f"{each.name}.weight".endswith(name))
        expected = decode_matrix(encode_matrix(dense[name], 6), dense[name].dtype)
        assert torch.equal(saved[name], expected)
        assert not torch.equal(saved[name], dense[name])
        assert run.get(EMBEDDING, each.name).nbytes == each.cost


def test_sixteen_bits_change_nothing_but_what_the_layers_have(model, tiny_text, tmp_path):
    kind, path = model
    options = ("--calibration", tiny_text, *QUICK)
    done("compress", path, "--budget", 0.7, "--embeddings", 16, *options, "--out", tmp_path / "run")
    file = budget_file.read(tmp_path / "run" / "budget.json")
    saved, dense = load_file(tmp_path / "run/model/model.safetensors"), load_file(path / "model.safetensors")
    name = next(name for name in dense if f"{NAMES[kind][0]}.weight".endswith(name))
    assert torch.equal(saved[name], dense[name])
    assert file.budget.limit == file.limit - sum(each.cost for each in file.embeddings)
    assert not (tmp_path / "run" / "embeddings").exists()


def test_without_the_option_nothing_is_said_of_embeddings(tiny_llama, tiny_text, tmp_path):
    done("compress", tiny_llama, "--budget", 0.5, "--calibration", tiny_text, *QUICK, "--out", tmp_path / "run")
    assert "embeddings" not in read(tmp_path / "run" / "budget.json")
    assert "embeddings" not in json.dumps(read(tmp_path / "run" / "manifest.json")["identity"])


def test_too_little_for_the_layers_is_refused_with_the_numbers(tiny_llama, tiny_text, tmp_path):
    options = ("--calibration", tiny_text, *QUICK, "--out", tmp_path / "run")
    said = refused(3, "compress", tiny_llama, "--budget", 0.1, "--embeddings", 8, *options)
    assert "the embeddings take 8448 of them in 8 bits: 0 are left for the layers" in said
    assert "Raise --budget to at least" in said
    pattern = ("--pattern", "2:4", "--budget", 0.5)
    assert "which need" in refused(3, "compress", tiny_llama, *pattern, "--embeddings", 16, *options)
    assert "in 8 bits: 0 are left" in refused(
        3, "compress", tiny_llama, "--budget", 0.1, "--embeddings", 8, *options, "--dry-run"
    )


def test_what_does_not_go_together_is_refused(tiny_llama, tiny_text):
    text = ("--calibration", tiny_text)
    for command in ("search", "compress"):
        asked = (command, tiny_llama, *text, "--budget", 0.5)
        assert "--embeddings is one of 16, 8, 6, auto; got '7'" in refused(2, *asked, "--embeddings", 7)
        assert "Leave out --accounting" in refused(2, *asked, "--embeddings", 8, "--accounting", "params")
    assert "cannot be chosen" in refused(2, "compress", tiny_llama, *text, "--budget", 0.5, "--embeddings", "auto")
    search = ("search", tiny_llama, *text)
    assert "not for a family" in refused(2, *search, "--budget", "0.3,0.5", "--embeddings", 8)
    assert "cannot be chosen" in refused(2, *search, "--embeddings", "auto", "--allocator", "uniform")
    assert "in nats" in refused(2, *search, "--embeddings", "auto", "--sensitivity", "none")
    assert "16 bits alone" in refused(2, *search, "--embeddings", 8, "--serving-profile", "adapter")


SEARCH = ("--solver", "3basil", "--set", "steps=4", *WINDOWS, "--match", "none", "--samples", 0, "-q")


@pytest.fixture(scope="module")
def automatic(model, tiny_text, tmp_path_factory) -> tuple[str, Path, Path]:
    kind, path = model
    folder = tmp_path_factory.mktemp("automatic") / "run"
    options = ("--budget", 0.5, "--embeddings", "auto", "--storage", "16,8", "--calibration", tiny_text)
    done("search", path, *options, *SEARCH, "--out", folder)
    return kind, path, folder


def test_the_bits_of_least_predicted_loss_are_chosen_with_a_bound(automatic):
    kind, _, folder = automatic
    file, summary = budget_file.read(folder / "budget.json"), Run.open(folder).summary()
    assert tuple(each.name for each in file.embeddings) == NAMES[kind]
    assert file.predicted is not None
    assert file.bound is not None
    assert (
        file.bound
        <= file.predicted
        == pytest.approx(
            sum(layer.predicted or 0 for layer in file.layers) + sum(each.loss or 0 for each in file.embeddings)
        )
    )
    assert "embeddings" in [stage.name for stage in summary.stages]
    assert summary.uniform is not None
    assert summary.uniform.predicted >= file.predicted


def test_no_width_is_predicted_to_lose_less_than_the_one_that_is_chosen(automatic, tiny_text, tmp_path):
    kind, path, folder = automatic
    # Corrected losses are others around every budget: compared without.
    options = ("--budget", 0.5, "--storage", "16,8", "--calibration", tiny_text, "--no-correct")
    options += ("--cache", folder.parent / "globalopt-cache", *SEARCH)
    for bits in ("auto", 16, 8, 6):
        done("search", path, *options, "--embeddings", bits, "--out", tmp_path / str(bits))
    found, *others = [budget_file.read(tmp_path / str(bits) / "budget.json") for bits in ("auto", 16, 8, 6)]
    assert found.predicted is not None
    assert found.bound is not None
    for other in others:
        assert other.predicted is not None
        assert found.bound <= found.predicted <= other.predicted
        assert [each.loss is None for each in other.embeddings] == [False] * len(NAMES[kind])


def test_a_run_that_was_killed_continues_to_the_same_model(automatic, tiny_text, tmp_path):
    _, path, folder = automatic
    options = ("--budget", 0.5, "--embeddings", "auto", "--storage", "16,8", "--calibration", tiny_text)
    cache = tmp_path / "cache"
    shutil.copytree(folder.parent / "globalopt-cache", cache)
    # As if the run had been killed in its refinement: codes and the last layers are missing.
    for place in cache.glob("refinement/*"):
        shutil.rmtree(place / "embeddings", ignore_errors=True)
        for layer in sorted((place / "layers").iterdir())[7:]:
            layer.unlink()
    done("search", path, *options, *SEARCH, "--out", tmp_path / "again", "--cache", cache)
    assert_alike(results(tmp_path / "again"), results(folder))


def test_a_budget_file_is_refined_with_its_embeddings(automatic, tiny_text, tmp_path):
    kind, path, folder = automatic
    options = ("--budget-file", folder / "budget.json", "--calibration", tiny_text, *QUICK, "--match", "none")
    done("compress", path, *options, "--out", tmp_path / "again")
    again, first = Run.open(tmp_path / "again").summary(), Run.open(folder).summary()
    assert again.embeddings == first.embeddings
    one, other = (load_file(run / "model" / "model.safetensors") for run in (tmp_path / "again", folder))
    names = [name for name in one if any(f"{each}.weight".endswith(name) for each in NAMES[kind])]
    assert names
    assert all(torch.equal(one[name], other[name]) for name in names)
    assert "--embeddings divides a --budget" in refused(2, "compress", path, *options, "--embeddings", 8)


@pytest.mark.parametrize("options", [("--match-set", "share=0.5"), ("--match-set", "loss=sum,epochs=1")])
def test_blocks_are_matched_beside_rounded_embeddings(tiny_llama, tiny_text, tmp_path, options):
    text = ("--calibration", tiny_text, "--match", "block", *options)
    done("compress", tiny_llama, "--budget", 0.5, "--embeddings", 6, *text, *QUICK, "--out", tmp_path / "run")
    summary = Run.open(tmp_path / "run").summary()
    assert all(match.after <= match.before for match in summary.matching)


def test_every_command_tells_of_the_embeddings_of_a_budget(compressed, automatic, tmp_path):
    kind, path, folder = compressed
    budget, other = folder / "budget.json", automatic[2] / "budget.json"
    file, summary = budget_file.read(budget), Run.open(folder).summary()
    said = done("budget", "validate", budget, "--model", path).stdout
    assert f"{file.used:,} of {file.limit:,} bytes" in said
    assert f"Embeddings: {NAMES[kind][0]} in 6 bits" in said
    assert "in 6" in done("budget", "show", budget).stdout
    assert "used by embeddings, bytes" in done("budget", "diff", budget, other).stdout
    record = json.loads(done("budget", "diff", budget, other, "--json").stdout)
    assert [len(some) for some in record["embeddings"]] == [len(NAMES[kind])] * 2
    told = done("report", folder).stdout
    parts = told.partition("embeddings, by part")[2].partition("counted, not measured")[0].splitlines()
    sizes = {line.split("  ")[0]: int(line.split("%")[0].split()[-2].replace(",", "")) for line in parts if "%" in line}
    assert sizes["embeddings"] == sum(each.cost for each in file.embeddings)
    assert sum(sizes.values()) - sizes["all"] == sizes["all"] == summary.used
    converted = done("budget", "convert", budget, "--to", "csv", "--out", tmp_path / "budget.csv")
    assert f"the bits of {len(NAMES[kind])} embeddings are not in it" in converted.stderr
    back = ("--from", "csv", "--like", budget, "--out", tmp_path / "back.json")
    assert "the embeddings are those of --like" in done("budget", "convert", tmp_path / "budget.csv", *back).stderr
    assert budget_file.read(tmp_path / "back.json") == file


def test_a_budget_file_that_lies_about_embeddings_is_refused(compressed, tiny_llama, tiny_text, tmp_path):
    _, path, folder = compressed
    good = read(folder / "budget.json")
    first = good["embeddings"][0]
    wrong = {
        "stored in 16, 8, 6 bits; got 7": {"embeddings": [{**first, "bits": 7}]},
        "says cost 1, in 6 bits it takes": {"embeddings": [{**first, "cost": 1}]},
        "an embedding is listed twice": {"embeddings": [first, first]},
        "total says": {"embeddings": []} if len(good["embeddings"]) > 1 else {"total": good["total"] + 2},
        "the layers and embeddings add up to": {"used": good["used"] - 1},
        "counted in bytes": {"accounting": "params"},
        "is not that of its storages": {"schema_version": 1},
        "embeddings.0.rows": {"embeddings": [{**first, "rows": 0}]},
    }
    for said, change in wrong.items():
        if said == "total says" and not change.get("embeddings", True):
            change = {"embeddings": good["embeddings"][:1]}
        if said == "counted in bytes":
            change |= {"layers": [{**layer, "cost": layer["nnz"]} for layer in good["layers"]]}
        (tmp_path / "budget.json").write_text(json.dumps({**good, **change}))
        assert said in refused(1, "budget", "validate", tmp_path / "budget.json"), said
    renamed = [{**each, "name": f"x.{each['name']}"} for each in good["embeddings"]]
    (tmp_path / "budget.json").write_text(json.dumps({**good, "embeddings": renamed}))
    said = "it stores the embeddings x."
    assert said in refused(1, "budget", "validate", tmp_path / "budget.json", "--model", path)
    options = ("--budget-file", tmp_path / "budget.json", "--calibration", tiny_text, *QUICK, "--out", tmp_path / "run")
    assert said in refused(1, "compress", path, *options)
    assert said in refused(1, "compress", path, *options, "--dry-run")


def test_a_model_that_is_read_block_by_block_ends_the_same(compressed, tiny_text, tmp_path, monkeypatch):
    _, path, folder = compressed
    whole = session.load_model
    monkeypatch.setattr(
        session, "load_model", lambda source, dtype, device, *words: whole(source, dtype, device, lazily=True)
    )
    options = ("--budget", 0.55, "--embeddings", 6, "--calibration", tiny_text, *QUICK, "--out", tmp_path / "lazy")
    done("compress", path, *options)
    one, other = (load_tensors(run / "model") for run in (tmp_path / "lazy", folder))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}
