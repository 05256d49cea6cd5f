"""Hold what the dense and the compressed model write after the same prompts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """Compare how two models continue one prompt by greedy decoding.

    Args:
        prompt: the text both start from.
        dense, compressed: the continuations of the two models.
        agreed: number of new tokens before the first that differs.

    >>> sample = Sample("The capital of France is", dense=" Paris. It", compressed=" Paris, which", agreed=1)
    >>> sample.dense == sample.compressed
    False
    """

    prompt: str
    dense: str
    compressed: str
    agreed: int


@dataclass(frozen=True)
class Samples:
    """Collect continuations by the dense and by the compressed model.

    Args:
        split: the split whose first windows start with the prompts.
        prompt_tokens, new_tokens: tokens of every prompt and of every continuation.
        samples: one per prompt.
        skipped: the reason why there are no samples, or None.

    >>> one = Sample("The capital of France is", dense=" Paris. It", compressed=" Paris, which", agreed=1)
    >>> found = Samples("test", prompt_tokens=5, new_tokens=3, samples=(one,))
    >>> sum(sample.agreed for sample in found.samples) / (len(found.samples) * found.new_tokens)
    0.3333333333333333
    """

    split: str
    prompt_tokens: int
    new_tokens: int
    samples: tuple[Sample, ...]
    skipped: str | None = None
