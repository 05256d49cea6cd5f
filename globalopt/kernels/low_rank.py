"""Low-rank approximation in the norm `tr(A E G Eᵀ)`.

The best rank-r `L` for `tr(A (M - L) G (M - L)ᵀ)` is `U (A U)ᵀ M`, where `U` holds the leading eigenvectors of
`M G Mᵀ A`, orthonormal in `A`: Eckart-Young for `Cᵀ M F`, `C Cᵀ = A`, `F Fᵀ = G`, mapped back. Finding it needs the
product `N = A M G`, and no factor of `G`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from globalopt.kernels.norm import Norm


class Subspace(NamedTuple):
    """`U` (d_out, rank) with `Uᵀ A U = I`, and `AU` (d_out, rank), its product with `A`."""

    U: Tensor
    AU: Tensor

    @property
    def rank(self) -> int:
        return self.U.shape[1]

    def factor(self, M: Tensor) -> Tensor:
        """`V` (rank, d_in) for which `U V` is the best approximation of `M` (d_out, d_in) in this subspace."""
        return self.AU.mT @ M


def leading_subspace(M: Tensor, N: Tensor, norm: Norm, rank: int) -> Subspace:
    """The leading eigenvectors of `M G Mᵀ A`, exactly, on the smaller side, in float64.

    Directions beyond the rank of `M` are arbitrary.

    Args:
        M: (d_out, d_in) matrix to approximate.
        N: (d_out, d_in) `norm.times(M)`.
        rank: 0 <= rank <= min(d_out, d_in).
    """
    C = None if norm.outputs is None else norm.outputs.factor.double()
    if rank == 0:
        U = M[:, :0]
        return Subspace(U, U)
    if M.shape[0] <= M.shape[1]:
        # Cᵀ M G Mᵀ C, from N = C Cᵀ M G.
        K = N.double() @ M.double().mT
        if C is not None:
            K = torch.linalg.solve_triangular(C, K, upper=False) @ C
        Q = torch.linalg.eigh((K + K.mT) / 2).eigenvectors[:, -rank:]
    else:
        T = M.double() if C is None else C.mT @ M.double()
        T = T if norm.factor is None else T @ norm.factor.double()
        right = torch.linalg.eigh(T.mT @ T).eigenvectors[:, -rank:]
        # Only the span matters to the caller; QR also completes the basis where singular values vanish.
        Q = torch.linalg.qr(T @ right).Q
    if C is None:
        U = Q.to(M.dtype)
        return Subspace(U, U)
    return Subspace(torch.linalg.solve_triangular(C.mT, Q, upper=True).to(M.dtype), (C @ Q).to(M.dtype))


def subspace_step(M: Tensor, N: Tensor, norm: Norm, previous: Subspace) -> Subspace:
    """One step `U <- orth_A(M Nᵀ U)` of subspace iteration: tracks `leading_subspace` while `M` moves slowly.

    Args:
        M, N: (d_out, d_in), as in `leading_subspace`.
    """
    # Transposed throughout: the narrow products are then twice as fast.
    Y = (previous.U.mT @ N) @ M.mT
    # They tend to eigenvectors, whose lengths are eigenvalues apart: equal lengths leave a well-conditioned basis.
    Y = Y / torch.linalg.vector_norm(Y, dim=1, keepdim=True).clamp_min(torch.finfo(Y.dtype).tiny)
    AY = Y if norm.outputs is None else Y @ norm.outputs.matrix
    C, info = torch.linalg.cholesky_ex(Y.double() @ AY.double().mT)
    if int(info) == 0:
        U = torch.linalg.solve_triangular(C, Y.double(), upper=False).to(M.dtype)
        AU = U if norm.outputs is None else torch.linalg.solve_triangular(C, AY.double(), upper=False).to(M.dtype)
        return Subspace(U.mT, AU.mT)
    # Directions have vanished, as where M has a smaller rank: complete the basis.
    return leading_subspace(M, N, norm, previous.rank)
