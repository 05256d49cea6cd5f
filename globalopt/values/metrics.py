"""Hold how well a model predicts a text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metrics:
    """Hold the perplexity and the KL divergence of one model on one set of windows.

    Args:
        split: which split the windows are ("validation", "test").
        perplexity: `exp(nll)`.
        nll: mean negative log likelihood in nats over the predicted tokens (`seqlen - 1` per window).
        nll_stderr: its standard error over windows.
        kl: mean KL(dense || this model) in nats per predicted position, or None for the dense model itself.
        kl_stderr: its standard error over windows, or None.
        windows, seqlen, tokens: number of windows, their length, and the number of predicted tokens.
        text_sha256: hash of the windows' token ids.
        dtype: the floating-point type that the model computed in.

    >>> import math
    >>> metrics = Metrics("test", math.exp(3.0), 3.0, 0.01, None, None, 64, 512, 64 * 511, "9f2c", "float32")
    >>> f"perplexity {metrics.perplexity:.2f} on {metrics.tokens} tokens"
    'perplexity 20.09 on 32704 tokens'
    """

    split: str
    perplexity: float
    nll: float
    nll_stderr: float
    kl: float | None
    kl_stderr: float | None
    windows: int
    seqlen: int
    tokens: int
    text_sha256: str
    dtype: str


@dataclass(frozen=True)
class WindowLosses:
    """Hold the losses of every window of a split, in the order of the windows; `Metrics` has their means.

    Args:
        split: which split the windows are.
        text_sha256: hash of the windows' token ids.
        nll, dense_nll: mean negative log likelihood of the compressed and of the dense model, nats per token.
        kl: mean KL(dense || compressed) in nats per predicted position.

    >>> losses = WindowLosses("test", "9f2c", nll=(3.2, 2.9), dense_nll=(3.1, 2.9), kl=(0.08, 0.02))
    >>> [round(nll - dense, 2) for nll, dense in zip(losses.nll, losses.dense_nll)]
    [0.1, 0.0]
    """

    split: str
    text_sha256: str
    nll: tuple[float, ...]
    dense_nll: tuple[float, ...]
    kl: tuple[float, ...]
