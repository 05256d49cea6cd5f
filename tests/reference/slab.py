"""SLaB as published, and our sweep for its signs with the inverse of what is left formed anew at every column."""

from __future__ import annotations

import torch
from torch import Tensor

from globalopt.values.layer import NM
from tests.reference.penalty_loop import project


def sign(Y: Tensor) -> Tensor:
    return torch.where(Y < 0, -1.0, 1.0).to(Y.dtype)


def fit(
    W: Tensor,
    G: Tensor,
    rank: int,
    per_row: int,
    steps: int = 20,
    pattern: NM | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """`S`, `L` (d_out, d_in): Wanda's score per row, a full SVD of `|W - S|` without weights, the last round.

    All inputs are alive; `L` is the low-rank part times its signs.
    """
    W, D = W.to(dtype), G.to(dtype).diagonal().sqrt()
    S = L = torch.zeros_like(W)
    for _ in range(steps):
        rest = W - L
        if pattern is not None:
            S = project(rest * D, 0, pattern) / D
        else:
            largest = (rest * D).abs().topk(per_row, dim=1).indices
            S = torch.zeros_like(rest).scatter(1, largest, rest.gather(1, largest))
        Y = W - S
        U, s, Vh = torch.linalg.svd(Y.abs(), full_matrices=False)
        L = (U[:, :rank] * s[:rank]) @ Vh[:rank] * sign(Y)
    return S, L


def sweep(
    W: Tensor, G: Tensor, size: Tensor, nnz: int, pattern: NM | None = None, column_block: int = 128
) -> tuple[Tensor, Tensor]:
    """`S` and `B` (d_out, d_in) float64, `G` positive definite, `size >= 0`: what is not kept becomes `size * B`."""
    W, G, size = W.double().clone(), G.double(), size.double()
    d_out, d_in = W.shape
    remaining = [torch.linalg.inv(G[j:, j:]) for j in range(d_in)]
    prices = torch.stack([inverse[0, 0] for inverse in remaining])
    keep = torch.zeros_like(W, dtype=torch.bool)
    S, B = torch.zeros_like(W), torch.zeros_like(W)
    used = 0
    for j in range(d_in):
        lost = W - size * sign(W)
        if pattern is not None and j % pattern.of == 0:
            for row in range(d_out):
                score = lost[row, j : j + pattern.of] ** 2 / prices[j : j + pattern.of]
                keep[row, j + score.argsort(descending=True)[: pattern.keep]] = True
        elif pattern is None and j % column_block == 0:
            score = (lost[:, j:] ** 2 / prices[j:]).flatten()
            chosen = torch.zeros_like(score, dtype=torch.bool)
            chosen[score.argsort(descending=True)[: nnz - used]] = True
            end = min(j + column_block, d_in)
            keep[:, j:end] = chosen.view(d_out, -1)[:, : end - j]
            used += int(keep[:, j:end].sum())
        B[:, j] = sign(W[:, j])
        S[:, j] = torch.where(keep[:, j], lost[:, j], 0.0)
        W[:, j:] -= torch.outer((lost[:, j] - S[:, j]) / remaining[j][0, 0], remaining[j][0])
    return S, B
