"""Zero-shot tasks: accuracies by hand, what is chosen and refused, and the whole command."""

from __future__ import annotations

import json
import shutil
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from globalopt.errors import NumericalError, UsageError
from globalopt.evaluation import tasks
from globalopt.evaluation.task_files import PAPERS, read_task_file
from globalopt.evaluation.tasks import ask, choose_tasks
from globalopt.models.loading import LoadedModel, load_model
from globalopt.runs.artefacts import SCORES
from globalopt.runs.folder import Run
from globalopt.values.scores import Score, averages
from reports import QuietProgress, make_progress, render_scores
from tests.command import contents, done, read, refused
from tests.evaluation.test_task_files import write

USAGE = 2

ARC = [
    {"query": "Question: What is wet?", "choices": ["rain", "a very dry stone", "sun", "fire"], "gold": 0},
    {"query": "Question: What is hot?", "choices": ["ice", "snow", "the fire", "fog"], "gold": 2},
    {"query": "Question: Who runs?", "choices": ["a cat", "mats", "the home of a dog", "one"], "gold": 3},
    {"query": "Question: How far?", "choices": ["far", "on", "and on", "home"], "gold": 1},
]
WINOGRANDE = [
    {
        "context_options": ["The cat saw the dog so the cat", "The cat saw the dog so it"],
        "continuation": "ran",
        "gold": 1,
    },
    {"context_options": ["Ann saw Bea and Ann", "Ann saw Bea and Bea"], "continuation": "sat far from home", "gold": 0},
    {"context_options": ["One dog, a mat: the dog", "One dog, a mat: the mat"], "continuation": "is on", "gold": 0},
]
LAMBADA = [
    {"context": "the cat sat on a mat and the dog sat on a", "continuation": "mat"},
    {"context": "one", "continuation": "cat"},
    {"context": "a home far from", "continuation": "home"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write(folder / "arc_easy.jsonl", *ARC)
    write(folder / "winogrande.jsonl", *WINOGRANDE)
    write(folder / "lambada_openai.jsonl", *LAMBADA)
    return folder


@pytest.fixture(scope="module")
def loaded(tiny_llama) -> LoadedModel:
    return load_model(tiny_llama)


def log_likelihood(loaded: LoadedModel, context: str, text: str) -> tuple[float, bool]:
    """`sum log p(text | context)`, and whether the model would have said it, a token at a time."""
    ids: Any = loaded.tokenizer
    before, after = ids(context)["input_ids"], ids(text)["input_ids"]
    total, greedy = 0.0, True
    for token in after:
        logits: Tensor = loaded.model(torch.tensor([before])).logits[0, -1]
        total += float(logits.log_softmax(0)[token])
        greedy = greedy and int(logits.argmax()) == token
        before = [*before, token]
    return total, greedy


def test_accuracies_are_those_by_hand(loaded, folder):
    answers = ask(loaded, choose_tasks(None, folder), None, 2, QuietProgress())
    found = {task.name: task for task in answers.scores}
    assert list(found) == ["arc_easy", "lambada_openai", "winogrande"]

    right, right_normed = [], []
    for item in ARC:
        each = [log_likelihood(loaded, f"{item['query']}\nAnswer:", f" {choice}")[0] for choice in item["choices"]]
        normed = [value / len(choice) for value, choice in zip(each, item["choices"], strict=True)]
        right.append(float(each.index(max(each)) == item["gold"]))
        right_normed.append(float(normed.index(max(normed)) == item["gold"]))
    # The tiny model must be wrong about some and see a difference between the two.
    assert 0 < sum(right) + sum(right_normed) < 8
    assert right != right_normed
    assert found["arc_easy"].scores == {"acc": Score.mean(right), "acc_norm": Score.mean(right_normed)}
    assert answers.items["arc_easy"] == {"acc": tuple(right), "acc_norm": tuple(right_normed)}

    right = []
    for item in WINOGRANDE:
        each = [log_likelihood(loaded, c, f" {item['continuation']}")[0] for c in item["context_options"]]
        right.append(float(each.index(max(each)) == item["gold"]))
    assert found["winogrande"].scores == {"acc": Score.mean(right)}

    each = [log_likelihood(loaded, item["context"], f" {item['continuation']}") for item in LAMBADA]
    mean = Score.mean([-value for value, _ in each])
    assert mean.stderr is not None
    perplexity = found["lambada_openai"].scores["perplexity"]
    assert perplexity.value == pytest.approx(torch.tensor(mean.value).exp().item(), rel=1e-4)
    assert perplexity.stderr == pytest.approx(perplexity.value * mean.stderr, rel=1e-3)
    assert found["lambada_openai"].scores["acc"] == Score.mean([float(greedy) for _, greedy in each])


def test_a_limit_asks_the_first_items_and_progress_ends_at_all(loaded, folder):
    shown = StringIO()
    answers = ask(loaded, choose_tasks("arc_easy", folder), 2, 8, make_progress(Console(file=shown, width=200), False))
    (task,) = answers.scores
    assert (task.items, task.version, task.source) == (2, tasks.VERSION, "arc_easy.jsonl")
    assert task.sha256 == read_task_file(folder / "arc_easy.jsonl").sha256
    assert "100/100 % of 8 requests" in shown.getvalue()


def test_local_files_need_no_network(loaded, folder, monkeypatch):
    def connect(*_: Any) -> None:
        raise AssertionError("there is no network here")

    monkeypatch.setattr("socket.socket.connect", connect)
    assert len(ask(loaded, choose_tasks(None, folder), None, 8, QuietProgress()).scores) == 3


def test_batches_change_nothing(loaded, folder):
    one, many = (ask(loaded, choose_tasks(None, folder), None, size, QuietProgress()) for size in (1, 16))
    assert one.items.keys() == many.items.keys()
    for task, metrics in one.items.items():
        for metric, values in metrics.items():
            assert values == pytest.approx(many.items[task][metric], rel=1e-4)


def test_choosing(folder):
    tasks = choose_tasks("papers", folder)
    assert tasks.names == ("arc_easy", "winogrande")
    assert tasks.missing == ("piqa", "hellaswag", "arc_challenge", "rte", "openbookqa", "boolq")
    assert choose_tasks("winogrande, arc_easy", folder).names == ("winogrande", "arc_easy")
    for asked, says in (
        ("hellaswag", "holds no task 'hellaswag'. There are: arc_easy, lambada_openai, winogrande."),
        ("arc_easy,arc_easy", "names a task twice"),
        (",", "takes names separated by commas"),
    ):
        with pytest.raises(UsageError) as caught:
            choose_tasks(asked, folder)
        assert says in str(caught.value)


@pytest.mark.slow
def test_choosing_of_lm_evals_own():
    """Slow because lm-eval looks through all of its tasks."""
    assert choose_tasks("papers", None).names == PAPERS
    with pytest.raises(UsageError, match="did you mean 'arc_easy'"):
        choose_tasks("arc_eesy", None)


def test_a_yaml_task_of_the_users_own(loaded, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data = shutil.copyfile(folder / "arc_easy.jsonl", tmp_path / "data.jsonl")
    lines = ("task: mine", "dataset_path: json", f"dataset_kwargs: {{data_files: {{test: '{data}'}}}}")
    lines += ("test_split: test", "output_type: multiple_choice", "doc_to_text: '{{query}}\n\n  Answer:'")
    lines += ("doc_to_choice: choices", "doc_to_target: gold", "metric_list: [{metric: acc}]")
    (tmp_path / "mine.yaml").write_text("\n".join((*lines, "metadata: {version: 7}")))
    tasks = choose_tasks("mine", tmp_path)
    (mine,) = ask(loaded, tasks, None, 8, QuietProgress()).scores
    (ours,) = ask(loaded, choose_tasks("arc_easy", folder), None, 8, QuietProgress()).scores
    assert (mine.name, mine.version, mine.source, mine.items) == ("mine", "7", "lm-eval", 4)
    assert mine.scores == {"acc": ours.scores["acc"]}
    # What it reads is opened when it is asked.
    data.unlink()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "other")
    with pytest.raises(OSError, match="The data of mine cannot be read"):
        ask(loaded, choose_tasks("mine", tmp_path), None, 8, QuietProgress())


def test_what_cannot_be_asked_is_refused(tiny_llama, folder, tmp_path):
    broken = load_model(tiny_llama)
    broken.model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(NumericalError, match="logits of a task are not finite"):
        ask(broken, choose_tasks("arc_easy", folder), None, 8, QuietProgress())
    write(tmp_path / "long.jsonl", {"query": "q", "choices": ["a", "b" * 200], "gold": 0})
    with pytest.raises(UsageError, match=r"An answer has 201 tokens, and the model a context of 128: 'bbb"):
        ask(load_model(tiny_llama), choose_tasks("long", tmp_path), None, 8, QuietProgress())
    # A context that is too long loses its beginning, and is counted.
    write(tmp_path / "cut.jsonl", {"query": "q" * 200, "choices": ["a", "b"], "gold": 0}, ARC[0])
    assert ask(load_model(tiny_llama), choose_tasks("cut", tmp_path), None, 8, QuietProgress()).cut == 2


def test_averages_are_plain_and_their_errors_independent():
    tasks = [
        {"acc": Score(0.5, 0.3), "acc_norm": Score(0.2, None)},
        {"acc": Score(0.7, 0.4), "perplexity": Score(9, 1)},
    ]
    found = averages(tasks)
    assert found["acc"].value == pytest.approx(0.6)
    assert found["acc"].stderr == pytest.approx(0.25)
    assert found["acc_norm"] == Score(0.2, None)
    assert found.keys() == {"acc", "acc_norm"}


# ------------------------------------------------------------------------------------------------- the command


def test_eval_of_a_run_holds_it_against_the_dense_model(tiny_run, tiny_llama, tiny_text, folder, tmp_path):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    options = ("--tasks-path", folder, "--ppl", f"words={tiny_text}")
    scores = json.loads(done("eval", run, *options, "--json").stdout)
    assert scores == read(run / "eval.json")
    kept = Run.open(run).find(SCORES, None)
    assert kept is not None
    assert [metrics.split for metrics in kept.model.metrics] == ["validation", "test", "words"]
    summary = Run.open(run).summary()
    assert kept.model.metrics[:2] == summary.compressed
    assert kept.dense is not None
    assert kept.dense.metrics[:2] == summary.dense
    words = kept.model.metrics[2]
    assert words.windows == kept.texts["words"]["windows"] > 100
    assert kept.texts["words"]["text_sha256"] == kept.texts["validation"]["text_sha256"]
    # The dense model's own scores, and differences item by item.
    alone = json.loads(done("eval", tiny_llama, *options[:2], "--json").stdout)
    assert alone["model"]["tasks"] == scores["dense"]["tasks"]
    assert alone["model"]["weights_sha256"] == scores["dense"]["weights_sha256"] != scores["model"]["weights_sha256"]
    assert (alone["model"]["metrics"], alone["dense"]) == ([], None)
    for task, dense in zip(kept.model.tasks, kept.dense.tasks, strict=True):
        change = kept.changes[task.name]["acc"].value
        assert change == pytest.approx(task.scores["acc"].value - dense.scores["acc"].value)
    console = Console(file=StringIO(), width=80, color_system=None)
    render_scores(kept, console)
    shown = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    for words in ("arc_easy", "acc_norm", "average of 3", "weights " + kept.model.weights_sha256[:8], "words"):
        assert words in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown


@pytest.mark.parametrize("form", ["packed", "adapter"])
def test_eval_of_an_export(ranked_run, tiny_llama, folder, tmp_path, form):
    done("export", ranked_run, "--format", form, "--out", tmp_path / form, "-q")
    options = ("--tasks-path", folder, "--dense", tiny_llama, "--json")
    found = json.loads(done("eval", tmp_path / form, *options).stdout)
    expected = json.loads(done("eval", ranked_run / "model", *options).stdout)
    assert found["dense"] == expected["dense"]
    for task, other in zip(found["model"]["tasks"], expected["model"]["tasks"], strict=True):
        assert task["scores"]["acc"] == other["scores"]["acc"]
    before = contents(tmp_path / form)
    done("eval", tmp_path / form, "--tasks-path", folder, "-q")
    assert contents(tmp_path / form) == before


def test_a_broken_adapter_is_refused(ranked_run, folder, tmp_path):
    done("export", ranked_run, "--format", "adapter", "--out", tmp_path / "adapter", "-q")
    (tmp_path / "adapter" / "adapter" / "adapter_model.safetensors").write_bytes(b"x")
    said = refused(1, "eval", tmp_path / "adapter", "--tasks-path", folder, "-q")
    assert "The adapter in" in said


def test_wrong_options_are_refused(tiny_llama, tiny_text, folder, tmp_path, monkeypatch):
    for options, says in (
        (("--tasks", "piqa", "--tasks-path", folder), "holds no task 'piqa'"),
        (("--tasks-path", folder, "--tasks-limit", "1"), "--tasks-limit must be at least 2"),
        (("--ppl", "words"), "--ppl takes NAME=TEXT"),
        (("--ppl", f"test={tiny_text}"), "is the name of a split"),
        (("--ppl", f"words={tiny_text}", "--seqlen", "500"), "above the model's context of 128"),
        (("--tasks-path", tmp_path), "no task file"),
    ):
        assert says in refused(USAGE, "eval", tiny_llama, *options, "-q")
    write(tmp_path / "piqa.jsonl", {"query": "q", "choices": ["a", "b"], "gold": 2})
    assert "piqa.jsonl line 1: 'gold' is 2" in refused(1, "eval", tiny_llama, "--tasks-path", tmp_path, "-q")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    said = refused(USAGE, "eval", tiny_llama, "--tasks-path", folder, "-q")
    assert said == "Tasks need lm-eval. Install it with: pip install 'globalopt[eval]'"
