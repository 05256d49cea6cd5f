"""Samples are greedy, the same every time, and left out with a reason where they cannot be had."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from globalopt.evaluation.samples import NEW_TOKENS, PROMPT_TOKENS, PROMPTS, continued, write_samples
from globalopt.models.loading import load_model
from globalopt.runs.artefacts import SAMPLES
from globalopt.runs.folder import Run
from globalopt.text.splits import Split
from tests.tiny_models import COVERED_KINDS, save_tiny, tiny_ids, tiny_model, tiny_tokenizer


def split(windows: int = 4, seqlen: int = 40) -> Split:
    starts = tuple(seqlen * i for i in range(windows))
    return Split("validation", tiny_ids(windows, seqlen), starts, (0, seqlen * windows), "made up", "0" * 64, 0)


@pytest.mark.parametrize("kind", COVERED_KINDS)
def test_models_go_on_as_transformers_lets_them(kind):
    model, prompts = tiny_model(kind), tiny_ids(2, 9)
    greedy = GenerationConfig(do_sample=False, max_new_tokens=6, eos_token_id=None, pad_token_id=0)
    model.generation_config = greedy
    with torch.no_grad():
        expected = model.generate(prompts, attention_mask=torch.ones_like(prompts))  # pyright: ignore[reportCallIssue]
    assert torch.equal(continued(model, prompts, 6), expected[:, 9:])


def test_samples_are_prompts_and_what_both_models_make_of_them():
    dense, other, tokenizer = tiny_model("llama"), tiny_model("llama", seed=1), tiny_tokenizer()
    found = write_samples(dense, other, tokenizer, split())
    assert (found.prompt_tokens, found.new_tokens, found.skipped) == (PROMPT_TOKENS, NEW_TOKENS, None)
    assert len(found.samples) == PROMPTS
    ids = split().windows[:PROMPTS, :PROMPT_TOKENS]
    written = [continued(model, ids, NEW_TOKENS) for model in (dense, other)]
    for i, sample in enumerate(found.samples):
        assert sample.prompt == tokenizer.decode(ids[i].tolist())
        assert sample.dense == tokenizer.decode(written[0][i].tolist())
        assert sample.compressed == tokenizer.decode(written[1][i].tolist())
        assert torch.equal(written[0][i, : sample.agreed], written[1][i, : sample.agreed])
        assert written[0][i, sample.agreed] != written[1][i, sample.agreed]
    assert write_samples(dense, other, tokenizer, split()) == found
    assert {sample.agreed for sample in write_samples(dense, dense, tokenizer, split()).samples} == {NEW_TOKENS}


def test_few_windows_short_ones_and_few_positions_give_shorter_samples():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    found = write_samples(model, model, tokenizer, split(2, 5))
    assert (len(found.samples), found.prompt_tokens, found.new_tokens) == (2, 5, NEW_TOKENS)
    model.config.max_position_embeddings = 13
    found = write_samples(model, model, tokenizer, split())
    assert (found.prompt_tokens, found.new_tokens) == (6, 7)
    model.config.max_position_embeddings = 1
    assert "1 positions, too few" in str(write_samples(model, model, tokenizer, split()).skipped)


def test_a_tokenizer_that_cannot_decode_leaves_them_out_and_says_so():
    model = tiny_model("llama")
    broken = SimpleNamespace(decode=lambda ids, **options: None)
    found = write_samples(model, model, broken, split())  # pyright: ignore[reportArgumentType]
    assert found.samples == ()
    assert "the tokenizer cannot turn tokens into text" in str(found.skipped)


def test_a_lazy_model_is_not_asked(tmp_path):
    folder = save_tiny(tmp_path / "model")
    lazy = load_model(folder, lazily=True)
    found = write_samples(lazy.model, lazy.model, lazy.tokenizer, split())
    assert "does not fit in memory" in str(found.skipped)


def test_a_run_keeps_samples_of_its_own_models(tiny_run):
    run = Run.open(tiny_run)
    found = run.find(SAMPLES, None)
    assert found is not None
    assert found.split == "validation"
    # Windows of 16 tokens, of which there are 2.
    assert (len(found.samples), found.prompt_tokens, found.new_tokens) == (2, 16, NEW_TOKENS)
    saved = load_model(run.model_folder)
    ids = saved.tokenizer(found.samples[0].prompt, return_tensors="pt").input_ids
    assert found.samples[0].compressed == saved.tokenizer.decode(continued(saved.model, ids, NEW_TOKENS)[0].tolist())
