from __future__ import annotations

import pytest
import torch

from globalopt.errors import UsageError
from globalopt.protocols import Outputs
from globalopt.values.budget import Target
from globalopt.values.decomposition import Decomposition, Status
from globalopt.values.metric import Gram, Metric
from solvers.svd import SVD
from tests.synthetic import metric


def fit(solver: SVD, W, norm, target):
    return solver.solve(solver.prepare(W, norm), target)


def both_sides(d_out: int, d_in: int) -> tuple[torch.Tensor, Metric]:
    W, norm = metric(d_out, d_in, 300)
    _, outputs = metric(d_in, d_out, 200, seed=1)
    return W, Metric(norm.inputs, outputs.inputs)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_error_is_the_tail_of_the_whitened_spectrum(shape):
    W, norm = both_sides(*shape)
    assert norm.outputs is not None
    C = torch.linalg.cholesky(norm.inputs.matrix.double())
    K = torch.linalg.cholesky(norm.outputs.matrix.double())
    plain, full = (torch.linalg.svdvals(T).square() for T in (W.double() @ C, K.mT @ W.double() @ C))
    inputs = Metric(norm.inputs)
    for rank in (0, 1, 5, 23):
        solution = fit(SVD(damping=0, outputs=Outputs.NONE), W, inputs, Target(rank, 0))
        assert solution.error == pytest.approx(float(plain[rank:].sum()), rel=1e-3)
        solution = fit(SVD(damping=0, output_damping=0), W, norm, Target(rank, 0))
        assert solution.error == pytest.approx(float(full[rank:].sum()), rel=1e-3)
        assert solution.value.rank == rank
        assert solution.value.nnz == 0


def test_outputs_say_in_which_error_it_is_the_best():
    W, norm = both_sides(24, 40)
    found = {outputs: fit(SVD(outputs=outputs), W, norm, Target(5, 0)) for outputs in Outputs}
    assert found[Outputs.FULL].error < found[Outputs.ROWS].error < found[Outputs.NONE].error
    plain = {outputs: Metric(norm.inputs).error(W - found[outputs].value.dense()) for outputs in Outputs}
    assert plain[Outputs.NONE] < min(plain[Outputs.ROWS], plain[Outputs.FULL])


def test_damping_carries_fewer_tokens_than_inputs():
    W, norm = metric(24, 40, 8)
    solution = fit(SVD(), W, norm, Target(8, 0))
    assert solution.status is Status.CONVERGED
    # Eight directions of inputs are all there is to reproduce.
    assert solution.error <= 1e-4 * norm.error(W)
    assert fit(SVD(damping=0), W, norm, Target(8, 0)).status is Status.FALLBACK


def test_all_or_no_nonzeros():
    W, norm = metric(24, 40, 300)
    assert fit(SVD(), W, norm, Target(3, W.numel())).error == 0
    with pytest.raises(UsageError, match=r"'svd' fits no sparse part.*200 nonzeros.*3 more"):
        fit(SVD(), W, norm, Target(3, 200))


def test_a_better_start_is_kept():
    W, norm = both_sides(24, 40)
    best = fit(SVD(), W, norm, Target(4, 0)).value
    plain = SVD(outputs=Outputs.NONE)
    solution = plain.solve(plain.prepare(W, norm), Target(4, 0), Decomposition(best.S, best.U, best.V))
    assert solution.value.U is best.U


def test_dead_inputs_have_no_share():
    W, norm = metric(24, 40, 300)
    dead = torch.arange(40) % 5 == 0
    G = norm.inputs.matrix.masked_fill(dead | dead[:, None], 0.0)
    solution = fit(SVD(), W.masked_fill(dead, 100.0), Metric(Gram(G, 300)), Target(4, 0))
    assert not solution.value.V[:, dead].any()
