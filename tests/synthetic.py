"""Layers made from a seed: correlated inputs with outliers, heavy-tailed weights over a low-rank part."""

from __future__ import annotations

import torch
from torch import Tensor

from globalopt.values.metric import Gram, Metric


def layer(d_out: int, d_in: int, tokens: int, seed: int = 0) -> tuple[Tensor, Gram]:
    """A weight (d_out, d_in) and the Gram of `tokens` inputs: mixed latent factors, every 16th input 8 times larger."""
    generator = torch.Generator().manual_seed(seed)
    factors = max(1, d_in // 4)
    mixing = torch.randn(factors, d_in, generator=generator)
    X = torch.randn(tokens, factors, generator=generator) @ mixing / factors**0.5
    X += 0.5 * torch.randn(tokens, d_in, generator=generator)
    X[:, ::16] *= 8
    heavy = torch.randn(d_out, d_in, generator=generator)
    # One draw in 2^24 is exactly 0, and its negative power infinite.
    heavy *= torch.rand(d_out, d_in, generator=generator).clamp_min(2**-24).pow(-0.4)
    k = max(1, min(d_out, d_in) // 12)
    W = heavy + 2 * torch.randn(d_out, k, generator=generator) @ torch.randn(k, d_in, generator=generator) / k**0.5
    W /= d_in**0.5
    G = (X.double().mT @ X.double() / tokens).float()
    return W, Gram((G + G.mT) / 2, tokens)


def metric(d_out: int, d_in: int, tokens: int, seed: int = 0) -> tuple[Tensor, Metric]:
    """`layer` with its Gram as an input metric."""
    W, gram = layer(d_out, d_in, tokens, seed)
    return W, Metric(gram)
