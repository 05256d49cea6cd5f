"""The published 3BASiL loop, formula by formula: two eigen-decompositions, a full sort and an SVD in every step."""

from __future__ import annotations

import torch
from torch import Tensor


def fit(W: Tensor, G: Tensor, rank: int, nnz: int, damping: float = 0.005, max_steps: int = 2000):
    """`S`, `L` (d_out, d_in) float64 for a damped Gram: `damping` of the mean diagonal and of each diagonal entry."""
    W, G = W.double(), G.double()
    H = G + torch.diag(damping * G.diagonal().mean() + damping * G.diagonal())
    D = H.diagonal().sqrt()
    Wt, Ht = W * D, H / D / D[:, None]
    values, Q = torch.linalg.eigh(Ht)
    Lambda, V = torch.linalg.eigh(H)

    def top(Z: Tensor) -> Tensor:
        out = torch.zeros(Z.numel(), dtype=Z.dtype)
        best = Z.flatten().abs().argsort(descending=True)[:nnz]
        out[best] = Z.flatten()[best]
        return out.view_as(Z)

    def low_rank(M: Tensor) -> Tensor:
        whitened = M @ V * Lambda.sqrt()
        U, s, Rt = torch.linalg.svd(whitened, full_matrices=False)
        return (U[:, :rank] * s[:rank]) @ Rt[:rank] / Lambda.sqrt() @ V.mT

    rho, grown = 0.1, False
    Z, dual, L = top(Wt), torch.zeros_like(Wt), torch.zeros_like(W)
    S = Z
    seen = Z != 0
    for step in range(1, max_steps + 1):
        inverse = Q @ torch.diag(1 / (values + rho)) @ Q.mT
        S = ((Wt - L * D) @ Ht - dual + rho * Z) @ inverse
        Z = top(S + dual / rho)
        dual = dual + rho * (S - Z)
        L = low_rank(W - S / D)
        if step % 10:
            continue
        changed = int(((Z != 0) != seen).sum())
        seen = Z != 0
        if changed / nnz > 0.1:
            rho, grown = rho * 1.1, True
        elif changed / nnz > 0.005:
            rho, grown = rho * 1.05, True
        elif changed and grown:
            rho *= 1.02
        elif grown:
            break
        else:
            rho /= 5
            Z, dual = top(Wt), torch.zeros_like(Wt)
        rho = min(rho, 1e6)
        if step >= 100 and changed / nnz < 3e-4:
            break
    return top(S) / D, L
