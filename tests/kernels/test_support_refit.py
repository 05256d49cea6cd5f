from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from globalopt.kernels.low_rank import Subspace, leading_subspace
from globalopt.kernels.projection import keep_weights
from globalopt.kernels.support_refit import fit_support, refit
from tests.kernels.norms import best_low_rank, matrices, problem, squared

BOTH = pytest.mark.parametrize("weighted", [False, True], ids=["G", "A,G"])


def started(weighted, shape=(8, 14), nnz=50):
    """A target, a norm, and the largest entries of the target, off by a little."""
    target, norm = problem(shape, weighted)
    return target, norm, 0.8 * target * keep_weights(target.abs(), nnz)


def exact(target, support, norm):
    """The least squares on `support`: one dense system of its entries."""
    A, G = matrices(norm, target.shape)
    free = support.flatten()
    gradient = (A @ target @ G).flatten()[free]
    values = torch.zeros_like(target).flatten()
    values[free] = torch.linalg.solve(torch.kron(A, G)[free][:, free], gradient)
    return values.view_as(target)


@BOTH
def test_reaches_the_optimum_on_the_support(weighted):
    target, norm, S = started(weighted)
    before = S.clone()
    fitted = fit_support(target, S, norm, 120)
    torch.testing.assert_close(fitted, exact(target, S != 0, norm), rtol=1e-6, atol=1e-8)
    assert torch.equal(S, before)


def test_rows_without_outputs_are_systems_of_their_own():
    target, norm, S = started(False)
    # No row has more than 14 entries: conjugate gradients end after as many steps.
    torch.testing.assert_close(fit_support(target, S, norm, 14), exact(target, S != 0, norm), rtol=1e-6, atol=1e-8)
    alone = torch.cat([fit_support(target[i : i + 1], S[i : i + 1], norm, 3) for i in range(len(S))])
    torch.testing.assert_close(fit_support(target, S, norm, 3), alone)


@BOTH
def test_no_step_raises_the_error_or_leaves_the_support(weighted):
    target, norm, S = started(weighted)
    fits = [fit_support(target, S, norm, steps) for steps in range(12)]
    errors = [squared(norm, target - fitted) for fitted in fits]
    assert torch.equal(fits[0], S)
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(errors))
    assert errors[-1] < 0.99 * errors[0]
    assert not any(fitted[S == 0].any() for fitted in fits)


@BOTH
def test_nothing_to_fit_changes_nothing(weighted):
    target, norm, S = started(weighted)
    best = exact(target, S != 0, norm)
    torch.testing.assert_close(fit_support(target, best, norm, 5), best)
    assert not fit_support(target, torch.zeros_like(S), norm, 5).any()
    assert torch.equal(fit_support(S, S, norm, 5), S)


@BOTH
def test_refit_lowers_the_error_round_by_round(weighted):
    W, norm, S = started(weighted, (16, 24), 120)
    subspace = leading_subspace(W - S, norm.times(W - S), norm, 3)
    errors = []
    for rounds in range(5):
        fitted, followed = refit(W, S, subspace, norm, rounds, 4)
        assert torch.equal(fitted != 0, S != 0)
        assert followed.rank == 3
        errors.append(squared(norm, W - fitted - followed.U @ followed.factor(W - fitted)))
    assert errors[0] == pytest.approx(squared(norm, W - S - subspace.U @ subspace.factor(W - S)))
    assert all(after < before for before, after in pairwise(errors))


@BOTH
def test_refit_settles_where_both_parts_are_optimal(weighted):
    W, norm, S = started(weighted, (16, 24), 120)
    subspace = leading_subspace(W - S, norm.times(W - S), norm, 2)

    def gradient(rounds):
        fitted, followed = refit(W, S, subspace, norm, rounds, 20)
        L = followed.U @ followed.factor(W - fitted)
        torch.testing.assert_close(L, best_low_rank(W - fitted, norm, 2), rtol=0, atol=1e-3)
        return float(norm.times(W - fitted - L)[S != 0].abs().max())

    assert gradient(100) < 0.01 * gradient(0)


@BOTH
def test_refit_without_a_low_rank_part(weighted):
    W, norm, S = started(weighted)
    empty = W[:, :0]
    fitted, subspace = refit(W, S, Subspace(empty, empty), norm, 2, 3)
    assert subspace.rank == 0
    once = fit_support(W, S, norm, 3)
    torch.testing.assert_close(fitted, fit_support(W, once, norm, 3))
