"""Generate text with the dense and the compressed model, side by side, to show what a loss in nats means."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from globalopt.evaluation.decoding import continued
from globalopt.models.context_length import context_length
from globalopt.models.streaming import lazy_blocks
from globalopt.text.windows import Split
from globalopt.values.samples import Sample, Samples

PROMPTS = 3
PROMPT_TOKENS = 32
NEW_TOKENS = 48


def write_samples(
    dense: PreTrainedModel,
    compressed: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    count: int = PROMPTS,
    advance: Callable[[str], None] = lambda detail: None,
) -> Samples:
    """Continue the beginnings of the first windows of a split with both models, by greedy decoding.

    Nothing is drawn at random, so that the same models write the same text. A model with few positions gets shorter
    prompts. A lazily loaded model would read all of its blocks for every token: no text is generated then, and the
    reason is in `skipped`.

    Args:
        dense, compressed: in evaluation mode.
        count: number of prompts, at least 1; fewer where the split has fewer windows.
        advance: called once per model, with its name.

    >>> import torch
    >>> from transformers import AutoTokenizer
    >>> from globalopt.reference import reference_folder
    >>> from globalopt.reference.tiny import tiny_llama
    >>> split = Split("validation", torch.arange(48).reshape(2, 24), (0, 24), (0, 48), "made up", "0" * 64, 0)
    >>> tokenizer = AutoTokenizer.from_pretrained(reference_folder())
    >>> written = write_samples(tiny_llama(), tiny_llama(), tokenizer, split)
    >>> written.prompt_tokens, [sample.agreed for sample in written.samples]
    (24, [40, 40])
    """
    if any(lazy_blocks(model) is not None for model in (dense, compressed)):
        return _none(split, "the model does not fit in memory, and would be read anew for every token")
    positions = context_length(dense.config)
    prompt = min(PROMPT_TOKENS, split.seqlen, PROMPT_TOKENS if positions is None else positions // 2)
    new = NEW_TOKENS if positions is None else min(NEW_TOKENS, positions - prompt)
    if min(prompt, new) < 1:
        return _none(split, f"the model has {positions} positions, too few to go on with a prompt")
    prompts = split.windows[:count, :prompt]
    written = []
    for name, model in (("dense", dense), ("compressed", compressed)):
        written.append(continued(model, prompts, new))
        advance(name)
    samples = []
    try:
        for start, one, other in zip(prompts, *written, strict=True):
            differ = (one != other).nonzero()
            agreed = int(differ[0]) if len(differ) else new
            samples.append(
                Sample(
                    _text(tokenizer, start[len(split.prefix) :]), _text(tokenizer, one), _text(tokenizer, other), agreed
                )
            )
    # Tokenizers differ in what they raise for ids that they do not know.
    except (IndexError, KeyError, OverflowError, TypeError, ValueError) as cause:
        return _none(split, f"the tokenizer cannot turn tokens into text ({cause!r})")
    return Samples(split.name, prompt, new, tuple(samples))


def _none(split: Split, why: str) -> Samples:
    """Return no samples, with the reason."""
    return Samples(split.name, 0, 0, (), why)


def _text(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> str:
    """Decode tokens; `TypeError` where a tokenizer returns something other than text."""
    text = tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)
    if not isinstance(text, str):
        raise TypeError(f"decode gave {type(text).__name__}")
    return text
