"""Samples are greedy, the same every time, and left out with a reason where they cannot be had."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from globalopt.evaluation.decoding import continued
from globalopt.evaluation.samples import NEW_TOKENS, PROMPT_TOKENS, PROMPTS, write_samples
from globalopt.models.loading import load_model
from globalopt.runs.artefacts import SAMPLES
from globalopt.runs.folder import Run
from globalopt.text.splits import Split
from tests.families import COVERED, family_model
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


@pytest.mark.parametrize("kind", COVERED)
@torch.no_grad()
def test_the_cache_changes_no_token(kind: str) -> None:
    model, ids = family_model(kind).eval(), tiny_ids(2, 9)
    found = continued(model, ids, 8)
    for _ in range(8):
        ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, ids[:, 9:])


def test_with_a_cache_every_token_is_read_once_and_only_the_last_has_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read, logits = tiny_model("llama"), [], []
    forward: Any = LlamaForCausalLM.forward

    @functools.wraps(forward)
    def counting(self: LlamaForCausalLM, input_ids: Any, **rest: Any) -> Any:
        output = forward(self, input_ids=input_ids, **rest)
        read.append(input_ids.shape[1])
        logits.append(output.logits.shape[1])
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", counting)
    continued(model, tiny_ids(2, 9), 4)
    assert (read, logits) == ([9, 1, 1, 1], [1, 1, 1, 1])


def test_code_that_came_with_a_model_reads_all_tokens_again() -> None:
    class Foreign(LlamaForCausalLM):
        """Refuse a cache, as code for an older transformers may by an error of any kind."""

        def forward(self, input_ids: Any = None, **rest: Any) -> Any:
            assert not rest.get("use_cache")
            assert "past_key_values" not in rest
            return super().forward(input_ids=input_ids, **rest)

    model: Any = tiny_model("llama")
    foreign = Foreign(model.config).eval()
    foreign.load_state_dict(model.state_dict())
    assert torch.equal(continued(foreign, tiny_ids(2, 9), 4), continued(model, tiny_ids(2, 9), 4))


def test_their_number_is_chosen_and_every_model_is_told_of() -> None:
    model, told = tiny_model("llama"), []
    found = write_samples(model, model, tiny_tokenizer(), split(), 1, told.append)
    assert (len(found.samples), told) == (1, ["dense", "compressed"])


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
    assert (len(found.samples), found.prompt_tokens) == (2, 16)
    # The run is shared: a test that shortens samples (`tests/shortened.py`) may have made it.
    assert 0 < found.new_tokens <= NEW_TOKENS
    saved = load_model(run.model_folder)
    ids = saved.tokenizer(found.samples[0].prompt, return_tensors="pt").input_ids
    expected = continued(saved.model, ids, found.new_tokens)[0].tolist()
    assert found.samples[0].compressed == saved.tokenizer.decode(expected)
