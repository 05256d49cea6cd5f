"""Robust PCA against its definition and a slow twin."""

from __future__ import annotations

import pytest
import torch

from globalopt.errors import NumericalError
from globalopt.kernels.rpca import FLOAT32_FLOOR, leading_left, robust_pca
from tests.reference import rpca


def planted(d_out: int = 60, d_in: int = 80, rank: int = 3, corrupted: float = 0.05):
    generator = torch.Generator().manual_seed(0)
    L = torch.randn(d_out, rank, generator=generator) @ torch.randn(rank, d_in, generator=generator)
    S = torch.where(torch.rand(d_out, d_in, generator=generator) < corrupted, 10.0, 0.0)
    return L, S * torch.randn(d_out, d_in, generator=generator).sign()


def test_recovers_planted_parts():
    L, S = planted()
    found = robust_pca(L + S, tolerance=1e-6, max_steps=100)
    assert len(found.s) == 3
    assert torch.linalg.matrix_norm((found.U * found.s) @ found.Vh - L) < 1e-3 * torch.linalg.matrix_norm(L)
    assert torch.equal(found.S.abs() > 1, S != 0)


def decaying(d_out: int, d_in: int, power: float) -> torch.Tensor:
    """Singular values `i^-power`, and noise in every entry, so that the rank grows with every step."""
    generator = torch.Generator().manual_seed(2)
    k = min(d_out, d_in)
    U = torch.linalg.qr(torch.randn(d_out, k, generator=generator))[0]
    V = torch.linalg.qr(torch.randn(d_in, k, generator=generator))[0]
    noise = torch.randn(d_out, d_in, generator=generator)
    return (U * torch.arange(1.0, k + 1) ** -power) @ V.mT + 3e-4 * noise


@pytest.mark.parametrize("above", [rpca.full, rpca.subspace])
@pytest.mark.parametrize("shape", [(60, 80), (80, 60), (60, 60)])
@pytest.mark.parametrize("kind", ["low rank", "high rank", "decaying"])
def test_equals_the_iteration_with_svds(kind, shape, above):
    decays = kind == "decaying"
    L, S = planted(*shape, rank=2 if kind == "low rank" else 25)
    M = decaying(*shape, power=1.0) if decays else L + S
    tolerance = 1e-4 if decays else 1e-3
    found = robust_pca(M, tolerance=tolerance)
    L, S, steps = rpca.iterate(M, above, tolerance)
    assert found.steps == steps
    # Its last thresholds, `1 / mu`, are below the floor of float32 Grams.
    assert not decays or 1.25 * 1.5 ** (steps - 1) > 1 / FLOAT32_FLOOR
    # Both of the same rank, but for values at the threshold.
    values = torch.linalg.svdvals(L)
    torch.testing.assert_close(
        torch.nn.functional.pad(found.s, (0, len(values) - len(found.s))), values, rtol=0, atol=1e-4 * float(values[0])
    )
    size = torch.linalg.matrix_norm(M)
    assert torch.linalg.matrix_norm((found.U * found.s) @ found.Vh - L) < 2e-4 * size
    assert torch.linalg.matrix_norm(found.S - S) < 2e-4 * size


def test_singular_values_are_positive_descending_and_factors_orthonormal():
    L, S = planted(rank=20)
    found = robust_pca(L + S)
    assert bool((found.s.diff() <= 0).all())
    assert bool((found.s > 0).all())
    torch.testing.assert_close(found.U.mT @ found.U, torch.eye(len(found.s)), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.Vh @ found.Vh.mT, torch.eye(len(found.s)), atol=1e-4, rtol=0)


def with_values(s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A wide matrix with the singular values `s`, and its left singular vectors."""
    generator = torch.Generator().manual_seed(1)
    U = torch.linalg.qr(torch.randn(len(s), len(s), generator=generator))[0]
    V = torch.linalg.qr(torch.randn(90, len(s), generator=generator))[0]
    return (U * s) @ V.mT, U


@pytest.mark.parametrize("count", [0, 5, 39, 40])
@pytest.mark.parametrize("exact", [False, True])
def test_exactly_the_values_above_the_threshold_are_found(exact, count):
    s = torch.linspace(40, 1, 40)
    X, U = with_values(s)
    Q, found = leading_left(X, 40.5 - count, exact)
    assert len(found) == count
    torch.testing.assert_close(found, s[:count].flip(0), rtol=1e-4, atol=0)
    torch.testing.assert_close(Q @ Q.mT, U[:, :count] @ U[:, :count].mT, atol=1e-4, rtol=0)


def test_values_are_right_within_a_hundredth_of_the_threshold_down_to_the_floor():
    s = torch.logspace(0, -4.5, 60)
    X, _ = with_values(s)
    _, rough = leading_left(X, FLOAT32_FLOOR, exact=False)
    above = s[s > FLOAT32_FLOOR].flip(0)
    assert len(rough) == len(above)
    assert bool(((rough - above).abs() < FLOAT32_FLOOR / 100).all())
    # A float32 Gram loses the smallest of them, and a float64 Gram none.
    _, exact = leading_left(X, 2e-5)
    torch.testing.assert_close(exact, s.flip(0), rtol=0, atol=1e-6)


def test_zero_and_not_finite():
    assert robust_pca(torch.zeros(4, 5)).steps == 0
    with pytest.raises(NumericalError, match="not finite"):
        robust_pca(torch.full((3, 3), torch.nan))


def test_same_call_same_bits():
    L, S = planted()
    first, second = robust_pca(L + S), robust_pca(L + S)
    assert torch.equal(first.S, second.S)
    assert torch.equal(first.U, second.U)
