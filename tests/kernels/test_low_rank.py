from __future__ import annotations

import pytest
import torch

from globalopt.kernels import low_rank
from globalopt.kernels.low_rank import Subspace, leading_subspace, subspace_step
from globalopt.kernels.norm import Norm, Side
from tests.kernels.norms import best_low_rank, matrices, problem

SHAPES = [(12, 20), (20, 12)]


def assert_orthonormal(subspace, norm):
    """`Uᵀ A U = I`, and `AU` is the product it says it is."""
    A, _ = matrices(norm, (len(subspace.U), 1))
    U, AU = subspace.U.double(), subspace.AU.double()
    torch.testing.assert_close(AU, A @ U, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(U.mT @ AU, torch.eye(subspace.rank).double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [False, True], ids=["G", "A,G"])
@pytest.mark.parametrize("rank", [0, 1, 5, 12])
def test_leading_subspace_is_the_best_of_its_rank(shape, weighted, rank):
    M, norm = problem(shape, weighted)
    subspace = leading_subspace(M, norm.times(M), norm, rank)
    assert subspace.rank == rank
    assert_orthonormal(subspace, norm)
    torch.testing.assert_close(subspace.U @ subspace.factor(M), best_low_rank(M, norm, rank))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [False, True], ids=["I", "A"])
def test_without_an_input_gram(shape, weighted):
    M, norm = problem(shape, weighted)
    norm = Norm(None, norm.outputs)
    subspace = leading_subspace(M, norm.times(M), norm, 3)
    torch.testing.assert_close(subspace.U @ subspace.factor(M), best_low_rank(M, norm, 3))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [False, True], ids=["G", "A,G"])
def test_single_precision_finds_the_same_subspace(shape, weighted):
    M, norm = problem(shape, weighted)
    sides = [s and Side(s.matrix.float(), s.factor.float()) for s in (norm.inputs, norm.outputs)]
    single = Norm(*sides)
    subspace = leading_subspace(M.float(), single.times(M.float()), single, 4)
    assert subspace.U.dtype == subspace.AU.dtype == torch.float32
    assert_orthonormal(subspace, norm)
    found = subspace.U.double() @ subspace.factor(M.float()).double()
    torch.testing.assert_close(found, best_low_rank(M, norm, 4), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [False, True], ids=["G", "A,G"])
def test_rank_beyond_the_matrix_stays_orthonormal(shape, weighted):
    _, norm = problem(shape, weighted)
    M = torch.outer(torch.arange(shape[0]) + 1.0, torch.ones(shape[1])).double()
    subspace = leading_subspace(M, norm.times(M), norm, 4)
    assert_orthonormal(subspace, norm)
    torch.testing.assert_close(subspace.U @ subspace.factor(M), M)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [False, True], ids=["G", "A,G"])
def test_subspace_steps_reach_the_optimum(shape, weighted, monkeypatch):
    M, norm = problem(shape, weighted)
    A, _ = matrices(norm, M.shape)
    U = torch.randn(shape[0], 3, generator=torch.Generator().manual_seed(0)).double()
    subspace = Subspace(U, A @ U)
    # The exact subspace is no part of a step: a step that took it would converge at once.
    monkeypatch.setattr(low_rank, "leading_subspace", None)
    for _ in range(200):
        subspace = subspace_step(M, norm.times(M), norm, subspace)
    assert_orthonormal(subspace, norm)
    torch.testing.assert_close(subspace.U @ subspace.factor(M), best_low_rank(M, norm, 3))


@pytest.mark.parametrize("weighted", [False, True], ids=["G", "A,G"])
def test_one_subspace_step_spans_the_product(weighted):
    M, norm = problem((12, 20), weighted)
    A, G = matrices(norm, M.shape)
    U = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)).double()
    subspace = subspace_step(M, norm.times(M), norm, Subspace(U, A @ U))
    assert_orthonormal(subspace, norm)
    Y = M @ G @ M.mT @ A @ U
    torch.testing.assert_close(subspace.U @ subspace.AU.mT @ Y, Y)


@pytest.mark.parametrize("weighted", [False, True], ids=["G", "A,G"])
def test_a_step_completes_directions_that_vanish(weighted):
    _, norm = problem((12, 20), weighted)
    M = torch.outer(torch.arange(12) + 1.0, torch.ones(20)).double()
    start = leading_subspace(M, norm.times(M), norm, 4)
    for matrix in (M, torch.zeros_like(M)):
        subspace = subspace_step(matrix, norm.times(matrix), norm, start)
        assert_orthonormal(subspace, norm)
        torch.testing.assert_close(subspace.U @ subspace.factor(matrix), matrix)


@pytest.mark.parametrize("weighted", [False, True], ids=["G", "A,G"])
def test_factor_is_the_least_squares_fit_in_a_subspace(weighted):
    M, norm = problem((12, 20), weighted)
    other, _ = problem((12, 20), False, seed=1)
    subspace = leading_subspace(other, norm.times(other), norm, 3)
    A, _ = matrices(norm, M.shape)
    U = subspace.U
    torch.testing.assert_close(subspace.factor(M), torch.linalg.solve(U.mT @ A @ U, U.mT @ A @ M))
