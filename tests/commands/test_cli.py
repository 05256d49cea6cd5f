from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from allocators import ALLOCATORS
from globalopt.budgets import budget_file
from globalopt.commands.console import INTERRUPTED
from globalopt.commands.explanations import options
from globalopt.matching.block import Matching
from globalopt.matching.model import Distillation
from globalopt.models.finding import find_layers
from globalopt.models.identity import model_fingerprint
from globalopt.models.loading import load_model
from globalopt.pipeline import search
from globalopt.reference import reference_folder
from globalopt.runs.artefacts import PREDICTION, SOLVED_LAYER, SPAN, SUMMARY
from globalopt.runs.folder import Run
from globalopt.runs.packing import unpack
from globalopt.values.budget import Budget, Target
from globalopt.values.decomposition import Decomposition, follows
from globalopt.values.error_unit import ErrorUnit
from globalopt.values.layer import NM
from globalopt.values.problem import Problem
from globalopt.values.surface import ErrorSurface
from solvers import SOLVERS
from solvers.oats import OATS
from tests.command import (
    WINDOWS,
    assert_alike,
    contents,
    done,
    interrupt,
    no_partial_files,
    read,
    refused,
    results,
    run,
)
from tests.shortened import unabridged
from tests.tiny_models import save_tiny


def saved(folder) -> dict[str, Decomposition]:
    """The factors of every layer of a run, as they are on the disk."""
    made = {}
    for path in (folder / "layers").iterdir():
        made[path.name.removesuffix(".safetensors")] = unpack(load_file(path))
    return made


