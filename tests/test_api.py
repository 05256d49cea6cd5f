"""Searching and compressing from Python gives what the command line gives, and leaves the model alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import globalopt
from allocators import get_allocator
from globalopt.budgets import budget_file
from globalopt.errors import CalibrationError, UnsupportedModelError, UsageError
from globalopt.pipeline.live import live_session
from globalopt.pipeline.options import TextOptions
from globalopt.pipeline.reporter import Reporter
from globalopt.protocols import Needs, Reads, Solver
from globalopt.values.budget import Target
from globalopt.values.decomposition import Decomposition, Solution
from globalopt.values.metric import Metric
from globalopt.values.problem import Allocation, Problem
from reports import QuietProgress
from tests.command import WINDOWS, assert_alike, done, refused, results, write_text
from tests.tiny_models import save_tiny, tiny_tokenizer

SIZES: dict[str, Any] = {"nsamples": 8, "seqlen": 16, "eval_windows": 2, "progress": False}
QUICK: dict[str, Any] = {"allocator": "knapsack", "solver": "wanda", "refining": globalopt.RefineOptions()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model folder, and a text."""
    folder = tmp_path_factory.mktemp("api")
    save_tiny(folder / "model")
    return folder / "model", write_text(folder / "text.txt")


@pytest.fixture
def model(place: tuple[Path, Path]) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(place[0])


def test_a_search_gives_what_the_command_gives(
    place: tuple[Path, Path], model: PreTrainedModel, tmp_path: Path
) -> None:
    words = "--allocator", "auto", "--search-tokens", 2000, "--solver", "hassle-free", "--set", "steps=4"
    typed = "search", place[0], "--calibration", place[1], "--budget", 0.5, *WINDOWS, *words
    done(*typed, "--out", tmp_path / "typed", "--quiet")
    before = copy.deepcopy(model.state_dict())
    called = globalopt.search(
        model,
        AutoTokenizer.from_pretrained(place[0]),
        place[1],
        budget=0.5,
        allocator="auto",
        search_tokens=2000,
        solver="hassle-free",
        solver_options={"steps": 4},
        out=tmp_path / "called",
        **SIZES,
    )
    found, expected = results(tmp_path / "called"), results(tmp_path / "typed")
    # The command keeps the source's file; a tokenizer in memory is saved, its class by a name that older readers know.
    ours, theirs = (one.pop("model/tokenizer_config.json") for one in (found, expected))
    assert {name: ours[name] for name in theirs if name != "tokenizer_class"} == {
        name: value for name, value in theirs.items() if name != "tokenizer_class"
    }
    assert_alike(found, expected)
    assert called.folder == tmp_path / "called"
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, value in called.layers.items():
        assert torch.equal(called.model.get_parameter(f"{name}.weight"), value.dense())
    assert called.allocation.used == called.summary.used <= called.budget.limit


