"""Our efficient forms against slow transcriptions of what was published, on synthetic layers."""

from __future__ import annotations

import pytest
import torch

from globalopt.values.budget import Target
from globalopt.values.layer import NM
from solvers import get_solver
from solvers.hassle_free import HassleFree, SparseStep
from solvers.oats import OATS
from solvers.sparsegpt import SparseGPT
from solvers.three_basil import ThreeBASiL
from solvers.wanda import Wanda
from tests.reference import alps, hassle_free, oats, sparsegpt, three_basil
from tests.synthetic import metric

NNZ = 48 * 20  # of 48 x 64


@pytest.mark.parametrize("seed", [0, 1])
def test_three_basil_reaches_the_published_loop(seed):
    W, norm = metric(48, 64, 400, seed)
    solver = ThreeBASiL()
    solution = solver.solve(solver.prepare(W, norm), Target(4, NNZ))
    S, L = three_basil.fit(W, norm.inputs.matrix, 4, NNZ)
    assert solution.error <= 1.03 * norm.error(W - S.float() - L.float())


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("pattern", [None, NM(2, 4)])
def test_alps_reaches_the_published_loop(seed, pattern):
    W, norm = metric(48, 64, 400, seed)
    nnz = NNZ if pattern is None else W.numel() // 2
    solver = get_solver("alps")
    solution = solver.solve(solver.prepare(W, norm), Target(0, nnz, pattern))
    S = alps.fit(W, norm.inputs.matrix, nnz, pattern)
    assert solution.error <= 1.01 * norm.error((W - S).float())


@pytest.mark.parametrize("sparse_step", SparseStep)
def test_hassle_free_reaches_the_published_loop(sparse_step):
    W, norm = metric(48, 64, 400)
    solver = HassleFree(sparse_step)
    solution = solver.solve(solver.prepare(W, norm), Target(6, NNZ))
    S, L = hassle_free.fit(W, norm.inputs.matrix, 6, NNZ, sparse_step=sparse_step, rounds=20)
    assert solution.error <= 1.03 * norm.error((W - S - L).float())


@pytest.mark.parametrize("seed", [0, 1])
def test_oats_reaches_the_published_loop(seed):
    W, norm = metric(48, 64, 400, seed)
    solver = OATS()
    solution = solver.solve(solver.prepare(W, norm), Target(4, NNZ))
    S, L = oats.fit(W, norm.inputs.matrix, 4, 20)
    D = norm.inputs.norms.double()
    value = solution.value

    def diagonal_error(residual):
        return float((residual * D).square().sum())

    assert diagonal_error(W - value.dense()) <= 1.03 * diagonal_error(W - S - L)


def test_sparsegpt_equals_the_published_sweep():
    W, norm = metric(48, 64, 400)
    solver = SparseGPT(column_block=16)
    solution = solver.solve(solver.prepare(W, norm), Target(0, NNZ))
    expected = sparsegpt.prune(W, norm.inputs.damped(0.01).matrix, NNZ, column_block=16)
    torch.testing.assert_close(solution.value.S, expected.float(), rtol=1e-3, atol=1e-4)


def test_wanda_keeps_weights_by_score_within_a_row():
    W, norm = metric(48, 64, 400)
    S = Wanda().solve(Wanda().prepare(W, norm), Target(0, NNZ)).value.S
    for row, kept in zip(W, S, strict=True):
        best = (row.abs() * norm.inputs.norms).argsort(descending=True)[:20]
        expected = torch.zeros_like(row)
        expected[best] = row[best]
        assert torch.equal(kept, expected)
