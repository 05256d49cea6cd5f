"""Low-rank approximation in the norm of a Gram.

The best rank-r `L` for `tr((M - L) G (M - L)ᵀ)` is `U Uᵀ M` with `U` the leading eigenvectors of `M G Mᵀ`: Eckart-Young
for `M F`, `F Fᵀ = G`, mapped back by `F^-1`. It needs the product `M G`, and no factor of `G`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def leading_subspace(M: Tensor, MG: Tensor, F: Tensor | None, rank: int) -> Tensor:
    """Orthonormal `U` (d_out, rank): leading eigenvectors of `M G Mᵀ`, exactly, on the smaller side, in float64.

    Directions beyond the rank of `M` are arbitrary.

    Args:
        M: (d_out, d_in) matrix to approximate.
        MG: (d_out, d_in) its product with `G`; `M` itself for the plain norm.
        F: (d_in, d_in) any factor with `F Fᵀ = G`, used where d_out > d_in; None for the plain norm.
        rank: 0 <= rank <= min(d_out, d_in).
    """
    if M.shape[0] <= M.shape[1]:
        K = MG.double() @ M.double().mT
        U = torch.linalg.eigh((K + K.mT) / 2).eigenvectors[:, -rank:] if rank else K[:, :0]
    else:
        T = M.double() if F is None else M.double() @ F.double()
        right = torch.linalg.eigh(T.mT @ T).eigenvectors[:, -rank:] if rank else T.mT[:, :0]
        # Only the span matters to the caller; QR also completes the basis where singular values vanish.
        U = torch.linalg.qr(T @ right).Q
    return U.to(M.dtype)


def subspace_step(M: Tensor, MG: Tensor, U: Tensor) -> Tensor:
    """One step `orth((M G)(Mᵀ U))` of subspace iteration on `M G Mᵀ`: tracks `leading_subspace` while `M` moves slowly.

    Args:
        M, MG: (d_out, d_in), as in `leading_subspace`.
        U: (d_out, rank) orthonormal.
    """
    return torch.linalg.qr(MG @ (M.mT @ U)).Q
