from __future__ import annotations

import torch

from globalopt.kernels.projection import keep_weights
from globalopt.kernels.ridge_admm import ridge_admm


def unit_gram(d: int) -> torch.Tensor:
    mixing = torch.randn(200, d, generator=torch.Generator().manual_seed(1))
    mixing[:, 1:] += 0.7 * mixing[:, :-1]
    G = mixing.mT @ mixing / 200
    scale = G.diagonal().sqrt()
    return G / scale / scale[:, None]


def test_white_inputs_and_rank_zero_keep_nearly_the_largest_weights():
    W = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    fit = ridge_admm(W, torch.eye(10), torch.eye(10), 0, lambda scores: keep_weights(scores, 20))
    best = W.masked_fill(~keep_weights(W.abs(), 20), 0.0)
    assert fit.settled
    assert float((W - fit.S).norm()) <= 1.02 * float((W - best).norm())


def test_a_frozen_support_lowers_the_penalty():
    W = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    G = unit_gram(20)
    frozen = ridge_admm(W, G, torch.linalg.cholesky(G), 0, lambda scores: keep_weights(scores, 80), penalty=1e4)
    assert frozen.settled
    assert frozen.penalty < 10
    magnitude = W * keep_weights(W.abs(), 80)

    def error(S):
        return float((((W - S) @ G) * (W - S)).sum())

    assert error(frozen.S) < 0.9 * error(magnitude)


def test_recovers_a_sparse_plus_low_rank_matrix():
    generator = torch.Generator().manual_seed(0)
    L = torch.randn(30, 2, generator=generator) @ torch.randn(2, 40, generator=generator)
    S = torch.zeros(1200)
    S[torch.randperm(1200, generator=generator)[:60]] = 10.0
    W = L + S.view(30, 40)
    G = unit_gram(40)
    fit = ridge_admm(W, G, torch.linalg.cholesky(G), 2, lambda scores: keep_weights(scores, 60))
    assert torch.equal(fit.S != 0, S.view(30, 40) != 0)
    # The iteration ends when the support does; its values are then near, not at, their optimum.
    assert float((W - fit.S - fit.U @ fit.V).norm() / W.norm()) < 0.03


def test_step_limit_is_not_settled():
    W = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    fit = ridge_admm(W, torch.eye(10), torch.eye(10), 1, lambda scores: keep_weights(scores, 20), max_steps=7)
    assert (fit.steps, fit.settled) == (7, False)
