"""Whatever is wrong with the input: one line that says it, the right exit code, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from globalopt.runs import files
from globalopt.runs.folder import Run
from tests.command import WINDOWS, assert_alike, contents, done, no_partial_files, read, refused, results, run
from tests.tiny_models import save_tiny

FAILED, USAGE, INFEASIBLE = 1, 2, 3


@pytest.fixture(scope="module")
def moe(tmp_path_factory) -> Path:
    """A model of which most parameters cannot be compressed."""
    return save_tiny(tmp_path_factory.mktemp("moe"), "qwen3_moe")


# ------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--budget", "0"], USAGE, "in (0, 1]; got 0"),
        (["--budget", "1.5"], USAGE, "in (0, 1]; got 1.5"),
        (["--budget", "-0.5"], USAGE, "in (0, 1]; got -0.5"),
        (["--budget", "nan"], USAGE, "in (0, 1]; got nan"),
        (["--budget", "inf"], USAGE, "in (0, 1]; got inf"),
        (["--pattern", "2:4", "--budget", "0.4"], INFEASIBLE, "Raise --budget to at least 0.5"),
        (["--pattern", "2:4", "--accounting", "bytes"], INFEASIBLE, "Raise --budget to at least 0.5625"),
        (["--pattern", "3:5"], USAGE, "multiple of 5"),
        (["--pattern", "4:2"], USAGE, "Pattern 4:2"),
        (["--pattern", "2-4"], USAGE, "did you mean '2:4'?"),
        (["--pattern", "0:4"], USAGE, "Pattern 0:4"),
        (["--allocator", "knapsak"], USAGE, "did you mean 'knapsack'?"),
        (["--allocator", "knapsack", "--allocator-set", "gp=1"], USAGE, "did you mean 'gap'?"),
        (["--allocator", "knapsack", "--allocator-set", "gap=-1"], USAGE, "gap must be finite and at least 0"),
        (["--allocator", "knapsack", "--allocator-set", "exact=perhaps"], USAGE, "true or false"),
        (["--solver", "hasslefree"], USAGE, "did you mean 'hassle-free'?"),
        (["--set", "stepz=1"], USAGE, "did you mean 'steps'?"),
        (["--set", "steps=many"], USAGE, "a whole number; got 'many'"),
        (["--set", "steps"], USAGE, "--set takes NAME=VALUE; got 'steps'"),
        (["--solver", "magnitude"], USAGE, "No option of solver 'magnitude'"),
        (["--accounting", "param"], USAGE, "did you mean 'params'?"),
        (["--sensitivity", "fischer"], USAGE, "fisher, none; got 'fischer'"),
        (["--span-scaling", "all"], USAGE, "output, direct; got 'all'"),
        (["--predict-from", "free"], USAGE, "got 'free'"),
        (["--candidates", "fits"], USAGE, "auto, anchors, span; got 'fits'"),
        (["--candidates", "anchors"], USAGE, "There are no anchor solutions to make candidates from"),
        (["--search-tokens", "0"], USAGE, "--search-tokens 0 is for a family"),
        (["--dtype", "float31"], USAGE, "did you mean 'float32'?"),
        (["--device", "gpu"], USAGE, "--device gpu"),
        (["--device", "cuda:99"], USAGE, "--device cuda:99 is not available"),
        (["--nsamples", "0"], USAGE, "--nsamples must be at least 1"),
        (["--seqlen", "1"], USAGE, "--seqlen must be at least 2"),
        (["--seqlen", "129"], USAGE, "context of 128 tokens"),
        (["--eval-windows", "1"], USAGE, "--eval-windows must be at least 2"),
        (["--eval-windows", "0"], USAGE, "add --no-evaluate"),
        (["--batch-size", "0"], USAGE, "--batch-size must be at least 1"),
        (["--model", "another"], USAGE, "Two models were given"),
        (["--nsamples", "100000"], FAILED, "too short"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options(tiny_search, tmp_path, options, code, says):
    message = refused(code, *tiny_search, "--out", tmp_path / "run", "-q", *options)
    assert says in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options", [["--budget", "half"], ["--seed", "-1"], ["--seed", str(2**64)], ["--batch-size", str(2**70)], ["--no"]]
)
def test_what_typer_refuses_is_a_usage_error_too(tiny_search, tmp_path, options):
    result = run(*tiny_search, "--out", tmp_path / "run", *options)
    assert result.exit_code == USAGE
    assert options[0] in result.stderr
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------- models


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def bad_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "lla')


def unknown_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "t-rex"}')


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def nan_weight(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})


def missing_weight(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (shutil.rmtree, "There is no model folder"),
        (no_config, "has no config.json"),
        (bad_config, "config.json"),
        (unknown_type, "t-rex"),
        (cut_weights, "broken or cut off"),
        (no_weights, "cannot be read"),
        (no_tokenizer, "no usable tokenizer"),
        (nan_weight, "model.layers.1.mlp.up_proj"),
        (missing_weight, "model.layers.1.mlp.up_proj"),
    ],
)
def test_models(tiny_llama, tiny_text, tmp_path, damage, says):
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    damage(model)
    options = ("--calibration", tiny_text, *WINDOWS, "--out", tmp_path / "run", "-q")
    assert says in refused(FAILED, "search", model, *options)
    assert not (tmp_path / "run").exists()


def test_a_file_is_no_model(tiny_llama, tiny_text, tmp_path):
    options = ("--calibration", tiny_text, "--out", tmp_path / "run", "-q")
    assert "is a file" in refused(FAILED, "search", tiny_llama / "config.json", *options)


def test_a_model_of_which_little_can_be_compressed(moe, tiny_text, tmp_path):
    options = ("--calibration", tiny_text, *WINDOWS, "--out", tmp_path / "run", "-q")
    assert "--allow-low-coverage" in refused(FAILED, "search", moe, *options)
    assert not (tmp_path / "run").exists()
    done("search", moe, *options, "--allow-low-coverage", "--solver", "wanda")


# ------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.txt", None, "There is no file"),
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\n", "is empty"),
        ("short.txt", b"too short a text", "too short"),
        ("binary.txt", b"text\0text" * 100, "binary"),
        ("latin.txt", "caf\xe9 ".encode("latin-1") * 400, "not UTF-8"),
        ("words.doc", b"words " * 400, ".txt, .jsonl or .parquet"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
    ],
)
def test_texts(tiny_llama, tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    options = ("--calibration", tmp_path / name, *WINDOWS, "--out", tmp_path / "run", "-q")
    assert says in refused(FAILED, "search", tiny_llama, *options)
    assert not (tmp_path / "run").exists()


def test_a_model_of_the_users_needs_a_text(tiny_llama, tmp_path):
    assert "--calibration" in refused(USAGE, "search", tiny_llama, "--out", tmp_path / "run", "-q")
    assert "--calibration" in refused(USAGE, "eval", tiny_llama, "-q")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------- budget files


def set_field(name, value):
    def edit(raw):
        raw[name] = value

    return edit


def set_layer(name, value):
    def edit(raw):
        raw["layers"][2][name] = value

    return edit


def raise_count(raw):
    raw["layers"][0]["nnz"] += 5


def exceed(raw):
    # Consistent in itself, but above its limit.
    layer = raw["layers"][0]
    more = layer["d_out"] * layer["d_in"] - layer["nnz"]
    layer["nnz"] += more
    layer["cost"] += more
    raw["used"] += more


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (raise_count, "its target costs"),
        (exceed, "exceeds its budget"),
        (set_field("used", 7), "used says 7"),
        (set_field("total", 10**6), "total says 1000000"),
        (set_field("limit", 0), "above 0"),
        (set_field("schema_version", 3), "Upgrade globalopt"),
        (set_field("schema_version", 2), "is not that of its storages"),
        (set_field("schema_version", "new"), "is not a budget file"),
        (set_field("accounting", "bits"), "accounting"),
        (set_field("asked", float("nan")), "asked"),
        (set_field("comment", "mine"), "comment"),
        (set_field("layers", []), "the listed layers have 0"),
        (set_layer("rank", 10**6), "largest rank"),
        (set_layer("rank", -1), "rank"),
        (set_layer("pattern", "2-4"), "2-4"),
        (set_layer("name", "model.layers.0.self_attn.q_proj"), "listed twice"),
    ],
)
def test_edited_budget_files(tiny_run, tiny_llama, tiny_text, tmp_path, edit, says):
    raw = read(tiny_run / "budget.json")
    edit(raw)
    path = tmp_path / "budget.json"
    path.write_text(json.dumps(raw))
    assert says in refused(FAILED, "budget", "validate", path)
    options = ("--calibration", tiny_text, *WINDOWS, "--out", tmp_path / "run", "-q")
    assert says in refused(FAILED, "compress", tiny_llama, "--budget-file", path, *options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "There is no file"),
        (b"", "not valid JSON"),
        (b"rank,nnz\n", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 10**5, "not valid JSON"),
        (b"[1, 2]", "is not a budget file"),
        (b"{}", "is not a budget file"),
        (b'{"schema_version": 1}', "not a valid budget file"),
    ],
)
def test_what_is_no_budget_file(tmp_path, content, says):
    if content is not None:
        (tmp_path / "budget.json").write_bytes(content)
    assert says in refused(FAILED, "budget", "show", tmp_path / "budget.json")


def test_a_truncated_budget_file(tiny_run, tmp_path):
    whole = (tiny_run / "budget.json").read_bytes()
    path = tmp_path / "budget.json"
    for length in (1, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:length])
        assert "truncated" in refused(FAILED, "budget", "validate", path)
    assert "Cannot read" in refused(FAILED, "budget", "validate", tmp_path)


def test_a_budget_file_of_another_model(tiny_run, tiny_text, tmp_path):
    other = save_tiny(tmp_path / "qwen2", "qwen2")
    options = ("--calibration", tiny_text, *WINDOWS, "--out", tmp_path / "run", "-q")
    assert "another model" in refused(FAILED, "compress", other, "--budget-file", tiny_run / "budget.json", *options)
    assert not (tmp_path / "run").exists()


def test_ranks_beside_a_pattern_need_a_solver_with_low_rank(tiny_search, tiny_llama, tiny_text, tmp_path):
    done(*tiny_search, "--pattern", "2:4", "--budget", "0.7", "--out", tmp_path / "first", "-q")
    options = ("--calibration", tiny_text, *WINDOWS, "--out", tmp_path / "run", "-q", "--solver", "wanda")
    message = refused(USAGE, "compress", tiny_llama, "--budget-file", tmp_path / "first" / "budget.json", *options)
    assert "Use a solver with low rank" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "--budget-file budget.json"),
        ([], "--budget FRACTION"),
        (["--budget", "0.5", "--budget-file", "b.json"], "Give --budget 0.5 or --budget-file b.json, not both"),
        (["--budget-file", "b.json", "--rank-share", "0"], "--rank-share divides a --budget"),
        (["--budget-file", "b.json", "--accounting", "bytes"], "--accounting divides a --budget"),
        (["--budget", "0.5", "--accounting", "bits"], "bits"),
        (["--budget", "0.5", "--allocator", "knapsack"], "Run `globalopt search --allocator knapsack`"),
        (["--budget", "0.5", "--allocator", "depth-ramp"], "one of uniform, owl, alpha"),
        (["--budget", "0.5", "--rank-share", "0.1", "--solver", "wanda"], "wanda has none"),
        (["--budget", "0.5", "--rank-share", "0.1", "--allocator-set", "rank_share=0.2"], "given twice"),
        (["--budget", "0.5", "--rank-share", "2"], "in [0, 1]; got 2"),
        (["--budget", "1.5"], "1.5"),
        (["--budget", "0.5", "--match-set", "epochs=2"], "--match-set is for --match"),
    ],
)
def test_what_compress_cannot_divide(options, says):
    assert says in refused(USAGE, "compress", *options)


# ------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("out", "a file", "is a file"),
        ("out/notes.txt", "mine", "holds no run"),
        ("out/manifest.json", '{"name": "a web page"}', "no manifest of a run"),
        ("out/manifest.json", '{"schema": 1, "finger', "not valid JSON"),
        ("out/manifest.json", '{"schema": 9, "fingerprint": "", "identity": {}}', "Upgrade globalopt"),
    ],
)
@pytest.mark.parametrize("fresh", [[], ["--fresh"]], ids=["", "fresh"])
def test_folders_that_are_not_ours(tiny_search, tmp_path, name, content, says, fresh):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    assert says in refused(FAILED, *tiny_search, "--out", tmp_path / "out", "-q", *fresh)
    assert (tmp_path / name).read_text() == content
    assert len(contents(tmp_path)) == 1


def test_a_folder_below_a_file(tiny_search, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "Choose a writable --out" in refused(FAILED, *tiny_search, "--out", tmp_path / "file" / "run", "-q")


def test_runs_that_are_none_or_have_not_finished(tiny_run, tmp_path):
    assert "holds no run" in refused(FAILED, "report", tmp_path)
    assert "holds no run" in refused(FAILED, "report", tmp_path / "missing")
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    (folder / "summary.json").write_text('{"command": 1}')
    assert "does not fit" in refused(FAILED, "report", tiny_run, folder)
    (folder / "summary.json").unlink()
    assert "did not finish" in refused(FAILED, "report", folder)
    shutil.rmtree(folder / "model")
    assert "did not finish" in refused(FAILED, "eval", folder, "-q")
    manifest = read(folder / "manifest.json")
    del manifest["facts"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "does not say" in refused(FAILED, "eval", folder, "-q")


@pytest.mark.parametrize("part", ["layers", "predictions"])
@pytest.mark.parametrize("damage", ["cut", "of another layer", "empty"])
def test_broken_artefacts_are_named(tiny_search, tiny_run, tmp_path, part, damage):
    folder = tmp_path / "run"
    done(*tiny_search, "--out", folder, "-q")
    (folder / "summary.json").unlink()
    made = tmp_path / "globalopt-cache" / {"layers": "refinement/*/layers"}.get(part, f"{part}/*")
    first, *_, last = sorted(made.parent.parent.glob(f"{'/'.join(made.parts[-2:])}/*.safetensors"))
    if part == "predictions":
        shutil.rmtree(tmp_path / "globalopt-cache" / "allocation")
    if damage == "cut":
        first.write_bytes(first.read_bytes()[:-9])
    elif damage == "empty":
        save_file({}, first)
    else:
        shutil.copy(last, first)
    message = refused(FAILED, *tiny_search, "--out", folder, "-q")
    assert str(first) in message
    assert "Delete it" in message
    first.unlink()
    done(*tiny_search, "--out", folder, "-q")
    assert_alike(results(folder), results(tiny_run))


# ------------------------------------------------------------------------------------------------- a full disk


def full_disk(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "name", ["manifest.json", "grams", "spans", "predictions", "budget.json", "refinement", "summary.json"]
)
def test_a_disk_that_fills_up_at_a_rename(tiny_search, tiny_run, tmp_path, monkeypatch, name):
    folder = tmp_path / "run"
    rename = os.replace
    seen = []

    def replace(source, target):
        path = Path(target).relative_to(tmp_path)
        seen.append(path)
        # Not the first file of its kind: some are there already when the disk is full.
        if path.parts[1] == name and (path.name == name or sum(p.parts[1] == name for p in seen) > 3):
            full_disk()
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", replace)
        message = refused(FAILED, *tiny_search, "--out", folder, "-q")
    assert "the disk is full" in message
    assert "Free space and run the same command again" in message
    assert name in message
    assert no_partial_files(folder)
    assert name == "manifest.json" or Run.open(folder)
    done(*tiny_search, "--out", folder, "-q")
    assert_alike(results(folder), results(tiny_run))


def test_a_disk_that_fills_up_while_tensors_are_written(tiny_search, tiny_run, tmp_path, monkeypatch):
    def cut_off(tensors, filename, metadata):
        Path(filename).write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", cut_off)
        assert "No space left" in refused(FAILED, *tiny_search, "--out", folder, "-q")
    assert set(contents(folder)) == {"manifest.json"}
    assert no_partial_files(tmp_path / "globalopt-cache")
    done(*tiny_search, "--out", folder, "-q")
    assert_alike(results(folder), results(tiny_run))


def test_a_disk_that_fills_up_while_the_model_is_written(tiny_search, tiny_run, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", full_disk)
        assert "No space left" in refused(FAILED, *tiny_search, "--out", folder, "-q")
    assert no_partial_files(folder)
    assert not (folder / "model").exists()
    done(*tiny_search, "--out", folder, "-q")
    assert_alike(results(folder), results(tiny_run))


def test_a_disk_that_fills_up_while_a_picture_is_written(tiny_run, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full_disk)
        result = run("report", folder)
    # The tables are printed, and one line says why the page and the pictures are not there.
    assert result.exit_code == 0
    assert "Quality" in result.stdout
    assert result.stderr.startswith("Page and pictures are not drawn. Cannot write")
    assert result.stderr.count("\n") == 1
    assert no_partial_files(folder)
    done("report", folder)


def test_memory_that_runs_out(tiny_search, tmp_path, monkeypatch):
    def out_of_memory(*arguments):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr("globalopt.pipeline.analyse.write_spans", out_of_memory)
    message = refused(FAILED, *tiny_search, "--out", tmp_path / "run", "-q")
    assert "80 GiB" in message
    assert "--batch-size" in message
