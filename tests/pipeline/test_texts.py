"""A model writes its own calibration text once: a run keeps it, the cache gives it again, and mixtures take a share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

import globalopt
from globalopt.errors import CalibrationError, UsageError
from globalopt.models.loading import load_model
from globalopt.pipeline import own_text, session
from globalopt.pipeline.options import ModelOptions, RefineOptions, TextOptions
from globalopt.pipeline.reporter import Reporter
from globalopt.pipeline.session import Session
from globalopt.runs.artefacts import OWN_TEXT, WRITTEN
from globalopt.runs.cache import Cache
from globalopt.runs.folder import Run
from globalopt.runs.workspace import Workspace
from reports import QuietProgress
from tests.command import WINDOWS, contents, done, interrupt, read, refused
from tests.tiny_models import tiny_model, tiny_tokenizer

SIZES: dict[str, Any] = {"nsamples": 6, "seqlen": 16, "eval_windows": 2, "batch_size": 2}
METHOD = ("--solver", "magnitude", "--sensitivity", "none", "--allocator", "uniform", "--match", "none", "-q")


class Notes(QuietProgress):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def opened(model: Path, cache: Cache | None = None, notes: Any = None, seed: int = 0, **options: Any) -> Session:
    texts = TextOptions(**{"calibration": "self", **SIZES, **options})
    return session.set_up(ModelOptions(str(model)), texts, seed, Reporter(notes or QuietProgress()), cache)


@pytest.fixture
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of two sequences of 16 tokens."""
    monkeypatch.setattr(own_text, "TOKENS_AT_ONCE", 32)


@pytest.mark.usefixtures("few_at_once")
def test_every_split_has_sequences_of_its_own_and_the_cache_gives_them_again(tiny_llama: Path, tmp_path: Path) -> None:
    cache, notes = Cache(tmp_path / "cache"), Notes()
    first = opened(tiny_llama, cache)
    assert [len(split.windows) for split in first.splits] == [6, 2, 2, 2]
    rows = torch.cat([split.windows for split in first.splits])
    assert len(rows.unique(dim=0)) == 12
    written = contents(tmp_path / "cache")
    again = opened(tiny_llama, cache, notes)
    assert [split.sha256 for split in again.splits] == [split.sha256 for split in first.splits]
    assert f"Used again from {tmp_path / 'cache'}: self-text." in notes.notes
    assert {name: body for name, body in contents(tmp_path / "cache").items() if "self-text" in name} == {
        name: body for name, body in written.items() if "self-text" in name
    }
    alone = opened(tiny_llama)
    assert torch.equal(torch.cat([split.windows for split in alone.splits]), rows)
    record = json.loads(json.dumps(first.splits.validation.record()))
    assert (record["source"], record["written"]["seed"], record["written"]["sequences"]) == ("self", 0, 12)
    assert opened(tiny_llama, cache, seed=1).splits.test.sha256 != first.splits.test.sha256


@pytest.mark.usefixtures("few_at_once")
def test_writing_that_was_stopped_goes_on_after_the_last_batch(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path / "cache")
    whole = opened(tiny_llama)
    with monkeypatch.context() as patch:
        interrupt(patch, Workspace, WRITTEN, 4)
        with pytest.raises(KeyboardInterrupt):
            opened(tiny_llama, cache)
    asked: list[Any] = []
    wrote = own_text.write_sequences

    def counting(*arguments: Any) -> Any:
        asked.append(arguments[3])
        return wrote(*arguments)

    monkeypatch.setattr(own_text, "write_sequences", counting)
    found = opened(tiny_llama, cache)
    assert asked == [[6, 7], [8, 9], [10, 11]]
    assert [split.sha256 for split in found.splits] == [split.sha256 for split in whole.splits]


def test_windows_begin_with_the_bos_where_the_tokenizer_puts_one(tmp_path: Path, tiny_llama: Path) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    tokenizer = tiny_tokenizer()
    backend: Any = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save_pretrained(model)
    with_bos, without = opened(model), opened(model, bos="no")
    for split in with_bos.splits:
        assert split.prefix == (1,)
        assert split.windows[:, 0].tolist() == [1] * len(split.windows)
    # The same text: the BOS is read before the window, and not kept in it.
    assert without.splits.calibration.prefix == ()
    assert torch.equal(without.splits.calibration.windows[:, :-1], with_bos.splits.calibration.windows[:, 1:])
    assert without.own_text is not None
    assert without.own_text.begin == (1,)
    with pytest.raises(UsageError, match=r"context is 128\. Lower --seqlen by one, or keep the BOS with --bos yes"):
        opened(model, bos="no", seqlen=128)


