from __future__ import annotations

from itertools import pairwise

import torch

from globalopt.values.budget import Target
from globalopt.values.layer import NM
from solvers import hassle_free
from solvers.hassle_free import HassleFree, SparseStep
from tests.synthetic import metric


def fit(solver, W, norm, target):
    return solver.solve(solver.prepare(W, norm), target)


def test_alps_starts_from_the_support_of_the_round_before(monkeypatch):
    rounds = []

    class Recording(hassle_free.AdmmSearch):
        def run(self, weights, norms, targets, start=None):
            found = super().run(weights, norms, targets, start)
            rounds.append((self.begun, start, found.fits[0].S))
            return found

    monkeypatch.setattr(hassle_free, "AdmmSearch", Recording)
    W, norm = metric(24, 32, 300)
    fit(HassleFree(SparseStep.ALPS, steps=4, sparse_steps=10, tolerance=0), W, norm, Target(2, 200))
    assert len(rounds) == 4
    assert rounds[0][:2] == (0.0, None)
    for (_, _, before), (begun, start, _) in pairwise(rounds):
        assert torch.equal(start[0].S, before)
        assert begun > 0


def test_competing_blocks_and_polish_lower_the_error_of_a_sweep():
    W, norm = metric(48, 64, 400)
    errors = [
        fit(HassleFree(steps=1, polish=polish, column_block=16, layer_wide=wide), W, norm, Target(0, 960)).error
        for polish, wide in ((0, False), (0, True), (8, True), (40, True))
    ]
    assert all(after < before for before, after in pairwise(errors))


def test_a_pattern_holds_in_both_steps():
    W, norm = metric(24, 32, 300)
    for sparse_step in SparseStep:
        solution = fit(HassleFree(sparse_step, steps=5), W, norm, Target(2, 384, NM(2, 4)))
        assert solution.value.fits(Target(2, 384, NM(2, 4)))
        assert solution.value.nnz == 384
        assert solution.stats["steps"] <= 5
