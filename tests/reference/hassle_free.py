"""HASSLE-free with the closed-form low-rank step: a pruner and an SVD by turns, the last round returned."""

from __future__ import annotations

import torch
from torch import Tensor

from globalopt.values.layer import NM
from tests.reference import alps, sparsegpt
from tests.reference.low_rank import SVD, WhitenedSVD, exact
from tests.reference.penalty_loop import UnitDiagonal, damped


def fit(
    W: Tensor,
    G: Tensor,
    rank: int,
    nnz: int,
    pattern: NM | None = None,
    *,
    sparse_step: str = "sparsegpt",
    rounds: int = 40,
    damping: float = 0.005,
    dtype: torch.dtype = torch.float64,
    svd: SVD = exact,
) -> tuple[Tensor, Tensor]:
    """`S`, `L` (d_out, d_in): `S <- prune(W - L)`, `L <- argmin tr((W - S - L) H (W - S - L)ᵀ)`, from `L = 0`.

    `sparse_step` is "sparsegpt", or "alps" with at most 100 steps. What the pruners need of the Gram is computed once.
    """
    W, H = W.to(dtype), damped(G.to(dtype), damping, damping)
    low_rank = WhitenedSVD(H, svd)
    if sparse_step == "alps":
        scaled = UnitDiagonal.of(H)

        def prune(residual: Tensor) -> Tensor:
            return alps.prune(residual, scaled, nnz, pattern, max_steps=100)
    else:
        factor = sparsegpt.inverse_factor(H)

        def prune(residual: Tensor) -> Tensor:
            return sparsegpt.sweep(residual, factor, nnz, pattern)

    S, L = torch.zeros_like(W), torch.zeros_like(W)
    for _ in range(rounds):
        S = prune(W - L)
        L = low_rank(W - S, rank)
    return S, L
