"""Perplexity and KL agree with a loop over single positions in float64."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from globalopt.errors import NumericalError, UsageError
from globalopt.evaluation import perplexity
from globalopt.evaluation.perplexity import evaluate, evaluate_both
from globalopt.models.loading import load_model
from globalopt.reference import reference_folder
from globalopt.text.splits import Split, reference_splits

VOCABULARY = 50


def tiny_llama(seed: int, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        attention_dropout=0.5,
    )
    return LlamaForCausalLM(config)


def on(device: torch.device, model: LlamaForCausalLM) -> LlamaForCausalLM:
    moved = copy.deepcopy(model)
    torch.nn.Module.to(moved, device)
    return moved


def random_windows(count: int = 7, seqlen: int = 9) -> Split:
    windows = torch.randint(VOCABULARY, (count, seqlen), generator=torch.Generator().manual_seed(0))
    starts = tuple(range(0, count * seqlen, seqlen))
    return Split("validation", windows, starts, (0, count * seqlen), "random", "no text", 0)


@torch.no_grad()
def by_definition(model: LlamaForCausalLM, dense: LlamaForCausalLM, split: Split) -> dict[str, float]:
    """The four figures, one position at a time."""
    model.eval()
    dense.eval()
    nll, kl = [], []
    for window in split.windows:
        window_nll, window_kl = [], []
        for t in range(split.given, split.seqlen):
            p = torch.softmax(model(input_ids=window[None, :t]).logits[0, -1].double(), 0)
            q = torch.softmax(dense(input_ids=window[None, :t]).logits[0, -1].double(), 0)
            window_nll.append(-math.log(p[window[t]]))
            window_kl.append(sum(float(a * (a / b).log()) for a, b in zip(q, p, strict=True)))
        nll.append(sum(window_nll) / len(window_nll))
        kl.append(sum(window_kl) / len(window_kl))

    def mean_and_error(values: list[float]) -> tuple[float, float]:
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
        return mean, math.sqrt(variance / len(values))

    return dict(zip(("nll", "nll_stderr", "kl", "kl_stderr"), mean_and_error(nll) + mean_and_error(kl), strict=True))


@pytest.mark.parametrize("given", [1, 2, 3])
def test_what_every_window_begins_with_is_given_and_not_predicted(given):
    model, dense, split = tiny_llama(0), tiny_llama(1), random_windows()
    windows = split.windows.clone()
    windows[:, :given] = windows[0, :given]
    begun = dataclasses.replace(split, windows=windows, prefix=tuple(windows[0, :given].tolist()))
    metrics = evaluate(model, begun, dense)
    expected = by_definition(model, dense, begun)
    assert metrics.nll == pytest.approx(expected["nll"], rel=1e-5)
    assert metrics.kl == pytest.approx(expected["kl"], rel=1e-5)
    assert metrics.tokens == len(windows) * (split.seqlen - given)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_figures_are_those_of_the_definition(batch_size):
    model, dense, split = tiny_llama(0), tiny_llama(1), random_windows()
    metrics = evaluate(model, split, dense, batch_size)
    for name, value in by_definition(model, dense, split).items():
        assert getattr(metrics, name) == pytest.approx(value, rel=1e-5), name
    assert metrics.kl is not None
    assert metrics.kl > 0.1
    assert metrics.perplexity == pytest.approx(math.exp(metrics.nll), rel=1e-12)
    assert (metrics.split, metrics.windows, metrics.seqlen, metrics.tokens) == ("validation", 7, 9, 7 * 8)
    assert metrics.text_sha256 == split.sha256
    assert metrics.dtype == "float32"


def test_small_memory_limits_change_nothing_but_the_batches(monkeypatch):
    model, dense, split = tiny_llama(0), tiny_llama(1), random_windows()
    expected = evaluate(model, split, dense, batch_size=4)
    rows: list[int] = []
    forward = model.forward

    def counting(input_ids: Any, **rest: Any) -> Any:
        rows.append(len(input_ids))
        return forward(input_ids=input_ids, **rest)

    monkeypatch.setattr(model, "forward", counting)
    monkeypatch.setattr(perplexity, "LOGITS_AT_ONCE", 2 * 9 * VOCABULARY)
    monkeypatch.setattr(perplexity, "SOFTMAX_AT_ONCE", 3 * VOCABULARY)
    limited = evaluate(model, split, dense, batch_size=4)
    assert rows == [2, 2, 2, 1]
    for name, value in dataclasses.asdict(expected).items():
        assert getattr(limited, name) == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), name


def test_a_model_has_no_distance_from_itself_and_no_kl_without_a_dense_model():
    model, split = tiny_llama(0), random_windows()
    itself = evaluate(model, split, copy.deepcopy(model))
    assert itself.kl == 0
    assert itself.kl_stderr == 0
    alone = evaluate(model, split)
    assert (alone.kl, alone.kl_stderr) == (None, None)
    assert alone.nll == itself.nll


def test_kl_is_of_the_dense_model_against_the_compressed_one():
    one, other, split = tiny_llama(0), tiny_llama(1), random_windows()
    assert evaluate_both(one, other, split) == (evaluate(other, split), evaluate(one, split, other))
    assert evaluate(one, split, other).kl != pytest.approx(evaluate(other, split, one).kl, rel=1e-3)


def test_progress_is_told_once_per_window_and_dropout_is_off():
    model, split = tiny_llama(0).train(), random_windows()
    details: list[str] = []
    metrics = evaluate(model, split, batch_size=3, advance=details.append)
    assert len(details) == 7
    assert details[-1] == f"perplexity {metrics.perplexity:.2f}"
    assert metrics == evaluate(model, split, batch_size=3)


def test_the_dtype_is_the_models():
    model = tiny_llama(0).bfloat16()
    assert evaluate(model, random_windows()).dtype == "bfloat16"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error_that_names_the_window(value):
    model, split = tiny_llama(0), random_windows()
    broken = tiny_llama(0)
    with torch.no_grad():
        broken.lm_head.weight[3, 0] = value
    with pytest.raises(NumericalError, match="logits of validation window 0 are not finite"):
        evaluate(broken, split)
    with pytest.raises(NumericalError, match="window 0 of the dense model are not finite"):
        evaluate(model, split, broken)


def test_a_loss_without_a_perplexity_is_an_error():
    model = tiny_llama(0)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    with pytest.raises(NumericalError, match="has no perplexity"):
        evaluate(model, random_windows())


def test_arguments_out_of_range_are_usage_errors():
    model, split = tiny_llama(0), random_windows()
    with pytest.raises(UsageError, match="at least 2 windows"):
        evaluate(model, random_windows(count=1))
    with pytest.raises(UsageError, match="at least 1 window; got 0"):
        evaluate(model, split, batch_size=0)
    with pytest.raises(UsageError, match="50 logits and the dense model 60"):
        evaluate(model, split, tiny_llama(0, vocabulary=60))


def test_the_reference_model_knows_its_text(reference_tokenizer):
    model = load_model(str(reference_folder()), "float32", "cpu").model
    splits = reference_splits(reference_tokenizer, nsamples=1, seqlen=256, seed=0, eval_windows=8)
    metrics = evaluate(model, splits.validation)
    # The model card says 61.7 on the whole validation set; text in another format is far off (raw tokens: above 300).
    assert abs(metrics.nll - math.log(61.7)) < 4 * metrics.nll_stderr
    assert metrics.nll_stderr < 0.1


@pytest.mark.gpu
def test_models_on_an_accelerator_give_the_same_figures():
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None, "-m gpu needs an accelerator"
    model, dense, split = tiny_llama(0), tiny_llama(1), random_windows()
    expected = evaluate(model, split, dense)
    both = evaluate(on(accelerator, model), split, on(accelerator, dense))
    mixed = evaluate(on(accelerator, model), split, dense)
    for metrics in (both, mixed):
        assert metrics.nll == pytest.approx(expected.nll, rel=1e-3)
        assert metrics.kl == pytest.approx(expected.kl, rel=1e-2)
