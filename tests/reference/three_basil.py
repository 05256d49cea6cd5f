"""The published 3BASiL loop, formula by formula: two factorisations, four products, a sort and an SVD in every step."""

from __future__ import annotations

import torch
from torch import Tensor

from globalopt.values.layer import NM
from tests.reference.low_rank import SVD, WhitenedSVD, exact
from tests.reference.penalty_loop import Penalty, UnitDiagonal, Verdict, damped, project


def fit(
    W: Tensor,
    G: Tensor,
    rank: int,
    nnz: int,
    pattern: NM | None = None,
    *,
    damping: float = 0.005,
    max_steps: int = 2000,
    dtype: torch.dtype = torch.float64,
    svd: SVD = exact,
) -> tuple[Tensor, Tensor]:
    """`S`, `L` (d_out, d_in) for a damped Gram: `damping` of the mean diagonal and of each diagonal entry.

    `L` is that of the last step and not fitted again to the projected `S`. Loops in `dtype`, eigenvalues in float64.
    """
    W, H = W.to(dtype), damped(G.to(dtype), damping, damping)
    scaled, low_rank = UnitDiagonal.of(H), WhitenedSVD(H, svd)
    WD = W * scaled.D
    penalty = Penalty(growth=(1.1, 1.05, 1.02), earliest=100)
    inverse = scaled.ridge_inverse(penalty.rho)
    first = project(WD, nnz, pattern)
    S, Z, dual, L = first, first, torch.zeros_like(W), torch.zeros_like(W)
    seen = first != 0
    for step in range(1, max_steps + 1):
        S = ((WD - L * scaled.D) @ scaled.H - dual + penalty.rho * Z) @ inverse
        Z = project(S + dual / penalty.rho, nnz, pattern)
        dual = dual + penalty.rho * (S - Z)
        L = low_rank(W - S / scaled.D, rank)
        if step % 10:
            continue
        moved = int(((Z != 0) != seen).sum())
        seen = Z != 0
        verdict = penalty.look(step, moved, nnz)
        if verdict is Verdict.STOP:
            break
        if verdict is Verdict.RESTART:
            Z, dual = first, torch.zeros_like(W)
        inverse = scaled.ridge_inverse(penalty.rho)
    return project(S, nnz, pattern) / scaled.D, L
