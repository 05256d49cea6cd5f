from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from globalopt.kernels.cholesky import obs_factor
from globalopt.kernels.norm import Norm, Side
from globalopt.kernels.obs import obs_prune
from globalopt.kernels.projection import keep_weights
from globalopt.kernels.sign_plane import SignPlane, alternate, fit_factors, sign_sweep, signs
from globalopt.values.layer import NM
from tests.reference import slab
from tests.synthetic import layer


def side(matrix):
    return Side(matrix, torch.linalg.cholesky(matrix))


def problem(d_out=12, d_in=20, seed=0):
    """A weight, a norm with both sides, a rank-1 plane near it; float64."""
    W, gram = layer(d_out, d_in, 300, seed)
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(d_out, 3 * d_out, generator=generator).double()
    W, G = W.double(), gram.damped(0.01).matrix.double()
    plane = SignPlane(W.abs().mean(1, keepdim=True), torch.ones(1, d_in).double(), signs(W))
    return W, Norm(side(G), side(X @ X.mT / X.shape[1])), plane


def squared(norm, E):
    return float((norm.times(E) * E).sum())


def keep_40(magnitudes):
    return keep_weights(magnitudes, 40)


def test_zero_counts_as_positive():
    assert signs(torch.tensor([-2.0, -0.0, 0.0, 3.0])).tolist() == [-1, 1, 1, 1]


def test_rounds_descend_at_rank_one_and_the_last_is_exact_for_its_support():
    W, _, _ = problem()
    errors = []

    def error(residual):
        errors.append(float(residual.square().sum()))
        return errors[-1]

    S, plane = alternate(W, keep_40, 1, 30, error)
    assert len(errors) == 30
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(errors))
    assert int(S.count_nonzero()) == 40
    assert bool((plane.U @ plane.V >= 0).all())
    U, s, Vh = torch.linalg.svd((W - S).abs(), full_matrices=False)
    torch.testing.assert_close(plane.dense(), s[0] * torch.outer(U[:, 0], Vh[0]) * signs(W - S), rtol=1e-3, atol=1e-3)


def test_the_round_of_least_error_is_kept():
    W, _, _ = problem()
    scores = iter([3.0, 1.0, 2.0])
    kept = alternate(W, keep_40, 1, 3, lambda residual: next(scores))
    first = alternate(W, keep_40, 1, 1, lambda residual: 0.0)
    descending = iter([2.0, 1.0])
    second = alternate(W, keep_40, 1, 2, lambda residual: next(descending))
    assert torch.equal(kept.S, second.S)
    assert torch.equal(kept.plane.U, second.plane.U)
    assert not torch.equal(kept.plane.U, first.plane.U)


def test_a_signed_outer_product_is_found_exactly():
    u, v = torch.rand(12, 1).double() + 0.1, torch.rand(1, 20).double() + 0.1
    W = u @ v * signs(torch.randn(12, 20, generator=torch.Generator().manual_seed(0)).double())
    S, plane = alternate(W, lambda magnitudes: magnitudes < 0, 1, 1, lambda residual: 0.0)
    assert not S.any()
    torch.testing.assert_close(plane.dense(), W)


@pytest.mark.parametrize(("nnz", "pattern"), [(100, None), (0, None), (12 * 10, NM(2, 4)), (12 * 5, NM(1, 4))])
def test_sweep_equals_its_twin(nnz, pattern):
    W, norm, plane = problem()
    assert norm.inputs is not None
    R = obs_factor(torch.linalg.cholesky(norm.inputs.matrix.flip(0, 1)))
    # Factors of mixed signs: only the magnitude of their product is given, its sign is part of B.
    mixed = SignPlane(plane.U, plane.V * signs(torch.arange(20.0) - 7.5), plane.B)
    S, found = sign_sweep(W, R, mixed, nnz, pattern, column_block=8)
    expected, B = slab.sweep(W, norm.inputs.matrix, plane.U @ plane.V, nnz, pattern, column_block=8)
    torch.testing.assert_close(S, expected)
    torch.testing.assert_close(found.dense(), plane.U @ plane.V * B)
    assert int(S.count_nonzero()) == nnz


def test_a_sweep_without_magnitudes_is_pruning():
    W, norm, plane = problem()
    assert norm.inputs is not None
    R = obs_factor(torch.linalg.cholesky(norm.inputs.matrix.flip(0, 1)))
    empty = SignPlane(plane.U[:, :0], plane.V[:0], plane.B)
    S, found = sign_sweep(W, R, empty, 100, column_block=8)
    torch.testing.assert_close(S, obs_prune(W, R, 100, column_block=8, layer_wide=True))
    assert not found.dense().any()


def test_a_sweep_feeds_its_error_forward():
    W, norm, plane = problem()
    assert norm.inputs is not None
    R = obs_factor(torch.linalg.cholesky(norm.inputs.matrix.flip(0, 1)))
    inputs = Norm(norm.inputs)
    S, found = sign_sweep(W, R, plane, 60)
    assert squared(inputs, W - S - found.dense()) < 0.7 * squared(inputs, W - plane.dense())


@pytest.mark.parametrize("weighted", [False, True])
def test_fitted_factors_are_stationary(weighted):
    Y, norm, plane = problem()
    norm = norm if weighted else Norm(norm.inputs)
    once = fit_factors(Y, plane, norm)
    assert squared(norm, Y - once.dense()) < squared(norm, Y - plane.dense())
    # v is exact for u; u, exact for the v before, settles.
    gradient = (norm.times(Y - once.dense()) * once.B * once.U).sum(0)
    assert float(gradient.abs().max()) < 1e-9 * float((norm.times(Y) * once.B * once.U).sum(0).abs().max())
    fitted = once
    for _ in range(200):
        fitted = fit_factors(Y, fitted, norm)
    gradient = (norm.times(Y - fitted.dense()) * fitted.B * fitted.V).sum(1)
    assert float(gradient.abs().max()) < 1e-6 * float((norm.times(Y) * fitted.B * fitted.V).sum(1).abs().max())


@pytest.mark.parametrize("weighted", [False, True])
def test_pairs_are_fitted_one_after_another(weighted):
    Y, norm, plane = problem()
    norm = norm if weighted else Norm(norm.inputs)
    generator = torch.Generator().manual_seed(1)
    extra = torch.rand(12, 2, generator=generator).double(), torch.rand(2, 20, generator=generator).double()
    fitted = SignPlane(torch.cat([plane.U, extra[0]], 1), torch.cat([plane.V, extra[1]]), plane.B)
    alone = squared(norm, Y - fit_factors(Y, plane, norm).dense())
    errors = [squared(norm, Y - fitted.dense())]
    for _ in range(5):
        fitted = fit_factors(Y, fitted, norm)
        errors.append(squared(norm, Y - fitted.dense()))
    assert all(after < before for before, after in pairwise(errors))
    assert errors[-1] < alone


@pytest.mark.parametrize("weighted", [False, True])
def test_nothing_to_fit_leaves_nothing(weighted):
    Y, norm, plane = problem()
    norm = norm if weighted else Norm(norm.inputs)
    assert not fit_factors(torch.zeros_like(Y), plane, norm).dense().any()
    Z = torch.zeros_like(Y)
    assert not fit_factors(Y, SignPlane(Z[:, :1], Z[:1], plane.B), norm).dense().any()
