"""Evaluate models on held-out windows: perplexity, and KL divergence from the dense model in nats per token."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from globalopt.errors import NumericalError, UsageError
from globalopt.evaluation.logits import in_parts, logits_at
from globalopt.machine import ranks
from globalopt.models.batch import Batch
from globalopt.models.block_runner import BlockRunner
from globalopt.models.finding import find_blocks
from globalopt.models.streaming import dtype_of, lazy_blocks
from globalopt.models.walk import walk_blocks
from globalopt.text.windows import Split
from globalopt.values.metrics import Metrics, WindowLosses

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSION = 1
"""Raised whenever the figures of a model change."""

LOGITS_AT_ONCE = 2**25
"""Most logits held of a model that returns those of all positions; batches are smaller than requested then."""

LAZY_LOGITS_AT_ONCE = 2**24
"""The same for lazily loaded models, which are those that do not fit in memory."""

SOFTMAX_AT_ONCE = 2**22
"""Logits turned into float32 log probabilities at once, and computed at once where a model gives them in parts."""


LogitsAt = Callable[[slice], Tensor]
"""A function from positions of a batch of windows to their logits (b, positions, vocabulary)."""


def evaluate(
    model: PreTrainedModel,
    split: Split,
    dense: PreTrainedModel | None = None,
    batch_size: int = 8,
    advance: Callable[[str], None] | None = None,
    scratch: Path | None = None,
) -> Metrics:
    """Compute the perplexity of a model on the windows of a split, and its KL divergence from the dense model.

    With windows `x` of T tokens, the first g of them given (one, or what the tokenizer begins a text with), and
    `p(. | x_<t)` the model, `q` the dense one:

        nll = mean over windows and g <= t < T of -log p(x_t | x_<t),   perplexity = exp(nll)
        kl  = mean over the same positions of sum_v q(v) (log q(v) - log p(v))

    Log probabilities are float32, sums float64. Standard errors are those of the mean over windows. Both models are put
    into evaluation mode; they may be on different devices. Logits of both are computed for a few positions of a batch
    at a time, where the models allow it (`logits_at`). A lazily loaded model is run block by block, all windows through
    one block before the next. Several processes share the windows, and all get the figures of all windows.

    Args:
        split: at least 2 windows.
        dense: the model before compression, with the same vocabulary; without it there is no KL.
        batch_size: most windows at once; fewer where all logits of a batch are held (`LOGITS_AT_ONCE`).
        advance: called once per window with the perplexity so far, as text.
        scratch: folder of files for the hidden states of lazily loaded models; None: they are held in memory.
    Raises:
        NumericalError: a logit is not finite, or the perplexity is too large for a float.
        UsageError: fewer than 2 windows, `batch_size` below 1, or different vocabularies.
    Source:
        the perplexity protocol of Frantar and Alistarh 2023 (SparseGPT), section 4.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> windows = torch.arange(48).reshape(4, 12)
    >>> split = Split("test", windows, (0, 12, 24, 36), (0, 48), "made up", "0" * 64, special_tokens=0)
    >>> metrics = evaluate(tiny_llama(), split, dense=tiny_llama())
    >>> round(metrics.perplexity, 1), metrics.kl
    (62.7, 0.0)
    """
    return _measure(model, dense, split, batch_size, advance, scratch)[0]


def evaluate_both(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    split: Split,
    batch_size: int = 8,
    advance: Callable[[str], None] | None = None,
    scratch: Path | None = None,
    keep: Callable[[WindowLosses], None] | None = None,
) -> tuple[Metrics, Metrics]:
    """Compute the metrics of the dense model and of `model` in one pass; arguments and errors as for `evaluate`.

    Args:
        keep: called with the losses of every window, which paired comparisons of runs need.
    Returns:
        The metrics of `dense`, then those of `model`.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> windows = torch.arange(48).reshape(4, 12)
    >>> split = Split("test", windows, (0, 12, 24, 36), (0, 48), "made up", "0" * 64, special_tokens=0)
    >>> dense, other = evaluate_both(tiny_llama(seed=1), tiny_llama(), split)
    >>> dense.kl, round(other.kl, 4)
    (None, 0.0068)
    """
    measured, reference, losses = _measure(model, dense, split, batch_size, advance, scratch)
    assert reference is not None
    if keep is not None:
        keep(losses)
    return reference, measured


@torch.no_grad()
def _measure(
    model: PreTrainedModel,
    dense: PreTrainedModel | None,
    split: Split,
    batch_size: int,
    advance: Callable[[str], None] | None,
    scratch: Path | None,
) -> tuple[Metrics, Metrics | None, WindowLosses]:
    """Evaluate both models in one pass: metrics of `model`, of `dense`, and the losses of the windows."""
    count, seqlen = split.windows.shape
    if count < 2:
        raise UsageError(
            f"Evaluation needs at least 2 windows, or there is no standard error; {split.name} has {count}."
        )
    if batch_size < 1:
        raise UsageError(f"The evaluation batch must be at least 1 window; got {batch_size}.")
    vocabulary = _vocabulary(model)
    if dense is not None and _vocabulary(dense) != vocabulary:
        raise UsageError(
            f"The model has {vocabulary} logits and the dense model {_vocabulary(dense)}; KL needs the same."
        )
    model.eval()
    if dense is not None:
        dense.eval()

    nll, dense_nll, kl = (torch.zeros(count, dtype=torch.float64) for _ in range(3))
    rows = min(batch_size, *(_rows(one, seqlen) for one in (model, dense) if one is not None))
    own = ranks.span(count)
    batches = split.windows[own.start : own.stop].split(rows) if own else ()
    logits_of = _logits_of(model, batches, scratch)
    dense_logits_of = None if dense is None else _logits_of(dense, batches, scratch)
    for number, windows in enumerate(batches):
        first = own.start + number * rows
        batch = slice(first, first + len(windows))
        dense_logits = None if dense_logits_of is None else dense_logits_of(number)
        nll[batch], dense_nll[batch], kl[batch] = _window_means(
            logits_of(number), dense_logits, windows, split.given, vocabulary, f"{split.name} window", batch.start
        )
        if advance is not None:
            for i in range(batch.start, batch.stop):
                advance(f"perplexity {_perplexity(nll[own.start : i + 1]):.2f}")
    # The others have zeros where a process has its own.
    ranks.total_of_all([nll, dense_nll, kl])
    measured = _metrics(model, split, nll, None if dense is None else kl)
    losses = WindowLosses(split.name, split.sha256, *(tuple(means.tolist()) for means in (nll, dense_nll, kl)))
    return measured, None if dense is None else _metrics(dense, split, dense_nll, None), losses


def _metrics(model: PreTrainedModel, split: Split, nll: Tensor, kl: Tensor | None) -> Metrics:
    """Summarise the losses of the windows of a model."""
    count, seqlen = split.windows.shape
    return Metrics(
        split=split.name,
        perplexity=_perplexity(nll),
        nll=nll.mean().item(),
        nll_stderr=_standard_error(nll),
        kl=None if kl is None else kl.mean().item(),
        kl_stderr=None if kl is None else _standard_error(kl),
        windows=count,
        seqlen=seqlen,
        tokens=count * (seqlen - split.given),
        text_sha256=split.sha256,
        dtype=str(dtype_of(model)).removeprefix("torch."),
    )


def _vocabulary(model: PreTrainedModel) -> int:
    """Return the size of a model's vocabulary."""
    return model.config.get_text_config().vocab_size


