from __future__ import annotations

import pytest
import torch

from globalopt.protocols import Outputs, Solver
from globalopt.values.budget import Target
from globalopt.values.layer import NM
from globalopt.values.metric import Gram, Metric
from solvers.eora import EoRA, Pruning
from solvers.hassle_free import HassleFree
from solvers.magnitude import Magnitude
from solvers.sparsegpt import SparseGPT
from solvers.wanda import Wanda
from tests.synthetic import metric

D_OUT, D_IN = 24, 40
PUBLISHED: dict[Pruning, Solver] = {
    Pruning.MAGNITUDE: Magnitude(),
    Pruning.WANDA: Wanda(),
    Pruning.SPARSEGPT: SparseGPT(),
}


def fit(solver: Solver, W, norm, target):
    return solver.solve(solver.prepare(W, norm), target)


@pytest.mark.parametrize("sparse_step", Pruning)
@pytest.mark.parametrize("pattern", [None, NM(2, 4)])
def test_the_sparse_part_is_the_published_pruning(sparse_step, pattern):
    W, norm = metric(D_OUT, D_IN, 300)
    nnz = 300 if pattern is None else D_OUT * D_IN // 2
    pruned = fit(PUBLISHED[sparse_step], W, norm, Target(0, nnz, pattern)).value.S
    value = fit(EoRA(sparse_step), W, norm, Target(3, nnz, pattern)).value
    torch.testing.assert_close(value.S, pruned)
    assert value.nnz == nnz


@pytest.mark.parametrize("sparse_step", Pruning)
@pytest.mark.parametrize("outputs", Outputs)
def test_the_low_rank_part_is_the_optimum_for_it(sparse_step, outputs):
    W, norm = metric(D_OUT, D_IN, 300)
    A = metric(D_IN, D_OUT, 200, seed=1)[1].inputs.matrix
    if outputs is Outputs.NONE:
        weighting = torch.eye(D_OUT)
    elif outputs is Outputs.ROWS:
        weighting = A.diagonal().diag()
    else:
        weighting = A
    solver = EoRA(sparse_step, damping=0, output_damping=0, outputs=outputs)
    value = fit(solver, W, Metric(norm.inputs, Gram(A, 200)), Target(5, 300)).value
    C, K = (torch.linalg.cholesky(matrix.double()) for matrix in (norm.inputs.matrix, weighting))
    tail = torch.linalg.svdvals(K.mT @ (W - value.S).double() @ C)[5:].square().sum()
    reached = Metric(norm.inputs, Gram(weighting, 200)).error(W - value.dense())
    # Rows are weighted with a little of their mean added.
    assert reached == pytest.approx(float(tail), rel=2e-3)


def test_stands_between_pruning_and_alternation():
    W, norm = metric(D_OUT, D_IN, 300)
    errors = [fit(EoRA(), W, norm, Target(rank, 300)).error for rank in (0, 2, 5)]
    assert errors[0] == pytest.approx(fit(SparseGPT(), W, norm, Target(0, 300)).error, rel=1e-4)
    assert errors[0] > errors[1] > errors[2] > fit(HassleFree(), W, norm, Target(5, 300)).error


@pytest.mark.parametrize("sparse_step", Pruning)
def test_no_pruning_keeps_dead_inputs(sparse_step):
    W, norm = metric(D_OUT, D_IN, 300)
    dead = torch.arange(D_IN) % 4 == 0
    G = norm.inputs.matrix.masked_fill(dead | dead[:, None], 0.0)
    value = fit(EoRA(sparse_step), W.masked_fill(dead, 100.0), Metric(Gram(G, 300)), Target(3, 300)).value
    assert not value.S[:, dead].any()
    assert not value.V[:, dead].any()
    assert value.nnz == 300
