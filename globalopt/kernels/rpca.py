"""Split matrices by robust PCA, with the inexact augmented Lagrangian method."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from globalopt.errors import NumericalError

OVERSAMPLING = 8  # directions of the subspace iteration beyond those of the basis


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
    arXiv:1009.5055, algorithm 5). Only the singular values above `1/mu` are computed: by a warm-started subspace
    iteration whose width follows the rank, and by a full SVD once the rank passes a quarter of the smaller side.

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

    spectral = float(torch.linalg.matrix_norm(M, ord=2))
    Y = M / max(spectral, float(M.abs().max()) / weight)
    mu = 1.25 / spectral
    S = torch.zeros_like(M)
    basis: Tensor | None = None
    U, s, Vh = M.new_zeros(d_out, 0), M.new_zeros(0), M.new_zeros(0, d_in)
    residual = 1.0
    step = 0
    while step < max_steps and residual >= tolerance:
        step += 1
        U, s, Vh = singular_above(M - S + Y / mu, 1 / mu, basis)
        basis = Vh.mT
        s = s - 1 / mu
        L = (U * s) @ Vh
        S = torch.nn.functional.softshrink(M - L + Y / mu, weight / mu)
        gap = M - L - S
        Y = Y + mu * gap
        mu *= growth
        residual = float(torch.linalg.matrix_norm(gap)) / frobenius
    return RobustPCA(U, s, Vh, S, step, residual)


def singular_above(M: Tensor, threshold: float, basis: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the singular triples of `M` with values above `threshold`.

    Args:
        M: (d_out, d_in). threshold: >= 0.
        basis: (d_in, k) a guess of the leading right singular subspace, e.g. of the previous iterate; None starts
            from a fixed pseudo-random one.
    Returns:
        U (d_out, r), s (r,) descending, Vh (r, d_in); r may be 0.

    >>> U, s, Vh = singular_above(torch.diag(torch.tensor([5.0, 3.0, 1.0])), threshold=2.0)
    >>> s.round(decimals=4).tolist()
    [5.0, 3.0]
    """
    smaller = min(M.shape)
    width = OVERSAMPLING + (0 if basis is None else basis.shape[1])
    while 4 * width < smaller:
        U, s, Vh = _subspace_svd(M, width, basis)
        if s[-1] <= threshold:
            keep = s > threshold
            return U[:, keep], s[keep], Vh[keep]
        # All values found are above the threshold, so that there may be more: widen the subspace that was found.
        basis, width = Vh.mT, 2 * width
    U, s, Vh = torch.linalg.svd(M, full_matrices=False)
    keep = s > threshold
    return U[:, keep], s[keep], Vh[keep]


def _subspace_svd(
    M: Tensor, width: int, basis: Tensor | None, tolerance: float = 1e-4, max_passes: int = 30
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `width` leading singular triples by subspace iteration.

    It ends after `max_passes`, or when no value changes by more than `tolerance` times the largest.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(M.shape[1], width, generator=generator).to(M)
    if basis is not None:
        start[:, : basis.shape[1]] = basis
    values = M.new_zeros(width)
    for _ in range(max_passes):
        Q = torch.linalg.qr(M @ start)[0]
        start, R = torch.linalg.qr(M.mT @ Q)
        before, values = values, torch.linalg.svdvals(R)
        if float((values - before).abs().max()) <= tolerance * float(values[0]):
            break
    U, s, Wh = torch.linalg.svd(M @ start, full_matrices=False)
    return U, s, Wh @ start.mT
