"""OATS as published: a full SVD per round, thresholds per row, the last round returned."""

from __future__ import annotations

import torch
from torch import Tensor


def fit(W: Tensor, G: Tensor, rank: int, per_row: int, steps: int = 80) -> tuple[Tensor, Tensor]:
    """`S`, `L` (d_out, d_in) float64 with `per_row` nonzeros in every row of `S`; all inputs alive."""
    D = G.double().diagonal().sqrt()
    WD = W.double() * D
    S = torch.zeros_like(WD)
    L = S
    for _ in range(steps):
        U, s, Vh = torch.linalg.svd(WD - S, full_matrices=False)
        L = (U[:, :rank] * s[:rank]) @ Vh[:rank]
        rest = WD - L
        S = torch.zeros_like(rest).scatter(1, (top := rest.abs().topk(per_row, dim=1).indices), rest.gather(1, top))
    return S / D, L / D
