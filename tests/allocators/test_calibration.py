"""A calibrated surrogate predicts allocations it has not seen."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scipy.stats import rankdata

from allocators import Knapsack
from allocators._calibration import Calibration, Posterior
from tests.objectives import BentObjective
from tests.surfaces import problem


def disturbed_knapsacks(p, count, seed):
    """Knapsacks of randomly scaled surfaces."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        scaled = p.scaled({spec.name: np.exp(rng.gauss(0, 0.5)) for spec in p.specs})
        found.append(Knapsack(exact=False).allocate(scaled).targets)
    return found


def measured(p, objective, count, seed):
    return [(targets, objective.true(targets)) for targets in disturbed_knapsacks(p, count, seed)]


def rank_correlation(xs, ys) -> float:
    """Spearman's, of values without ties."""
    return float(np.corrcoef(rankdata(xs), rankdata(ys))[0, 1])


@pytest.fixture(scope="module")
def bent():
    p = problem(0.4, layers=10)
    return p, BentObjective(p, bend=0.6)


def test_unseen_allocations_are_ranked_better_than_before(bent):
    p, objective = bent
    calibration = Calibration.fit(p, measured(p, objective, 40, seed=0))
    fresh = measured(p, objective, 40, seed=1)
    truth = [loss for _, loss in fresh]
    before = rank_correlation([p.predicted(t) for t, _ in fresh], truth)
    predicted = [calibration.loss(p, t) for t, _ in fresh]
    after = rank_correlation(predicted, truth)
    assert after > 0.95
    assert after > before
    assert predicted == pytest.approx(truth, rel=0.1)


def test_its_knapsack_is_better_on_the_true_loss(bent):
    p, objective = bent
    calibration = Calibration.fit(p, measured(p, objective, 40, seed=0))
    corrected = Knapsack().allocate(calibration.apply(p)).targets
    assert objective.true(corrected) < 0.99 * objective.true(Knapsack().allocate(p).targets)


def test_what_the_surfaces_know_is_left_alone():
    p = problem(0.4, layers=10)
    objective = BentObjective(p, bend=0.0, power=1.0)
    calibration = Calibration.fit(p, measured(p, objective, 20, seed=0))
    assert calibration.power == pytest.approx(1.0, abs=0.02)
    assert max(map(abs, calibration.own.values())) < 0.02
    assert calibration.residual < 1e-3
    assert calibration.level == pytest.approx(0.0, abs=0.05)


def test_no_share_of_it_changes_nothing(bent):
    p, objective = bent
    calibration = Calibration.fit(p, measured(p, objective, 3, seed=0))
    unchanged = calibration.apply(p, share=0.0)
    for a, b in zip(unchanged.surfaces, p.surfaces, strict=True):
        assert a.error == pytest.approx(b.error)


def test_one_measurement_sets_the_level(bent):
    p, objective = bent
    ((targets, loss),) = measured(p, objective, 1, seed=0)
    assert Calibration.fit(p, [(targets, loss)]).loss(p, targets) == pytest.approx(loss, rel=0.02)


def test_the_jacobian_is_that_of_the_residuals(bent):
    """Against central differences, away from the prior's mode."""
    p, objective = bent
    posterior = Posterior(p, measured(p, objective, 5, seed=0))
    rng = np.random.default_rng(0)
    x = 0.3 * posterior.spread * rng.standard_normal(len(posterior.spread))
    steps = 1e-6 * np.eye(len(x))
    columns = [(posterior.residuals(x + step) - posterior.residuals(x - step)) / 2e-6 for step in steps]
    np.testing.assert_allclose(posterior.jacobian(x), np.stack(columns, axis=1), rtol=1e-5, atol=1e-5)


def test_the_fit_is_a_mode(bent):
    """No parameter can be moved to a better posterior."""
    p, objective = bent
    told = measured(p, objective, 12, seed=0)
    posterior, found = Posterior(p, told), Calibration.fit(p, told)
    own = [found.own[name] for name in posterior.names]
    x = np.concatenate([found.theta, own, [found.level, found.power - 1]])
    gradient = posterior.jacobian(x).T @ posterior.residuals(x)
    start = posterior.jacobian(0 * x).T @ posterior.residuals(0 * x)
    assert np.linalg.norm(gradient * posterior.spread) < 1e-4 * np.linalg.norm(start * posterior.spread)
