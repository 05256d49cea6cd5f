"""Robust PCA against its definition and a slow twin."""

from __future__ import annotations

import math

import pytest
import torch

from globalopt.errors import NumericalError
from globalopt.kernels.rpca import robust_pca, singular_above


def planted(d_out: int = 60, d_in: int = 80, rank: int = 3, corrupted: float = 0.05):
    generator = torch.Generator().manual_seed(0)
    L = torch.randn(d_out, rank, generator=generator) @ torch.randn(rank, d_in, generator=generator)
    S = torch.where(torch.rand(d_out, d_in, generator=generator) < corrupted, 10.0, 0.0)
    return L, S * torch.randn(d_out, d_in, generator=generator).sign()


def slow_twin(M, weight, steps, growth=1.5):
    """The textbook iteration with a full SVD per step."""
    S = torch.zeros_like(M)
    norm = torch.linalg.matrix_norm(M, 2)
    Y, mu = M / max(norm, M.abs().max() / weight), 1.25 / norm
    for _ in range(steps):
        U, s, Vh = torch.linalg.svd(M - S + Y / mu, full_matrices=False)
        L = U @ torch.diag((s - 1 / mu).clamp_min(0)) @ Vh
        R = M - L + Y / mu
        S = R.sign() * (R.abs() - weight / mu).clamp_min(0)
        Y = Y + mu * (M - L - S)
        mu = mu * growth
    return L, S


def test_recovers_planted_parts():
    L, S = planted()
    found = robust_pca(L + S, tolerance=1e-6, max_steps=100)
    assert len(found.s) == 3
    assert torch.linalg.matrix_norm((found.U * found.s) @ found.Vh - L) < 1e-3 * torch.linalg.matrix_norm(L)
    assert torch.equal(found.S.abs() > 1, S != 0)


@pytest.mark.parametrize("rank", [2, 25])
def test_equals_the_iteration_with_full_svds(rank):
    L, S = planted(rank=rank)
    found = robust_pca(L + S, tolerance=0.0, max_steps=12)
    slow_L, slow_S = slow_twin(L + S, 1 / math.sqrt(80), 12)
    assert found.steps == 12
    torch.testing.assert_close((found.U * found.s) @ found.Vh, slow_L, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(found.S, slow_S, atol=2e-3, rtol=1e-3)


def test_singular_values_are_positive_descending_and_factors_orthonormal():
    L, S = planted(rank=20)
    found = robust_pca(L + S)
    assert bool((found.s.diff() <= 0).all())
    assert bool((found.s > 0).all())
    torch.testing.assert_close(found.U.mT @ found.U, torch.eye(len(found.s)), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.Vh @ found.Vh.mT, torch.eye(len(found.s)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("count", [0, 5, 39])
def test_singular_above_finds_exactly_those_above(count):
    generator = torch.Generator().manual_seed(1)
    U = torch.linalg.qr(torch.randn(70, 40, generator=generator))[0]
    V = torch.linalg.qr(torch.randn(90, 40, generator=generator))[0]
    s = torch.linspace(40, 1, 40)
    U_found, s_found, Vh_found = singular_above((U * s) @ V.mT, 40.5 - count)
    assert len(s_found) == count
    torch.testing.assert_close(s_found, s[:count], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        (U_found * s_found) @ Vh_found, (U[:, :count] * s[:count]) @ V[:, :count].mT, atol=2e-2, rtol=0
    )


def test_zero_and_not_finite():
    assert robust_pca(torch.zeros(4, 5)).steps == 0
    with pytest.raises(NumericalError, match="not finite"):
        robust_pca(torch.full((3, 3), torch.nan))


def test_same_call_same_bits():
    L, S = planted()
    first, second = robust_pca(L + S), robust_pca(L + S)
    assert torch.equal(first.S, second.S)
    assert torch.equal(first.U, second.U)
