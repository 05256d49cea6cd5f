"""The published low-rank step in the metric of a damped Gram, with every product written out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SVD = Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]


def exact(T: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading `rank` singular triples `U (n, rank)`, `s (rank,)`, `Vh (rank, m)` by a full decomposition."""
    U, s, Vh = torch.linalg.svd(T, full_matrices=False)
    return U[:, :rank], s[:rank], Vh[:rank]


def randomized(T: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same from a fresh random sketch of 5 more columns and two power iterations, as the public code has it."""
    U, s, V = torch.svd_lowrank(T, q=min(rank + 5, *T.shape), niter=2)
    return U[:, :rank], s[:rank], V[:, :rank].mT


class WhitenedSVD:
    """`argmin tr((R - L) H (R - L)ᵀ)` over `L` of rank at most `rank`, by the eigenvectors `V` of `H = V Λ Vᵀ`.

    `T = Λ^-1/2 Vᵀ H Rᵀ` is cut to rank `rank`; `Lᵀ = V Λ^-1/2 T`. The eigenvectors come from a full SVD of `H`, once.
    """

    def __init__(self, H: Tensor, svd: SVD) -> None:
        V, values, _ = torch.linalg.svd(H)
        self.H, self.svd, self.whitening = H, svd, V / values.sqrt()

    def __call__(self, R: Tensor, rank: int) -> Tensor:
        T = self.whitening.mT @ (self.H @ R.mT)
        U, s, Vh = self.svd(T, rank)
        return (self.whitening @ (U * s) @ Vh).mT
