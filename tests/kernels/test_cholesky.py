from __future__ import annotations

import pytest
import torch

from globalopt.errors import NumericalError
from globalopt.kernels.cholesky import damped_cholesky, obs_factor, ridge_inverse
from tests.synthetic import layer


def test_factor_of_the_damped_gram():
    G = layer(4, 24, 200)[1].matrix
    damped = damped_cholesky(G, 0.02, 0.1)
    expected = G + torch.diag(0.02 * G.diagonal().mean() + 0.1 * G.diagonal())
    torch.testing.assert_close(damped.matrix, expected)
    torch.testing.assert_close(damped.factor @ damped.factor.mT, expected)
    assert damped.damping == 0.02


def test_singular_gram_climbs_the_ladder_and_says_so():
    G = layer(4, 24, 5)[1].matrix
    before = G.clone()
    damped = damped_cholesky(G, 0.0)
    assert 0 < damped.damping < 1e-2
    assert torch.equal(G, before)
    assert torch.isfinite(torch.linalg.inv(damped.factor)).all()


def test_no_rung_holds():
    with pytest.raises(NumericalError, match="more tokens"):
        damped_cholesky(torch.tensor([[1.0, 9.0], [9.0, 1.0]]), 0.01)


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_a_zero_gram_is_replaced_by_the_identity(damping):
    damped = damped_cholesky(torch.zeros(3, 3), damping, damping)
    assert torch.equal(damped.matrix, torch.eye(3))
    assert torch.equal(damped.factor, torch.eye(3))
    assert damped.damping == damping


def test_ridge_inverse():
    G = layer(4, 24, 200)[1].matrix.double()
    torch.testing.assert_close(ridge_inverse(G, 0.3) @ (G + 0.3 * torch.eye(24)), torch.eye(24).double())


def test_obs_factor_holds_the_inverses_of_what_is_left():
    G = layer(4, 12, 200)[1].matrix.double()
    R = obs_factor(torch.linalg.cholesky(G.flip(0, 1)))
    torch.testing.assert_close(R.mT @ R, torch.linalg.inv(G))
    for j in range(12):
        left = torch.linalg.inv(G[j:, j:])
        torch.testing.assert_close(R[j, j] * R[j, j:], left[0])
