"""SparseGPT with the inverse of what is left formed anew at every column, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from globalopt.types import NM


def prune(
    W: Tensor, G: Tensor, nnz: int, pattern: NM | None = None, column_block: int = 128, layer_wide: bool = False
) -> Tensor:
    """(d_out, d_in) float64: the sweep over a positive definite `G` (d_in, d_in), equal shares per column block."""
    W, G = W.double().clone(), G.double()
    d_out, d_in = W.shape
    remaining = [torch.linalg.inv(G[j:, j:]) for j in range(d_in)]
    prices = torch.stack([inverse[0, 0] for inverse in remaining])
    keep = torch.zeros_like(W, dtype=torch.bool)
    used = 0
    for j in range(d_in):
        if pattern is not None and j % pattern.of == 0:
            for row in range(d_out):
                score = W[row, j : j + pattern.of] ** 2 / prices[j : j + pattern.of]
                keep[row, j + score.argsort(descending=True)[: pattern.keep]] = True
        elif pattern is None and j % column_block == 0:
            end = min(j + column_block, d_in)
            last = d_in if layer_wide else end
            count = nnz - used if layer_wide else nnz * end // d_in - used
            score = (W[:, j:last] ** 2 / prices[j:last]).flatten()
            chosen = torch.zeros_like(score, dtype=torch.bool)
            chosen[score.argsort(descending=True)[:count]] = True
            keep[:, j:end] = chosen.view(d_out, -1)[:, : end - j]
            used += int(keep[:, j:end].sum())
        pruned = torch.where(keep[:, j], 0.0, W[:, j])
        W[:, j:] -= torch.outer(pruned / remaining[j][0, 0], remaining[j][0])
    return W * keep
