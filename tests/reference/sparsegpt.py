"""SparseGPT twice: the inverse of what is left formed anew at every column, in float64; and the published sweep."""

from __future__ import annotations

import torch
from torch import Tensor

from globalopt.values.layer import NM
from tests.reference.penalty_loop import damped


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


def inverse_factor(H: Tensor) -> Tensor:
    """Upper triangular `R` with `Rᵀ R = H^-1`, by inverting first, as published."""
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)


def sweep(W: Tensor, R: Tensor, nnz: int, pattern: NM | None = None, column_block: int = 128) -> Tensor:
    """The published sweep over `R = inverse_factor(H)`: (d_out, d_in) with the same share kept in every column block.

    The threshold of a block is itself pruned, so that a block keeps at least one weight fewer than its share.
    """
    W, pruned_share = W.clone(), 1 - nnz / W.numel()
    d_in = W.shape[1]
    S = torch.zeros_like(W)
    for begin in range(0, d_in, column_block):
        end = min(begin + column_block, d_in)
        columns, local = W[:, begin:end].clone(), R[begin:end, begin:end]
        pivots = local.diagonal()
        prune = torch.zeros_like(columns, dtype=torch.bool)
        if pattern is None:
            prices = (columns / pivots) ** 2
            prune = prices <= prices.flatten().sort().values[int(prices.numel() * pruned_share)]
        errors = torch.zeros_like(columns)
        for j in range(end - begin):
            if pattern is not None and j % pattern.of == 0:
                group = slice(j, j + pattern.of)
                cheapest = ((columns[:, group] / pivots[group]) ** 2).topk(pattern.of - pattern.keep, largest=False)
                prune[:, group] = prune[:, group].scatter(1, cheapest.indices, True)
            S[:, begin + j] = columns[:, j].masked_fill(prune[:, j], 0.0)
            errors[:, j] = (columns[:, j] - S[:, begin + j]) / local[j, j]
            columns[:, j:] -= torch.outer(errors[:, j], local[j, j:])
        W[:, end:] -= errors @ R[begin:end, end:]
    return S


def fit(
    W: Tensor,
    G: Tensor,
    nnz: int,
    pattern: NM | None = None,
    *,
    damping: float = 0.01,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`sweep` for a Gram damped by `damping` of its mean diagonal."""
    return sweep(W.to(dtype), inverse_factor(damped(G.to(dtype), damping, 0.0)), nnz, pattern)
