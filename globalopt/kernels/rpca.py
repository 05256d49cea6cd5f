"""Split matrices by robust PCA, with the inexact augmented Lagrangian method."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from globalopt.errors import NumericalError

FLOAT32_FLOOR = 7 * 2**-11.5
"""Least threshold, relative to the spectral norm, at which singular values are found from a float32 Gram.

A float32 Gram `X Xᵀ` has rounding errors of `eps smax²`, so a singular value `s` found from it has one of
`eps smax² / (2 s)`. At this floor, `7 sqrt(eps)`, that is a hundredth of the threshold; without it values below
`sqrt(eps) smax` would be lost.
"""


@dataclass(frozen=True, eq=False)
class RobustPCA:
    """Hold the split `M ~ U diag(s) Vh + S`, and how the iteration ended.

    Args:
        U: (d_out, r). s: (r,) descending. Vh: (r, d_in). Singular triples of the low-rank part `L`.
        S: (d_out, d_in) sparse part.
        steps: iterations taken.
        residual: `||M - L - S||_F / ||M||_F`.

    >>> found = robust_pca(torch.ones(4, 4))  # of rank one
    >>> len(found.s), int((found.S.abs() > 0.01).sum())
    (1, 0)
    """

    U: Tensor
    s: Tensor
    Vh: Tensor
    S: Tensor
    steps: int
    residual: float


def robust_pca(
    M: Tensor,
    weight: float | None = None,
    tolerance: float = 1e-3,
    max_steps: int = 25,
    growth: float = 1.5,
) -> RobustPCA:
    """Split `M` into a low-rank and a sparse part by robust PCA.

    The problem is `min ||L||_* + weight ||S||_1` subject to `L + S = M`, and one iteration is

        L <- SVT_{1/mu}(M - S + Y/mu),  S <- shrink_{weight/mu}(M - L + Y/mu),  Y <- Y + mu (M - L - S),
        mu <- growth mu

    with `Y_0 = M / max(||M||_2, ||M||_inf / weight)` and `mu_0 = 1.25 / ||M||_2` (Lin, Chen, Ma 2010,
    arXiv:1009.5055, algorithm 5). The thresholded `L` of `X` comes from the eigenvectors `Q` of the Gram of its smaller
    side, with the eigenvalues `s²` above `1/mu²`: `L = Q diag(1 - 1 / (mu s)) Qᵀ X` for a wide `X`. Its singular
    triples are computed once, after the last step.

    Args:
        M: (d_out, d_in) float32, not modified.
        weight: of the 1-norm of `S` against the nuclear norm of `L`; default `1 / sqrt(max(d_out, d_in))`.
        tolerance: relative residual at which to stop.
        max_steps: largest number of iterations. `M = 0` takes none.
        growth: factor on mu per step, above 1.
    Raises:
        NumericalError: `M` is not finite.

    >>> M = torch.ones(20, 20)
    >>> M[3, 4] = 11.0  # rank one, and one outlier
    >>> found = robust_pca(M, tolerance=1e-5, max_steps=100)
    >>> len(found.s), round(float(found.S[3, 4]), 2), int((found.S.abs() > 0.01).sum())
    (1, 10.0, 1)
    """
    if not bool(torch.isfinite(M).all()):
        raise NumericalError("Robust PCA was given a matrix that is not finite.")
    d_out, d_in = M.shape
    weight = 1 / math.sqrt(max(d_out, d_in)) if weight is None else weight
    frobenius = float(torch.linalg.matrix_norm(M))
    if frobenius == 0:
        empty = M.new_zeros(0)
        return RobustPCA(M.new_zeros(d_out, 0), empty, M.new_zeros(0, d_in), M.new_zeros(d_out, d_in), 0, 0.0)
    if d_out > d_in:
        found = robust_pca(M.mT, weight, tolerance, max_steps, growth)
        return replace(found, U=found.Vh.mT, Vh=found.U.mT, S=found.S.mT)

    spectral = float(torch.linalg.eigvalsh(M @ M.mT)[-1].sqrt())
    Y = M / max(spectral, float(M.abs().max()) / weight)
    mu = 1.25 / spectral
    S = torch.zeros_like(M)
    Q, projected = M.new_zeros(d_out, 0), M.new_zeros(0, d_in)
    residual = 1.0
    step = 0
    while step < max_steps and residual >= tolerance:
        step += 1
        X = M - S + Y / mu
        Q, s = leading_left(X, 1 / mu, exact=1 / mu < FLOAT32_FLOOR * spectral)
        projected = (1 - 1 / (mu * s))[:, None] * (Q.mT @ X)
        L = Q @ projected
        S = torch.nn.functional.softshrink(M - L + Y / mu, weight / mu)
        gap = M - L - S
        Y = Y + mu * gap
        mu *= growth
        residual = float(torch.linalg.matrix_norm(gap)) / frobenius
    # The rows are orthogonal but for rounding, so that their Gram loses no singular value and costs less than an SVD.
    wide = projected.double()
    values, vectors = torch.linalg.eigh(wide @ wide.mT)
    s, vectors = values.clamp_min(0).sqrt().flip(0), vectors.flip(1)
    Vh = vectors.mT @ wide / s.clamp_min(torch.finfo(s.dtype).tiny)[:, None]
    return RobustPCA(Q @ vectors.to(M.dtype), s.to(M.dtype), Vh.to(M.dtype), S, step, residual)


def leading_left(X: Tensor, threshold: float, exact: bool = True) -> tuple[Tensor, Tensor]:
    """Compute the left singular vectors of `X` with singular values above `threshold`, by the eigenvectors of `X Xᵀ`.

    Args:
        X: (n, m) with n <= m. threshold: > 0.
        exact: whether the Gram is in float64, which takes about twice the time; see `FLOAT32_FLOOR`.
    Returns:
        Q (n, r) with orthonormal columns, s (r,) ascending, both in the dtype of `X`; r may be 0.

    >>> Q, s = leading_left(torch.diag(torch.tensor([5.0, 3.0, 1.0])), threshold=2.0)
    >>> s.round(decimals=4).tolist()
    [3.0, 5.0]
    """
    wide = X.double() if exact else X
    values, vectors = torch.linalg.eigh(wide @ wide.mT)
    kept = values > threshold**2
    return vectors[:, kept].to(X.dtype), values[kept].sqrt().to(X.dtype)