def test_nothing_stays_where_no_folder_is_given(
    place: tuple[Path, Path], model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tokenizer = tiny_tokenizer()
    found = globalopt.search(model, tokenizer, place[1], 0.6, **QUICK, **SIZES)
    assert not list(tmp_path.iterdir())
    assert found.folder is None
    again = globalopt.compress(
        model, tokenizer, place[1], found.budget, solver="magnitude", refining=globalopt.RefineOptions(), **SIZES
    )
    assert again.allocation.targets == found.allocation.targets
    assert not list(tmp_path.iterdir())
    logits = again.model(torch.tensor([[5, 6, 7]])).logits
    assert logits.isfinite().all()


def test_documents_are_strings_or_the_name_of_a_text(place: tuple[Path, Path], model: PreTrainedModel) -> None:
    documents = place[1].read_text().split(" and ")
    found = globalopt.search(model, tiny_tokenizer(), documents, **QUICK, **SIZES)
    assert found.summary.splits["calibration"]["source"] == "text in memory"
    with pytest.raises(CalibrationError, match=r"Document 1 of the text is a int"):
        globalopt.search(model, tiny_tokenizer(), ["one", 2], **QUICK, **SIZES)  # pyright: ignore[reportArgumentType]


def test_commands_read_a_run_of_a_model_in_memory(
    place: tuple[Path, Path], model: PreTrainedModel, tmp_path: Path
) -> None:
    documents = place[1].read_text().split(" and ")
    globalopt.search(model, tiny_tokenizer(), documents, out=tmp_path / "run", **QUICK, **SIZES)
    assert "globalopt compress MODEL" in done("report", tmp_path / "run").stdout
    assert "--calibration TEXT" in done("report", tmp_path / "run").stdout
    assert "was made of a model in memory; say where it is with --dense" in refused(2, "eval", tmp_path / "run")
    assert "with a text in memory" in refused(2, "eval", tmp_path / "run", "--dense", place[0])
    done("eval", tmp_path / "run", "--dense", place[0], "--calibration", place[1])


def test_a_serving_profile_limits_the_search(place: tuple[Path, Path], model: PreTrainedModel) -> None:
    words = {**QUICK, "solver": "oats", "solver_options": {"steps": 2}}
    found = globalopt.search(model, tiny_tokenizer(), place[1], 0.6, serving_profile="two-four", **words, **SIZES)
    assert {entry.pattern for entry in found.budget.layers} == {"2:4"}
    found = globalopt.search(model, tiny_tokenizer(), place[1], 0.6, rank_multiple=3, **words, **SIZES)
    assert all(value.rank % 3 == 0 for value in found.layers.values())


def test_half_precision_comes_back_as_it_was(place: tuple[Path, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(place[0], dtype=torch.bfloat16).train()
    found = globalopt.search(model, tiny_tokenizer(), place[1], **QUICK, **SIZES)
    assert model.training
    assert found.model.dtype == model.dtype == torch.bfloat16
    assert found.summary.dense[0].dtype == "float32"


@dataclass(frozen=True)
class Halves(Solver[tuple[Tensor, Metric]]):
    """A solver of one's own: it keeps the first entries."""

    name: ClassVar[str] = "halves"
    needs: ClassVar[Needs] = Needs.NOTHING
    low_rank: ClassVar[bool] = False
    patterns: ClassVar[bool] = False

    def prepare(self, weight: Tensor, metric: Metric) -> tuple[Tensor, Metric]:
        return weight, metric

    def solve(self, state: tuple[Tensor, Metric], target: Target, start: Decomposition | None = None) -> Solution:
        weight, metric = state
        S = weight.clone()
        S.view(-1)[target.nnz :] = 0
        empty = S.new_zeros(len(S), 0), S.new_zeros(0, S.shape[1])
        return Solution(Decomposition(S, *empty), metric.error(weight - S))


@dataclass(frozen=True)
class Mine:
    """An allocator of one's own."""

    name: ClassVar[str] = "mine"
    paper: ClassVar[str] = ""
    reads: ClassVar[Reads] = Reads.NOTHING
    version: ClassVar[int] = 1

    def allocate(self, problem: Problem, objective: Any = None) -> Allocation:
        return problem.finish(get_allocator("uniform", {}).allocate(problem).targets, self.name)


def test_methods_of_ones_own(place: tuple[Path, Path], model: PreTrainedModel) -> None:
    searched = globalopt.search(model, tiny_tokenizer(), place[1], **{**QUICK, "allocator": Mine()}, **SIZES)
    assert searched.budget.allocator == "mine"
    file = budget_file.without_rank(searched.budget)
    plain = globalopt.RefineOptions()
    found = globalopt.compress(
        model, tiny_tokenizer(), place[1], file, solver=Halves(), sensitivity="none", refining=plain, **SIZES
    )
    assert found.summary.solver == "halves"
    for entry in file.layers:
        assert found.layers[entry.name].S.view(-1)[entry.nnz :].count_nonzero() == 0


def test_what_is_no_model_is_refused(place: tuple[Path, Path], model: PreTrainedModel) -> None:
    texts = TextOptions(nsamples=8, seqlen=16, eval_windows=2)
    with pytest.raises(UsageError, match=r"got a str"):
        live_session("model", tiny_tokenizer(), place[1], None, texts, 0, Reporter(QuietProgress()))  # pyright: ignore
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM is not whole on one device"):
        live_session(empty, tiny_tokenizer(), place[1], None, texts, 0, Reporter(QuietProgress()))


def test_public_names_are_there() -> None:
    for name in globalopt.__all__:
        assert getattr(globalopt, name).__module__.startswith("globalopt.")
    with pytest.raises(AttributeError, match=r"no attribute 'sarch'"):
        _ = globalopt.sarch  # pyright: ignore
