"""Matching through the command line: options, artefacts, resuming, refusals."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from safetensors.torch import load_file

from globalopt.errors import UsageError
from globalopt.models.finding import find_layers
from globalopt.models.layers import ModelLayers
from globalopt.models.loading import load_model
from globalopt.pipeline.options import RefineOptions, SearchOptions
from globalopt.pipeline.plan import resolve
from globalopt.runs.artefacts import MATCHED_BLOCK, MATCHED_MODEL, SOLVED_LAYER
from globalopt.runs.folder import Run
from tests.command import WINDOWS, assert_alike, done, no_partial_files, read, refused, results, write_text
from tests.tiny_models import save_tiny

SEARCH = ("--budget", "0.4", "--solver", "oats", "--allocator", "knapsack", *WINDOWS, "--batch-size", "2")
QUICK = ("--match-set", "epochs=2,rate=0.03")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder / "llama")
    return folder / "llama", write_text(folder / "text.txt")


@pytest.fixture(scope="module")
def searched(model, tmp_path_factory):
    """A run without matching, whose budget the others refine."""
    folder = tmp_path_factory.mktemp("run") / "plain"
    done("search", model[0], "--calibration", model[1], *SEARCH, "--out", folder, "--quiet")
    return folder


def compress(model, searched, folder, *more):
    command = ("compress", model[0], "--calibration", model[1], "--budget-file", searched / "budget.json")
    return done(*command, "--solver", "wanda", *WINDOWS, "--batch-size", "2", "--out", folder, "--json", *more)


@pytest.mark.parametrize("match", ["block", "model"])
def test_what_is_saved_is_what_was_matched(model, searched, tmp_path, match):
    folder = tmp_path / match
    compress(model, searched, folder, "--match", match, *QUICK)
    run, summary = Run.open(folder), read(folder / "summary.json")
    blocks = [entry["block"] for entry in summary["matching"]]
    assert blocks == ([0, 1] if match == "block" else [0, 1, None])
    assert all(entry["after"] <= entry["before"] for entry in summary["matching"])
    assert any(entry["kept_epoch"] for entry in summary["matching"])
    layers = find_layers(load_model(str(folder / "model")).model)
    file = read(folder / "budget.json")
    for spec, entry in zip(layers.specs, file["layers"], strict=True):
        value = run.layer(spec)
        assert torch.equal(layers.weight(spec.name), value.dense())
        fitted = run.get(SOLVED_LAYER, spec).value
        assert torch.equal(value.S != 0, fitted.S != 0)
        assert value.nnz <= entry["nnz"] + entry["rank"] * (spec.d_out + spec.d_in)
    saved = load_file(folder / "model" / "model.safetensors")
    norms = (run.get(MATCHED_MODEL, None) if match == "model" else run.get(MATCHED_BLOCK, 1)).norms
    assert norms
    assert all(torch.equal(saved[name], norm) for name, norm in norms.items())
    assert not run.training_path.exists()
    assert no_partial_files(folder)


def test_search_matches_too(model, tmp_path):
    folder = tmp_path / "run"
    done("search", model[0], "--calibration", model[1], *SEARCH, "--out", folder, "--match", "block", *QUICK, "--quiet")
    assert [entry["loss"] for entry in read(folder / "summary.json")["matching"]] == ["nats", "nats"]


def test_without_a_sweep_errors_are_relative(model, searched, tmp_path):
    compress(model, searched, tmp_path / "run", "--match", "block", *QUICK, "--sensitivity", "none")
    assert {entry["loss"] for entry in read(tmp_path / "run" / "summary.json")["matching"]} == {"token"}


def test_a_run_that_lost_its_last_stages_ends_with_the_same(model, searched, tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    options = ("--match", "model", *QUICK, "--distill-set", "epochs=2")
    compress(model, searched, whole, *options)
    compress(model, searched, again, *options)
    (again / "summary.json").unlink()
    shutil.rmtree(again / "model")
    (again / "matched" / "model.safetensors").unlink()
    (again / "matched" / "block.1.safetensors").unlink()
    compress(model, searched, again, *options)
    assert_alike(results(again), results(whole))


def test_other_matching_is_another_run(model, searched, tmp_path):
    folder = tmp_path / "run"
    compress(model, searched, folder, "--match", "block", *QUICK)
    command = ("compress", model[0], "--calibration", model[1], "--budget-file", searched / "budget.json")
    said = refused(1, *command, "--solver", "wanda", *WINDOWS, "--batch-size", "2", "--out", folder, "--quiet")
    assert "holds another run" in said
    assert "match" in said


def test_site_by_site(model, searched, tmp_path):
    compress(model, searched, tmp_path / "site", "--sequential", "site")
    compress(model, searched, tmp_path / "block")
    site, block = (read(tmp_path / name / "summary.json")["layers"] for name in ("site", "block"))
    # The first site of the first block sees the same inputs either way; the last does not.
    assert site[0]["actual"] == block[0]["actual"]
    assert site[-1]["actual"] != block[-1]["actual"]


def test_a_model_that_does_not_fit_is_not_matched_as_a_whole():
    lazy = cast("ModelLayers", SimpleNamespace(lazy=object()))
    plans = {match: resolve(SearchOptions(0.5), RefineOptions(match=match)).refinement for match in ("block", "model")}
    plans["block"].check(lazy)
    with pytest.raises(UsageError, match="Use --match block, or raise --max-memory"):
        plans["model"].check(lazy)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--match", "layers"), "--match is one of none, block, model"),
        (("--sequential", "layer"), "--sequential is one of site, block"),
        (("--match", "none", "--match-set", "epochs=2"), "--match-set is for --match block or model"),
        (("--match", "block", "--distill-set", "epochs=2"), "--distill-set is for --match model"),
        (("--match", "block", "--match-set", "epochs=two"), "must be a whole number"),
        (("--match", "block", "--match-set", "preset=published"), "preset of matching"),
        (("--match", "block", "--match-set", "loss=nats", "--sensitivity", "none"), "--sensitivity none leaves out"),
        (("--match", "model", "--distill-set", "share=1"), "option of model matching"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(searched, options, words):
    for command in (("search", "--budget", "0.5"), ("compress", "--budget-file", searched / "budget.json")):
        assert words in refused(2, *command, *options)
