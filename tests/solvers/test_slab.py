from __future__ import annotations

import pytest
import torch

from globalopt.errors import UsageError
from globalopt.protocols import Outputs
from globalopt.values.budget import Target
from globalopt.values.decomposition import Status
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.metric import Gram, Metric
from solvers.slab import SLaB
from solvers.three_basil import ThreeBASiL
from tests.reference import slab
from tests.synthetic import metric

D_OUT, D_IN, PER_ROW = 48, 64, 20
TARGET = Target(1, D_OUT * PER_ROW, signs=True)
PUBLISHED = SLaB(refit=0, search=0)


def fit(solver, W, norm, target=TARGET):
    return solver.solve(solver.prepare(W, norm), target)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("pattern", [None, NM(2, 4)])
def test_published_rounds_reach_the_published_loop(seed, pattern):
    W, norm = metric(D_OUT, D_IN, 400, seed)
    target = TARGET if pattern is None else Target(1, D_OUT * D_IN // 2, pattern, signs=True)
    S, L = slab.fit(W, norm.inputs.matrix, 1, PER_ROW, pattern=pattern)
    value = fit(PUBLISHED, W, norm, target).value
    # The norm the rounds are fitted in.
    diagonal = Metric(Gram(norm.inputs.diagonal.diag(), 400))
    assert diagonal.error(W - value.dense()) <= 1.02 * diagonal.error((W - S - L).float())
    assert value.nnz == int(S.count_nonzero())


def test_on_equal_inputs_it_is_the_published_loop():
    W, _ = metric(D_OUT, D_IN, 400)
    norm = Metric(Gram(torch.eye(D_IN), 400))
    S, L = slab.fit(W, norm.inputs.matrix, 1, PER_ROW)
    assert fit(PUBLISHED, W, norm).error == pytest.approx(norm.error((W - S - L).float()), rel=0.01)


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("pattern", [None, NM(2, 4)])
def test_the_whole_gram_halves_the_error_and_a_search_lowers_it_further(rank, pattern):
    W, norm = metric(D_OUT, D_IN, 400)
    target = Target(rank, TARGET.nnz if pattern is None else D_OUT * D_IN // 2, pattern, signs=True)
    stages = PUBLISHED, SLaB(refit=1, search=0), SLaB(refit=6, search=0), SLaB(refit=6)
    published, once, more, searched = (fit(solver, W, norm, target) for solver in stages)
    assert once.error < 0.5 * published.error
    assert more.error <= once.error
    assert searched.error < 0.97 * more.error
    assert searched.value.fits(target)
    assert searched.value.nnz == target.nnz


def test_beats_sparse_plus_low_rank_of_the_same_bytes():
    W, norm = metric(D_OUT, D_IN, 400)
    spec = LayerSpec("layer", 0, "", "", D_OUT, D_IN)
    plain = Target(4, 1024)
    signed = Target(1, 1024 + 3 * (D_OUT + D_IN) - D_OUT * D_IN // 16, signs=True)
    assert signed.bytes(spec) <= plain.bytes(spec)
    assert fit(SLaB(), W, norm, signed).error < fit(ThreeBASiL(), W, norm, plain).error


def test_one_bit_per_weight_alone():
    W, norm = metric(D_OUT, D_IN, 400)
    solution = fit(SLaB(), W, norm, Target(1, 0, signs=True))
    value = solution.value
    assert value.signs is not None
    assert value.nnz == 0
    assert bool((value.signs.abs() == 1).all())
    assert solution.error < 0.5 * norm.error(W)
    assert solution.error == pytest.approx(norm.error(W - (value.U @ value.V) * value.signs))


@pytest.mark.parametrize("rank", [0, 1])
def test_everything_kept_is_exact(rank):
    W, norm = metric(D_OUT, D_IN, 400)
    solution = fit(SLaB(), W, norm, Target(rank, W.numel(), signs=True))
    assert solution.error == 0
    assert solution.value.signs is not None


def test_dead_inputs_cost_nothing():
    W, norm = metric(D_OUT, D_IN, 400)
    dead = torch.arange(D_IN) % 4 == 0
    G = norm.inputs.matrix.masked_fill(dead | dead[:, None], 0.0)
    value = fit(SLaB(), W.masked_fill(dead, 100.0), Metric(Gram(G, 400))).value
    assert not value.S[:, dead].any()
    assert not value.V[:, dead].any()
    assert value.nnz == TARGET.nnz


def test_outputs_are_weighted():
    W, norm = metric(D_OUT, D_IN, 400)
    both = Metric(norm.inputs, metric(D_IN, D_OUT, 400, seed=1)[1].inputs)
    none, rows, full = (fit(SLaB(outputs=outputs), W, both).error for outputs in Outputs)
    assert full < rows < none


def test_a_zero_weight_and_a_better_start():
    W, norm = metric(D_OUT, D_IN, 400)
    assert fit(SLaB(), torch.zeros_like(W), norm).error == 0
    better = fit(SLaB(), W, norm)
    assert PUBLISHED.solve(PUBLISHED.prepare(W, norm), TARGET, better.value).value is better.value
    assert fit(PUBLISHED, W, norm).status is Status.CONVERGED
    assert fit(SLaB(refit=1), W, norm).status is Status.MAX_STEPS


def test_a_target_needs_signs():
    W, norm = metric(D_OUT, D_IN, 400)
    with pytest.raises(UsageError, match="set signs in the target"):
        fit(SLaB(), W, norm, Target(1, 100))
