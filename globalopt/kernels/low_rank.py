"""Compute low-rank approximations in the norm `tr(A E G Eᵀ)`.

The best rank-r `L` for `tr(A (M - L) G (M - L)ᵀ)` is `U (A U)ᵀ M`, where `U` holds the leading eigenvectors of
`M G Mᵀ A`, orthonormal in `A`: this is Eckart-Young for `Cᵀ M F`, with `C Cᵀ = A` and `F Fᵀ = G`, mapped back. Finding
it needs the product `N = A M G`, and no factor of `G`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from globalopt.kernels.norm import Norm


class Subspace(NamedTuple):
    """Span the columns of a low-rank factor by a basis that is orthonormal in `A`.

    Args:
        U: (d_out, rank) with `Uᵀ A U = I`.
        AU: (d_out, rank) the product `A U`.

    >>> U = torch.tensor([[1.0], [0.0]])
    >>> subspace = Subspace(U, U)  # without an output Gram, A is the identity
    >>> (subspace.U @ subspace.factor(torch.tensor([[3.0, 4.0], [5.0, 6.0]]))).tolist()
    [[3.0, 4.0], [0.0, 0.0]]
    """

    U: Tensor
    AU: Tensor

    @property
    def rank(self) -> int:
        """Return the number of columns of `U`."""
        return self.U.shape[1]

    def factor(self, M: Tensor) -> Tensor:
        """Compute `V = (A U)ᵀ M` (rank, d_in): `U V` is the projection of `M` (d_out, d_in) onto the subspace."""
        return self.AU.mT @ M


def leading_subspace(M: Tensor, N: Tensor, norm: Norm, rank: int) -> Subspace:
    """Compute the leading eigenvectors of `M G Mᵀ A` by an exact eigendecomposition of the smaller side, in float64.

    Directions beyond the rank of `M` are arbitrary.

    Args:
        M: (d_out, d_in) matrix to approximate.
        N: (d_out, d_in) `A M G`, which is `norm.times(M)`.
        norm: the norm of the approximation.
        rank: 0 <= rank <= min(d_out, d_in).

    >>> from globalopt.kernels.norm import Side
    >>> M, G = torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([1.0, 100.0]))
    >>> norm = Norm(Side(G, G.sqrt()))  # the second input is ten times as large as the first
    >>> subspace = leading_subspace(M, norm.times(M), norm, rank=1)
    >>> (subspace.U @ subspace.factor(M)).round(decimals=4).abs().tolist()
    [[0.0, 0.0], [0.0, 1.0]]
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
        # Any orthonormal basis of the span will do; that of QR is complete even where singular values vanish.
        Q = torch.linalg.qr(T @ right).Q
    if C is None:
        U = Q.to(M.dtype)
        return Subspace(U, U)
    return Subspace(torch.linalg.solve_triangular(C.mT, Q, upper=True).to(M.dtype), (C @ Q).to(M.dtype))


def subspace_step(M: Tensor, N: Tensor, norm: Norm, previous: Subspace) -> Subspace:
    """Take one step `U <- orth_A(M Nᵀ U)` of subspace iteration.

    One step per change is enough to track `leading_subspace` while `M` changes slowly.

    Args:
        M, N, norm: as in `leading_subspace`.
        previous: the subspace to start from.

    >>> M, U = torch.diag(torch.tensor([3.0, 1.0])), torch.full((2, 1), 0.5**0.5)
    >>> subspace = Subspace(U, U)
    >>> for _ in range(5):
    ...     subspace = subspace_step(M, M, Norm(None), subspace)
    >>> (subspace.U @ subspace.factor(M)).round(decimals=3).abs().tolist()
    [[3.0, 0.0], [0.0, 0.0]]
    """
    # All factors are transposed, (rank, d_out): the narrow products are then twice as fast.
    Y = (previous.U.mT @ N) @ M.mT
    # The rows tend to eigenvectors with lengths in the ratio of the eigenvalues; with equal lengths, the Gram matrix
    # of the rows is well conditioned.
    Y = Y / torch.linalg.vector_norm(Y, dim=1, keepdim=True).clamp_min(torch.finfo(Y.dtype).tiny)
    AY = Y if norm.outputs is None else Y @ norm.outputs.matrix
    C, info = torch.linalg.cholesky_ex(Y.double() @ AY.double().mT)
    if int(info) == 0:
        U = torch.linalg.solve_triangular(C, Y.double(), upper=False).to(M.dtype)
        AU = U if norm.outputs is None else torch.linalg.solve_triangular(C, AY.double(), upper=False).to(M.dtype)
        return Subspace(U.mT, AU.mT)
    # The rows are linearly dependent, as where M has a smaller rank: an exact decomposition completes the basis.
    return leading_subspace(M, N, norm, previous.rank)


def right_factor(U: Tensor, M: Tensor, A: Tensor | None) -> Tensor:
    """Compute the `V` of least `tr(A (M - U V) G (M - U V)ᵀ)`, `(Uᵀ A U)^-1 Uᵀ A M`, which is the same for every `G`.

    Args:
        U: (d_out, rank), not orthonormal in `A` as that of a `Subspace` is; rank 0 is allowed.
        M: (d_out, d_in) to approximate.
        A: (d_out, d_out) output Gram, which may be singular; None is the identity.
    Returns:
        (rank, d_in) float64.

    >>> U, M = torch.tensor([[2.0], [0.0]]), torch.tensor([[2.0, 4.0], [1.0, 1.0]])
    >>> right_factor(U, M, None).tolist()
    [[1.0, 2.0]]
    """
    if not U.shape[1]:
        return M[:0].double()
    U = U.double()
    AU = U if A is None else A.double() @ U
    # A direction of U may have no error in the norm, which makes the system singular.
    return torch.linalg.pinv(U.mT @ AU, hermitian=True) @ AU.mT @ M.double()


def balanced(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """Balance the factors of `U V`, `Uᵀ U = V Vᵀ`, by the SVD of the product, in float64 and without forming it.

    Args:
        U: (d_out, rank). V: (rank, d_in).

    >>> U, V = balanced(torch.tensor([[8.0], [0.0]]), torch.tensor([[0.0, 2.0]]))
    >>> U.abs().flatten().tolist(), V.abs().flatten().tolist()
    ([4.0, 0.0], [0.0, 4.0])
    """
    if not U.numel():
        return U, V
    Qu, Ru = torch.linalg.qr(U.double())
    Qv, Rv = torch.linalg.qr(V.double().mT)
    P, s, Qh = torch.linalg.svd(Ru @ Rv.mT)
    root = s.sqrt()
    return ((Qu @ P) * root).float(), (root[:, None] * (Qh @ Qv.mT)).float()
