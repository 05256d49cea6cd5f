"""Robust PCA with an SVD in every step: the textbook's full one, or a warm-started subspace iteration."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Triples = tuple[Tensor, Tensor, Tensor]
Above = Callable[[Tensor, float, Tensor | None], Triples]


def iterate(
    M: Tensor, above: Above, tolerance: float = 1e-3, max_steps: int = 25, growth: float = 1.5
) -> tuple[Tensor, Tensor, int]:
    """`L`, `S` (d_out, d_in) and the number of steps; `above` finds the singular triples above a threshold."""
    weight = 1 / math.sqrt(max(M.shape))
    size, norm = torch.linalg.matrix_norm(M), torch.linalg.matrix_norm(M, 2)
    Y, mu = M / max(norm, M.abs().max() / weight), float(1.25 / norm)
    L, S = torch.zeros_like(M), torch.zeros_like(M)
    basis: Tensor | None = None
    for step in range(1, max_steps + 1):
        U, s, Vh = above(M - S + Y / mu, 1 / mu, basis)
        basis = Vh.mT
        L = (U * (s - 1 / mu)) @ Vh
        R = M - L + Y / mu
        S = R.sign() * (R.abs() - weight / mu).clamp_min(0)
        Y = Y + mu * (M - L - S)
        mu *= growth
        if torch.linalg.matrix_norm(M - L - S) < tolerance * size:
            return L, S, step
    return L, S, max_steps


def full(M: Tensor, threshold: float, basis: Tensor | None = None) -> Triples:
    """Those above `threshold` of a full SVD."""
    U, s, Vh = torch.linalg.svd(M, full_matrices=False)
    return U[:, s > threshold], s[s > threshold], Vh[s > threshold]


def subspace(M: Tensor, threshold: float, basis: Tensor | None = None) -> Triples:
    """By subspace iteration from the previous step's `basis` (d_in, k); a full SVD past a quarter of the side."""
    width = 8 + (0 if basis is None else basis.shape[1])
    while 4 * width < min(M.shape):
        U, s, Vh = _leading(M, width, basis)
        if s[-1] <= threshold:
            return U[:, s > threshold], s[s > threshold], Vh[s > threshold]
        # All values found are above the threshold, so that there may be more: widen the subspace that was found.
        basis, width = Vh.mT, 2 * width
    return full(M, threshold)


def _leading(M: Tensor, width: int, basis: Tensor | None) -> Triples:
    """`width` leading triples, when no value changes by more than 1e-4 of the largest, or after 30 passes."""
    start = torch.randn(M.shape[1], width, generator=torch.Generator().manual_seed(0)).to(M)
    if basis is not None:
        start[:, : basis.shape[1]] = basis
    values = M.new_zeros(width)
    for _ in range(30):
        Q = torch.linalg.qr(M @ start)[0]
        start, R = torch.linalg.qr(M.mT @ Q)
        before, values = values, torch.linalg.svdvals(R)
        if (values - before).abs().max() <= 1e-4 * values[0]:
            break
    U, s, Wh = torch.linalg.svd(M @ start, full_matrices=False)
    return U, s, Wh @ start.mT