def process(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as users start it."""
    command = [sys.executable, "-m", "globalopt", *map(str, arguments)]
    # Sums in another number of threads round differently; the tests in this process use one.
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment = {**threads, "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, encoding="utf-8")


# ------------------------------------------------------------------------------------------------- the start


@pytest.mark.parametrize("arguments", [["search", "--help"], ["--version"]])
def test_help_does_not_wait_for_torch(arguments):
    script = (
        f"import sys; sys.argv[1:] = {arguments!r}\n"
        "from globalopt.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0


def test_version():
    assert done("--version").stdout == "globalopt 0.1.0\n"


def test_list_names_every_method():
    listed = done("list").stdout
    for method in (*SOLVERS.values(), *ALLOCATORS.values()):
        assert method.name in listed
        assert method.paper in listed
    assert "globalopt list matching" in listed


@pytest.mark.parametrize("name", [*SOLVERS, *ALLOCATORS, "matching", "distillation"])
def test_list_explains_every_option_of_a_method(name):
    methods = {**SOLVERS, **ALLOCATORS, "matching": Matching, "distillation": Distillation}
    for option in options(methods[name]):
        assert option.meaning, option
        assert option.name in done("list", name).stdout


def test_list_of_an_unknown_name_offers_the_closest():
    assert "3basil" in refused(2, "list", "3basill")


@pytest.mark.parametrize("command", ["search", "compress"])
def test_help_shows_the_words_of_options_and_no_default_in_brackets(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 250)
    text = done(command, "--help").stdout
    for words in ("[none|block|model]", "[fisher|none]", "[block|site]", "[auto|float32|bfloat16|float16]"):
        assert words in text
    assert "[default: (" not in text


# ------------------------------------------------------------------------------------------------- search


def test_search_leaves_a_whole_run(tiny_run):
    assert {path.name for path in tiny_run.iterdir()} == {
        "manifest.json", "budget.json", "summary.json", "windows.json", "samples.json", "curves",
        "layers", "model", "asked.json",
    }  # fmt: skip
    assert no_partial_files(tiny_run)
    assert {path.name for path in (tiny_run / "model").iterdir()} >= {"config.json", "model.safetensors"}


def test_saved_factors_are_what_the_budget_file_says(tiny_run):
    file = budget_file.read(tiny_run / "budget.json")
    factors = saved(tiny_run)
    assert set(factors) == {entry.name for entry in file.layers}
    for entry in file.layers:
        value = factors[entry.name]
        assert (value.rank, value.nnz) == (entry.rank, entry.nnz)
    counted = sum(int(value.S.count_nonzero()) + value.U.numel() + value.V.numel() for value in factors.values())
    assert counted == file.used <= file.limit
    assert file.used >= 0.999 * file.limit
    assert file.limit == file.total // 2


def test_the_saved_model_is_the_sum_of_the_saved_factors(tiny_run):
    weights = load_file(tiny_run / "model" / "model.safetensors")
    for name, value in saved(tiny_run).items():
        assert torch.equal(weights[f"{name}.weight"], value.dense())


def test_a_second_run_computes_nothing(tiny_search, tiny_run, monkeypatch):
    before = contents(tiny_run)
    monkeypatch.setattr(search, "analyse", None)
    monkeypatch.setattr(search, "finish", None)
    again = done(*tiny_search, "--out", tiny_run, "--json")
    assert "is finished" in again.stderr
    assert json.loads(again.stdout) == read(tiny_run / "summary.json")
    assert contents(tiny_run) == before


def test_the_same_seed_in_another_folder_gives_the_same(tiny_search, tiny_run, tmp_path):
    done(*tiny_search, "--out", tmp_path / "again", "-q")
    assert_alike(results(tmp_path / "again"), results(tiny_run))


def test_another_seed_in_the_same_folder_is_refused(tiny_search, tiny_run):
    before = contents(tiny_run)
    message = refused(1, *tiny_search, "--out", tiny_run, "--seed", 1, "-q")
    assert "holds another run" in message
    assert "seed" in message
    assert "--fresh" in message
    assert "(different budget)" in refused(1, *tiny_search, "--out", tiny_run, "--budget", 0.41, "-q")
    assert contents(tiny_run) == before


def test_fresh_replaces_a_run_and_spares_other_files(tiny_search, tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    (folder / "notes.txt").write_text("mine")
    done(*tiny_search, "--out", folder, "--seed", 1, "--fresh", "-q")
    assert read(folder / "summary.json")["seed"] == 1
    assert (folder / "notes.txt").read_text() == "mine"
    assert read(folder / "manifest.json")["fingerprint"] != read(tiny_run / "manifest.json")["fingerprint"]


@pytest.mark.parametrize(
    "options",
    [
        ["--pattern", "2:4", "--budget", "0.6"],
        ["--pattern", "2:4", "--budget", "0.7", "--accounting", "bytes", "--sensitivity", "none"],
        ["--accounting", "bytes", "--allocator", "uniform", "--allocator-set", "rank_share=0.2"],
        ["--sensitivity", "none", "--span-scaling", "none", "--predict-from", "span", "--budget", "0.3"],
        ["--solver", "3basil", "--set", "steps=30,output-damping=0.2", "--budget", "0.9"],
        ["--solver", "magnitude", "--budget", "1", "--predict-from", "span"],
    ],
    ids=" ".join,
)
def test_kinds_of_search(tiny_llama, tiny_text, tmp_path, options):
    solver = [] if "--solver" in options else ["--solver", "oats", "--set", "steps=5"]
    folder = tmp_path / "run"
    done("search", tiny_llama, "--calibration", tiny_text, *WINDOWS, *solver, *options, "--out", folder, "-q")
    file = budget_file.read(folder / "budget.json")
    factors = saved(folder)
    budget = Budget(file.limit, file.total, file.accounting)
    for entry in file.layers:
        value = factors[entry.name]
        assert (value.rank, value.nnz) == (entry.rank, entry.nnz)
        assert budget.cost(entry.target, entry.spec) == entry.cost
        if "2:4" in options:
            assert follows(value.S, NM(2, 4))
            assert 2 * value.nnz == entry.d_out * entry.d_in
    assert sum(entry.cost for entry in file.layers) == file.used <= file.limit


def test_json_is_all_there_is_on_stdout(tiny_search, tmp_path):
    printed = done(*tiny_search, "--out", tmp_path / "run", "--json").stdout
    assert json.loads(printed) == read(tmp_path / "run" / "summary.json")


def test_quiet_prints_the_result_alone(tiny_search, tmp_path):
    made = done(*tiny_search, "--out", tmp_path / "run", "-q")
    labels = [line.split()[0] for line in made.stdout.splitlines()]
    assert labels == ["kept", "validation", "test", "budget", "model"]
    assert made.stderr == ""
    assert not (tmp_path / "run" / "report").exists()


def test_without_out_the_folder_is_named_by_the_options(tiny_search, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done(*tiny_search, "--budget", "0.6", "--pattern", "2:4", "-q")
    assert (tmp_path / "runs" / "llama-0.6-2of4-auto-oats-seed0" / "summary.json").exists()


def test_fallbacks_have_an_exit_code_of_their_own(tiny_llama, tiny_text, tmp_path):
    # 16 tokens leave every Gram singular, and no damping is asked for.
    one_window = ("--nsamples", 1, "--seqlen", 16, "--eval-windows", 2)
    options = ("--solver", "3basil", "--set", "damping=0,diagonal_damping=0,steps=20", "--out", tmp_path / "run")
    result = run("search", tiny_llama, "--calibration", tiny_text, *one_window, *options)
    assert result.exit_code == 4
    assert "fallback" in result.stdout
    assert (tmp_path / "run" / "summary.json").exists()


# ------------------------------------------------------------------------------------------------- interruption


def interrupted(search, folder, monkeypatch, owner, name, at) -> None:
    """Check that an interrupted search says so in one line, and goes on when it is run again."""
    with monkeypatch.context() as patch:
        interrupt(patch, owner, name, at)
        first = run(*search, "--out", folder, "-q")
    assert first.exit_code == INTERRUPTED
    assert first.stdout == ""
    assert first.stderr.startswith("Interrupted. Run the same command again")
    assert first.stderr.count("\n") == 1
    assert no_partial_files(folder)
    assert not (folder / "summary.json").exists()
    done(*search, "--out", folder, "-q")
    assert no_partial_files(folder)


@pytest.mark.parametrize("at", [1, 6, 14])
def test_interrupted_while_refining(tiny_search, tiny_run, tmp_path, monkeypatch, at):
    interrupted(tiny_search, tmp_path / "run", monkeypatch, OATS, "solve", at)
    assert_alike(results(tmp_path / "run"), results(tiny_run))


@pytest.mark.parametrize(
    ("row", "at"), [(SPAN, 5), (PREDICTION, 3), (SOLVED_LAYER, 14), (SUMMARY, 1)], ids=lambda row: ""
)
def test_interrupted_between_artefacts(tiny_search, tiny_run, tmp_path, monkeypatch, row, at):
    interrupted(tiny_search, tmp_path / "run", monkeypatch, Run, row, at)
    assert_alike(results(tmp_path / "run"), results(tiny_run))


def test_interrupted_with_a_model_in_half_precision(tiny_text, tmp_path, monkeypatch):
    # What later blocks see must be what was saved, not what was computed before it was rounded.
    model = save_tiny(tmp_path / "model", dtype=torch.bfloat16)
    options = ("--calibration", tiny_text, *WINDOWS, "--solver", "oats", "--set", "steps=5")
    done("search", model, *options, "--out", tmp_path / "whole", "-q", "--no-cache")
    interrupted(("search", model, *options), tmp_path / "run", monkeypatch, OATS, "solve", 9)
    assert_alike(results(tmp_path / "run"), results(tmp_path / "whole"))
    assert saved(tmp_path / "run")["model.layers.0.mlp.up_proj"].S.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------- other commands


def ranked(path: Path, to: Path) -> Path:
    """A budget file with a rank in place of as many nonzeros, in every layer that keeps enough of these."""
    file = budget_file.read(path)
    layers = []
    for entry in file.layers:
        cost = entry.d_out + entry.d_in
        partly = cost < entry.nnz < entry.d_out * entry.d_in
        update = {"rank": entry.rank + 1, "nnz": entry.nnz - cost} if partly else {}
        layers.append(entry.model_copy(update=update))
    budget_file.write(to, file.model_copy(update={"layers": tuple(layers)}))
    return to


@pytest.mark.parametrize("solver", ["hassle-free", "wanda"])
def test_a_budget_is_refined_by_other_solvers(tiny_llama, tiny_text, tiny_run, tmp_path, solver):
    options = ("--calibration", tiny_text, *WINDOWS, "--solver", solver, "--out", tmp_path / "run", "--json")
    asked = ranked(tiny_run / "budget.json", tmp_path / "asked.json")
    printed = done("compress", tiny_llama, "--budget-file", asked, *options).stdout
    summary = json.loads(printed)
    file = budget_file.read(asked)
    assert summary["solver"] == solver
    assert (tmp_path / "run" / "budget.json").read_bytes() == asked.read_bytes()
    assert 0.99 * file.used <= summary["used"] <= file.used
    factors = saved(tmp_path / "run")
    counted = sum(int(value.S.count_nonzero()) + value.U.numel() + value.V.numel() for value in factors.values())
    assert counted == summary["used"]
    if solver == "wanda":
        assert any(entry.rank for entry in file.layers)
        assert all(value.rank == 0 for value in factors.values())
        assert "kept as nonzeros" in " ".join(summary["notes"])


def test_eval_of_a_run_repeats_what_its_summary_says(tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    measured = json.loads(done("eval", folder, "--json").stdout)
    summary = read(tiny_run / "summary.json")
    assert read(folder / "eval.json") == measured
    assert measured["model"]["metrics"] == summary["compressed"]
    assert measured["dense"]["metrics"] == summary["dense"]


def test_eval_of_a_model(tiny_run, tiny_llama, tiny_text):
    options = ("--calibration", tiny_text, "--seqlen", 16, "--eval-windows", 2, "--json")
    alone = json.loads(done("eval", tiny_llama, *options).stdout)
    assert alone["model"]["metrics"] == read(tiny_run / "summary.json")["dense"]
    assert alone["dense"] is None
    compressed = done("eval", tiny_run / "model", "--dense", tiny_llama, *options).stdout
    assert json.loads(compressed)["model"]["metrics"] == read(tiny_run / "summary.json")["compressed"]


def test_eval_can_use_other_windows(tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    shown = done("eval", folder, "--seqlen", 8, "--eval-windows", 5).stdout
    assert "5 windows of 8 tokens" in shown
    assert "Quality" in done("eval", folder, "-q").stdout


def test_report_of_one_run_and_of_several(tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "[bold]run")
    shown = done("report", folder).stdout
    assert "Search on the true loss" in shown
    # A path is no markup, and is not folded.
    assert f"   model  {folder}/model\n" in shown
    assert f"  report  {folder}/report/report.html\n" in shown
    names = ("allocation", "error", "curves", "search", "convergence")
    pictures = {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    assert {path.name for path in (folder / "report").iterdir()} == {"report.html", *pictures}
    assert len(done("report", folder, "-v").stdout.splitlines()) >= len(shown.splitlines()) + 2 * 14
    compared = done("report", folder, tiny_run).stdout
    assert "Comparison" in compared
    assert "half" in compared
    assert "not paired" not in compared
    found = json.loads(done("report", folder, tiny_run, "--json").stdout)
    assert [run["run"] for run in found["runs"]] == [str(folder), str(tiny_run)]
    assert [(one["split"], one["paired"], one["kl"]["value"]) for one in found["differences"]] == [
        ("validation", True, 0.0),
        ("test", True, 0.0),
    ]
    with unabridged():
        written = done("report", folder, tiny_run, "--out", tmp_path / "compared").stdout
    assert written.startswith(compared)
    assert f"  report  {tmp_path}/compared/comparison.html\n" in written
    assert len(list((tmp_path / "compared").iterdir())) == 5
    assert (tmp_path / "compared" / "quality.png").stat().st_size > 10_000
    assert "--out is for several runs" in refused(2, "report", folder, "--out", tmp_path / "one")
    # Runs that did not keep their windows are compared too, less sharply; a broken record of them is an error.
    (folder / "windows.json").unlink()
    assert "not paired by windows" in done("report", folder, tiny_run).stdout
    (folder / "windows.json").write_text("[{}]")
    assert "windows.json does not fit" in refused(1, "report", folder, tiny_run)


def test_what_windows_lost_averages_to_the_metrics(tiny_run):
    summary = read(tiny_run / "summary.json")
    losses = read(tiny_run / "windows.json")
    for metrics, split in zip(summary["compressed"], losses, strict=True):
        assert (split["split"], split["text_sha256"]) == (metrics["split"], metrics["text_sha256"])
        assert len(split["kl"]) == metrics["windows"]
        assert sum(split["kl"]) / len(split["kl"]) == pytest.approx(metrics["kl"])
        assert sum(split["nll"]) / len(split["nll"]) == pytest.approx(metrics["nll"])


def test_the_command_that_a_report_proposes_works(tiny_run, tmp_path):
    last = done("report", tiny_run).stdout.splitlines()[-1]
    program, *arguments = last.split()[1:]
    assert program == "globalopt"
    done(*arguments, "--out", tmp_path / "next", "--set", "steps=2", "-q")
    assert read(tmp_path / "next" / "summary.json")["solver"] == "hassle-free"
    shutil.rmtree(tiny_run / "report")


def test_budget_show_and_validate(tiny_run, tiny_llama):
    path = tiny_run / "budget.json"
    assert "q_proj" in done("budget", "show", path).stdout
    assert done("budget", "validate", path).stdout.startswith(f"{path}: valid. 14 layers")
    assert "valid" in done("budget", "validate", path, "--model", tiny_llama).stdout
    assert "another model" in refused(1, "budget", "validate", path, "--model", "reference")


def test_the_reference_model_needs_neither_name_nor_text(tmp_path):
    layers = find_layers(load_model(reference_folder()).model)
    ends = [(spec, (Target.zero(), Target.dense(spec))) for spec in layers.specs]
    surfaces = tuple(ErrorSurface(spec, targets, (1.0, 0.0)) for spec, targets in ends)
    problem = Problem(surfaces, Budget.fraction(0.5, layers.specs))
    allocation = ALLOCATORS["uniform"]().allocate(problem)
    coverage = layers.coverage
    file = budget_file.make(
        allocation, problem, model_fingerprint(layers), coverage.covered, coverage.block_params, 0.5, ErrorUnit.NATS
    )
    budget_file.write(tmp_path / "budget.json", file)
    options = ("--solver", "magnitude", *WINDOWS, "--out", tmp_path / "run")
    first = done("compress", "reference", "--budget-file", tmp_path / "budget.json", *options, "--json")
    assert "bundled reference model" in first.stderr
    assert json.loads(first.stdout)["model"] == "reference"
    measured = json.loads(done("eval", tmp_path / "run", "--json").stdout)
    assert measured["model"]["metrics"] == read(tmp_path / "run" / "summary.json")["compressed"]


# ------------------------------------------------------------------------------------------------- as a process


def test_a_process_reports_on_stdout_and_progresses_on_stderr(tiny_search, tiny_run, tmp_path):
    # An output that has no letter for some of our signs must not lose the report either.
    made = process(*tiny_search, "--out", tmp_path / "run", PYTHONIOENCODING="ascii")
    assert made.returncode == 0, made.stderr
    assert "Allocation by kind" in made.stdout
    assert made.stdout.isascii()
    # Nothing is left out of the pictures of a process of its own.
    assert (tmp_path / "run" / "report" / "allocation.png").stat().st_size > 10_000
    steps = made.stderr.splitlines()
    stages = ("load", "labels", "span", "predict", "correct", "search", "refine", "save", "evaluate", "samples")
    assert [line.split()[0] for line in steps if " done " in line] == list(stages)
    # Nothing of the libraries' own chatter.
    assert all(line.split()[0] in stages for line in steps)
    assert_alike(results(tmp_path / "run"), results(tiny_run))


def test_a_process_that_fails_says_one_line(tmp_path):
    made = process("budget", "show", tmp_path / "budget.json")
    assert made.returncode == 1
    assert made.stdout == ""
    assert made.stderr == f"error: There is no file {tmp_path / 'budget.json'}.\n"
