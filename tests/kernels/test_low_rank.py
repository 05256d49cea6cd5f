from __future__ import annotations

import pytest
import torch

from globalopt.kernels.low_rank import leading_subspace, subspace_step
from tests.synthetic import layer


def whitened_svd(M, G, rank):
    C = torch.linalg.cholesky(G)
    U, s, Vh = torch.linalg.svd(M @ C, full_matrices=False)
    return torch.linalg.solve_triangular(C, (U[:, :rank] * s[:rank]) @ Vh[:rank], upper=False, left=False)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
@pytest.mark.parametrize("rank", [0, 1, 5, 12])
def test_projection_on_the_leading_subspace_is_the_whitened_svd(shape, rank):
    M, gram = layer(*shape, tokens=200)
    M, G = M.double(), gram.matrix.double()
    U = leading_subspace(M, M @ G, torch.linalg.cholesky(G), rank)
    torch.testing.assert_close(U.mT @ U, torch.eye(rank).double())
    torch.testing.assert_close(U @ (U.mT @ M), whitened_svd(M, G, rank))


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_rank_beyond_the_matrix_stays_orthonormal(shape):
    M = torch.outer(torch.arange(shape[0]) + 1.0, torch.ones(shape[1]))
    U = leading_subspace(M, M, None, 4)
    torch.testing.assert_close(U.mT @ U, torch.eye(4))
    torch.testing.assert_close(U @ (U.mT @ M), M)


def test_subspace_steps_reach_the_optimum():
    M, gram = layer(20, 12, tokens=200)
    M, G = M.double(), gram.matrix.double()
    U = torch.linalg.qr(torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).double()).Q
    for _ in range(200):
        U = subspace_step(M, M @ G, U)
    torch.testing.assert_close(U @ (U.mT @ M), whitened_svd(M, G, 3))
