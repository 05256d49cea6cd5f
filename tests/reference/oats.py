"""OATS as published: a full SVD per round, thresholds per row, the last round returned."""

from __future__ import annotations

import torch
from torch import Tensor

from globalopt.values.layer import NM
from tests.reference.penalty_loop import project


def fit(
    W: Tensor,
    G: Tensor,
    rank: int,
    per_row: int,
    steps: int = 80,
    pattern: NM | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """`S`, `L` (d_out, d_in) with `per_row` nonzeros in every row of `S`, or following `pattern`; all inputs alive."""
    D = G.to(dtype).diagonal().sqrt()
    WD = W.to(dtype) * D
    S = torch.zeros_like(WD)
    L = S
    for _ in range(steps):
        U, s, Vh = torch.linalg.svd(WD - S, full_matrices=False)
        L = (U[:, :rank] * s[:rank]) @ Vh[:rank]
        rest = WD - L
        if pattern is not None:
            S = project(rest, 0, pattern)
        else:
            largest = rest.abs().topk(per_row, dim=1).indices
            S = torch.zeros_like(rest).scatter(1, largest, rest.gather(1, largest))
    return S / D, L / D
