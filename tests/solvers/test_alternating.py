from __future__ import annotations

import torch

from globalopt.kernels.low_rank import leading_subspace
from globalopt.kernels.norm import Norm, Side
from globalopt.kernels.projection import keep_weights
from solvers._alternating import Alternating, TrackedSubspace
from tests.synthetic import layer


def test_keeps_the_best_round_and_refits_it_exactly():
    W, gram = layer(12, 20, 300)
    G = gram.damped(0.01).matrix
    norm = Norm(Side(G, torch.linalg.cholesky(G)))
    rounds = []

    def worsening(residual, previous):
        rounds.append(W * keep_weights(W.abs(), 100 - 20 * len(rounds)))
        return rounds[-1]

    fit = Alternating(worsening, TrackedSubspace(norm, 3), norm, steps=4, tolerance=0.0).run(W)
    assert torch.equal(fit.S, rounds[0])
    best = leading_subspace(W - fit.S, norm.times(W - fit.S), norm, 3)
    torch.testing.assert_close(fit.U @ fit.V, best.U @ best.factor(W - fit.S))
    assert (fit.steps, fit.settled) == (4, False)


def test_stops_when_the_error_settles():
    W, _ = layer(12, 20, 300)
    fixed = W * keep_weights(W.abs(), 100)
    plain = Norm(None)
    fit = Alternating(lambda residual, previous: fixed, TrackedSubspace(plain, 2), plain, steps=50, tolerance=1e-3).run(
        W
    )
    assert fit.settled
    assert fit.steps < 50
