"""A session has windows that its model can read, and computes without denormal numbers, in which a CPU is slow."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing

from globalopt.errors import CalibrationError, UsageError
from globalopt.machine import ranks
from globalopt.pipeline import session
from globalopt.pipeline.example import example_session
from globalopt.pipeline.options import ModelOptions, TextOptions
from globalopt.pipeline.reporter import Reporter
from globalopt.pipeline.score import ScoreOptions, score
from globalopt.text.windows import Split
from reports import QuietProgress
from tests.command import WINDOWS, done, read, refused
from tests.tiny_models import VOCAB, save_tiny, tiny_tokenizer


def test_numbers_too_small_for_a_normal_float_are_zero(tiny_llama, tiny_text):
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor has no such mode")
    assert (torch.full((64,), 1e-30) * 1e-10).any()
    try:
        texts = TextOptions(str(tiny_text), nsamples=2, seqlen=16, eval_windows=2)
        session.set_up(ModelOptions(str(tiny_llama)), texts, 0, Reporter(QuietProgress()))
        assert not (torch.full((64,), 1e-30) * 1e-10).any()
    finally:
        torch.set_flush_denormal(False)


def test_a_token_without_an_embedding_is_refused_before_anything_is_computed(tmp_path):
    folder = tmp_path / "model"
    save_tiny(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(VOCAB)], special_tokens=True)
    tokenizer.save_pretrained(folder)
    (tmp_path / "late.txt").write_text("a cat sat on a mat. " * 200 + f"<{VOCAB - 1}>" + "a cat. " * 20)
    late = str(tmp_path / "late.txt")
    models = ModelOptions(str(folder))
    reporter = Reporter(QuietProgress())
    with pytest.raises(CalibrationError, match=f"late.txt has id .*, and the model knows {VOCAB} tokens"):
        session.set_up(models, TextOptions(late, nsamples=2, seqlen=16, eval_windows=2), 0, reporter)
    with pytest.raises(CalibrationError, match=f"the model knows {VOCAB} tokens"):
        score(models, TextOptions(seqlen=16), ScoreOptions(None, False, {"late": late}), reporter, "globalopt eval")


def test_windows_begin_as_the_tokenizer_begins_a_text(tmp_path, tiny_llama, tiny_text):
    """A run records it, and is evaluated so again; a run of before the option had no such windows."""
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    tokenizer = tiny_tokenizer()
    backend: Any = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save_pretrained(model)
    words = "search", model, "--calibration", tiny_text, *WINDOWS, "--solver", "magnitude", "--sensitivity", "none"
    words += "--allocator", "uniform", "--match", "none", "-q"
    found = {}
    for bos in ("auto", "no"):
        out = tmp_path / bos
        done(*words, "--out", out, "--bos", bos)
        found[bos] = read(out / "summary.json")
        assert read(out / "manifest.json")["facts"]["text_options"]["bos"] == bos
        expected = [1] if bos == "auto" else []
        assert {tuple(split["prefix"]) for split in found[bos]["splits"].values()} == {tuple(expected)}
        again = json.loads(done("eval", out, "--json", "-q").stdout)
        assert [m["nll"] for m in again["model"]["metrics"]] == [m["nll"] for m in found[bos]["compressed"]]
        assert {tuple(text["prefix"]) for text in again["texts"].values()} == {tuple(expected)}
    shas = [found[bos]["splits"]["calibration"]["sha256"] for bos in found]
    assert shas[0] != shas[1]
    assert found["auto"]["dense"][0]["tokens"] == found["no"]["dense"][0]["tokens"] == 2 * 15
    assert "different calibration" in refused(1, *words, "--out", tmp_path / "auto", "--bos", "no")

    manifest = tmp_path / "no" / "manifest.json"
    old = read(manifest)
    del old["facts"]["text_options"]["bos"]
    manifest.write_text(json.dumps(old))
    again = json.loads(done("eval", tmp_path / "no", "--json", "-q").stdout)
    assert [m["nll"] for m in again["model"]["metrics"]] == [m["nll"] for m in found["no"]["compressed"]]


def test_windows_longer_than_the_context_are_refused_under_any_name_of_it(tmp_path, tiny_text):
    config = transformers.MptConfig(
        d_model=32, n_heads=4, n_layers=2, vocab_size=VOCAB, max_seq_len=64, expansion_ratio=2
    )
    transformers.MptForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    models, texts = ModelOptions(str(tmp_path)), TextOptions(str(tiny_text), nsamples=2, seqlen=65, eval_windows=2)
    reporter = Reporter(QuietProgress())
    with pytest.raises(UsageError, match="context of 64"):
        session.set_up(models, texts, 0, reporter)
    with pytest.raises(UsageError, match="context of 64"):
        score(models, texts, ScoreOptions(None, False, {"mine": str(tiny_text)}), reporter, "globalopt eval")


@pytest.mark.parametrize(("processes", "sizes"), [(1, [8, 8, 8]), (2, [6, 6, 6, 6]), (5, [5, 5, 5, 5, 4])])
def test_some_windows_are_as_many_batches_for_every_process(monkeypatch, processes: int, sizes: list[int]) -> None:
    windows, starts = torch.zeros(30, 4, dtype=torch.int64), tuple(range(0, 120, 4))
    split = Split("selection", windows, starts, (0, 120), "a.txt", "9f2c", special_tokens=0)
    opened = example_session()
    opened = replace(opened, text_options=replace(opened.text_options, batch_size=8))
    monkeypatch.setattr(ranks, "_world", ranks.World(0, processes, processes, None))
    assert [len(batch.input_ids) for batch in opened.batches(split, windows=24)] == sizes