def _rows(model: PreTrainedModel, seqlen: int) -> int:
    """Return the most windows of a batch of which the logits that are held at once have room."""
    lazy = lazy_blocks(model) is not None
    if not lazy and in_parts(model):
        return sys.maxsize
    at_once = LAZY_LOGITS_AT_ONCE if lazy else LOGITS_AT_ONCE
    return max(1, at_once // (seqlen * _vocabulary(model)))


def _logits_of(model: PreTrainedModel, batches: Sequence[Tensor], scratch: Path | None) -> Callable[[int], LogitsAt]:
    """Return a function from the number of a batch to its logits."""
    if lazy_blocks(model) is None or not batches:
        return lambda number: logits_at(model, batches[number])
    runner = BlockRunner(find_blocks(model), [Batch(windows) for windows in batches], scratch)
    hidden: list[Tensor] = []
    for visit in walk_blocks(runner):
        hidden = visit.outputs()

    def whole(number: int) -> LogitsAt:
        logits = runner.logits(number, hidden[number])
        return lambda positions: logits[:, positions]

    return whole


def _window_means(
    logits: LogitsAt,
    dense: LogitsAt | None,
    windows: Tensor,
    given: int,
    vocabulary: int,
    where: str,
    first: int,
) -> Tensor:
    """Average over the positions of every window: the losses of model and dense model, and KL(dense || model).

    Args:
        logits, dense: of a batch of windows, on any device; without `dense` the last two means are 0.
        windows: (b, T) token ids.
        given: how many tokens at the beginning of a window are not predicted.
        where: what a window is, for messages. first: the number of the first one.
    Returns:
        (3, b) float64.
    """
    count, seqlen = windows.shape
    sums = torch.zeros(3, count, dtype=torch.float64)
    step = max(1, SOFTMAX_AT_ONCE // (count * vocabulary))
    for start in range(given - 1, seqlen - 1, step):
        positions = slice(start, min(start + step, seqlen - 1))
        log_p = _log_softmax(logits(positions), where, first, "")
        at = windows[:, positions.start + 1 : positions.stop + 1, None].to(log_p.device)
        # Summed on the CPU: not every accelerator has float64.
        sums[0] -= log_p.gather(2, at).cpu().double().sum((1, 2))
        if dense is not None:
            log_q = _log_softmax(dense(positions), where, first, " of the dense model").to(log_p.device)
            sums[1] -= log_q.gather(2, at).cpu().double().sum((1, 2))
            sums[2] += (log_q.exp() * log_q.sub_(log_p)).sum(2).cpu().double().sum(1)
    return sums / (seqlen - given)


def _log_softmax(logits: Tensor, where: str, first: int, whose: str) -> Tensor:
    """Compute log probabilities in float32; `NumericalError` naming the window of which a logit is not finite."""
    # An extremum of finite numbers is finite, and takes no memory for a mask.
    if not torch.isfinite(torch.stack(logits.aminmax())).all():
        window = first + int((~torch.isfinite(logits)).flatten(1).any(1).nonzero()[0])
        raise NumericalError(
            f"The logits of {where} {window}{whose} are not finite; a weight is broken, or --dtype is too narrow."
        )
    return logits.float().log_softmax(2)


def _perplexity(nll: Tensor) -> float:
    """Compute `exp` of the mean loss; `NumericalError` where it overflows."""
    mean = nll.mean().item()
    try:
        return math.exp(mean)
    except OverflowError as error:
        raise NumericalError(
            f"A mean loss of {mean:.4g} nats per token has no perplexity; the model is broken."
        ) from error


def _standard_error(means: Tensor) -> float:
    """Compute the standard error of the mean over windows."""
    return means.std().item() / math.sqrt(len(means))