def test_prompts_are_dealt_out_to_the_splits(tiny_llama: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    lines = [f"{letter}{letter}{letter} " * (1 + i % 2) for i, letter in enumerate("abcdefgh")]
    prompts.write_text("\n".join(lines))
    found = opened(tiny_llama, prompts=str(prompts))
    tokenizer = found.loaded.tokenizer
    begun = {split.name: {str(tokenizer.decode(row[:3].tolist())) for row in split.windows} for split in found.splits}
    assert sum(len(each) for each in begun.values()) == len(set().union(*begun.values()))
    assert all(each <= {line[:3] for line in lines} for each in begun.values())
    record = found.splits.test.record()["written"]["prompts"]
    assert (record["file"], record["number"], record["chat"]) == (str(prompts), 8, False)
    prompts.write_text("a\nb\nc\n")
    with pytest.raises(CalibrationError, match="holds 3 prompts, and each of the 4 splits needs some of its own"):
        opened(tiny_llama, prompts=str(prompts))
    prompts.write_text("a\nb\nc\n" + "d" * 16)
    with pytest.raises(CalibrationError, match=r"Prompt 4 of .* has 16 tokens, and a window has room for 15 before"):
        opened(tiny_llama, prompts=str(prompts))
    with pytest.raises(UsageError, match=r"--prompts .* is for --calibration self"):
        opened(tiny_llama, prompts=str(prompts), calibration="reference")


def test_a_run_keeps_its_text_and_is_evaluated_on_it(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    out, mixture = tmp_path / "run", f"{tiny_text}:0.5,self:0.5"
    words = "search", tiny_llama, "--calibration", mixture, *WINDOWS, *METHOD, "--out", out
    done(*words)
    kept = Run.open(out).get(OWN_TEXT, None)
    assert kept.counts == {"calibration": 4, "selection": 1, "validation": 1, "test": 1}
    splits = read(out / "manifest.json")["facts"]["splits"]
    for split in splits.values():
        assert [(part["source"], part["weight"]) for part in split["parts"]] == [(str(tiny_text), 0.5), ("self", 0.5)]
        assert split["parts"][1]["written"]["seed"] == 0
    found = read(out / "summary.json")["compressed"]
    shutil.rmtree(tmp_path / "globalopt-cache")
    again = json.loads(done("eval", out, "--json", "-q").stdout)
    assert [m["nll"] for m in again["model"]["metrics"]] == [m["nll"] for m in found]
    assert "in windows of 16 tokens" in refused(2, "eval", out, "-q", "--seqlen", "8")
    assert "kept in the run" in refused(2, "eval", tiny_llama, "-q", "--calibration", "self")
    assert "is finished" in " ".join(done(*words[:-3], "--out", out).stderr.split())


def test_a_model_that_is_read_block_by_block_cannot_write(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "load_model", lambda source, *words: load_model(source, lazily=True))
    with pytest.raises(UsageError, match=r"would be read anew for every token that it writes\. Raise --max-memory"):
        opened(tiny_llama)


def test_a_dry_run_counts_the_writing(tiny_llama: Path) -> None:
    words = "search", tiny_llama, *WINDOWS, "--dry-run", "--json", "--calibration"
    found = json.loads(done(*words, "self").stdout)
    half = json.loads(done(*words, "self:1,reference:1").stdout)
    none = json.loads(done(*words, "reference").stdout)
    assert found["seconds"]["self-text"] > 0 < half["seconds"]["self-text"]
    assert "self-text" not in none["seconds"]
    assert found["disk"]["self-text"] == 2 * half["disk"]["self-text"] == 2 * 8 * 16 * (8 + 3 * 2)


def test_python_takes_the_same(tmp_path: Path) -> None:
    small: dict[str, Any] = {**SIZES, "progress": False, "refining": RefineOptions(), "samples": 0}
    small |= {"solver": "magnitude", "allocator": "uniform", "sensitivity": "none"}
    lines = tmp_path / "prompts.txt"
    lines.write_text("a\nb\nc\nd\n")
    found = globalopt.search(
        tiny_model("llama"),
        tiny_tokenizer(),
        "self:1,reference:1",
        **small,
        prompts=lines,
        out=tmp_path / "run",
    )
    assert found.summary.splits["test"]["source"] == "self:1,reference:1"
    with pytest.raises(UsageError, match=r"--prompts .* is for --calibration self"):
        globalopt.search(tiny_model("llama"), tiny_tokenizer(), ["a cat. " * 200], **small, prompts=lines)
