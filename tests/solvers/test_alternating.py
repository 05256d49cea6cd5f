from __future__ import annotations

import pytest
import torch

from globalopt.kernels.low_rank import leading_subspace
from globalopt.kernels.norm import Norm, Side
from globalopt.kernels.projection import keep_weights
from solvers._alternating import Alternating, TrackedSubspace
from tests.kernels.norms import best_low_rank, problem, squared
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


@pytest.mark.parametrize("first", [False, True], ids=["S first", "L first"])
def test_momentum_carries_the_low_rank_part_on(first):
    """Rounds written out, with a low-rank step that is exact."""
    W, norm = problem((12, 20), False)

    def largest(residual, previous):
        return residual * keep_weights(residual.abs(), 60)

    def exact(M, N, previous):
        return leading_subspace(M, N, norm, 3)

    L = before = best_low_rank(W, norm, 3) if first else torch.zeros_like(W)
    errors = []
    for _ in range(5):
        S = largest(W - L - 0.6 * (L - before), None)
        before, L = L, best_low_rank(W - S, norm, 3)
        errors.append(squared(norm, W - S - L))
    fit = Alternating(largest, exact, norm, 5, 0.0, momentum=0.6, low_rank_first=first).run(W)
    assert [error for _, error in fit.trace[1:]] == pytest.approx(errors, rel=1e-4)


def test_momentum_ends_sooner_and_lower():
    plain, errors, steps = Norm(None), {}, {}
    for momentum in (0.0, 0.9):
        errors[momentum] = steps[momentum] = 0
        for seed in range(4):
            W, _ = layer(48, 64, 300, seed)

            def largest(residual, previous):
                return residual * keep_weights(residual.abs(), 800)

            fit = Alternating(largest, TrackedSubspace(plain, 6), plain, 300, 1e-5, momentum).run(W)
            errors[momentum] += squared(plain, W - fit.S - fit.U @ fit.V) / squared(plain, W)
            steps[momentum] += fit.steps
    assert errors[0.9] < 0.98 * errors[0.0]
    assert steps[0.9] < 0.7 * steps[0.0]
