from __future__ import annotations

import pytest
import torch

from globalopt.kernels.norm import Norm, ridge
from tests.kernels.norms import correlated, matrices, problem, side, squared


def kronecker_solve(A, G, penalty, R):
    """`S` of `A S G + penalty S = R` from one dense system of all entries."""
    system = torch.kron(A, G) + penalty * torch.eye(R.numel()).double()
    return torch.linalg.solve(system, R.flatten()).view_as(R)


@pytest.mark.parametrize("penalty", [1e-3, 0.4, 50.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_ridge_solves_its_system(weighted, penalty):
    R, norm = problem((5, 8), weighted)
    assert norm.inputs is not None
    A, G = matrices(norm, R.shape)
    before = R.clone()
    torch.testing.assert_close(
        ridge(norm.inputs, [(slice(0, 5), norm.outputs)], penalty)(R), kronecker_solve(A, G, penalty, R)
    )
    assert torch.equal(R, before)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_rough_solution_is_off_by_a_share_of_the_change(weighted):
    R, norm = problem((40, 60), weighted)
    assert norm.inputs is not None
    solve = ridge(norm.inputs, [(slice(0, 40), norm.outputs)], 0.4)
    change = R.float() * 1e-3
    exact = solve(change.double())
    assert torch.linalg.norm(solve.rough(change) - exact) < 0.01 * torch.linalg.norm(exact)


def test_stacked_layers_have_their_own_outputs():
    R, norm = problem((12, 8), False)
    assert norm.inputs is not None
    upper, lower = correlated(4, seed=1), correlated(5, seed=2)
    outputs = [(slice(0, 4), side(upper)), (slice(4, 7), None), (slice(7, 12), side(lower))]
    solved, G = ridge(norm.inputs, outputs, 0.3)(R), norm.inputs.matrix
    torch.testing.assert_close(solved[:4], kronecker_solve(upper, G, 0.3, R[:4]))
    torch.testing.assert_close(solved[4:7], kronecker_solve(torch.eye(3).double(), G, 0.3, R[4:7]))
    torch.testing.assert_close(solved[7:], kronecker_solve(lower, G, 0.3, R[7:]))


@pytest.mark.parametrize("weighted", [False, True])
def test_times_is_the_gradient_of_half_the_square(weighted):
    E, norm = problem((5, 8), weighted)
    A, G = matrices(norm, E.shape)
    torch.testing.assert_close(norm.times(E), A @ E @ G)
    assert float((norm.times(E) * E).sum()) == pytest.approx(squared(norm, E))
    assert torch.equal(Norm(None).times(E), E)


def test_figures_of_a_side():
    matrix = correlated(6)
    values, vectors = side(matrix).eigen
    torch.testing.assert_close(vectors * values @ vectors.mT, matrix)
    # The product of the eigenvalues is the determinant.
    assert side(matrix).geometric_mean == pytest.approx(float(torch.linalg.det(matrix)) ** (1 / 6))
    assert Norm(side(matrix)).factor is not None
    assert Norm(None, side(matrix)).factor is None


def test_a_side_in_another_order_is_that_of_the_reordered_matrix():
    matrix, order = correlated(6), torch.tensor([3, 0, 5, 1, 4, 2])
    origin = side(matrix)
    found = origin.reordered(order)
    torch.testing.assert_close(found.matrix, matrix[order][:, order])
    torch.testing.assert_close(found.factor @ found.factor.mT, found.matrix)
    values, vectors = found.eigen
    torch.testing.assert_close(vectors * values @ vectors.mT, found.matrix)
    assert found.geometric_mean == origin.geometric_mean
    assert values is origin.eigen[0]


def test_an_inverse_is_kept_for_the_next_target_while_there_is_room(monkeypatch):
    _, made = problem((5, 8), False)
    assert made.inputs is not None
    G = made.inputs.matrix
    first = made.inputs.inverse(0.3)
    torch.testing.assert_close(first @ (G + 0.3 * torch.eye(8).double()), torch.eye(8).double())
    assert made.inputs.inverse(0.3) is first
    monkeypatch.setattr("globalopt.kernels.norm.INVERSES", first.nbytes)
    other = made.inputs.inverse(0.5)
    assert made.inputs.inverse(0.5) is not other
    assert torch.equal(made.inputs.inverse(0.5), other)
    assert made.inputs.inverse(0.3) is first
