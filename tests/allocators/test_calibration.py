"""A calibrated surrogate predicts allocations it has not seen."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scipy.optimize import least_squares
from scipy.stats import rankdata

from allocators import Knapsack
from allocators._calibration import Calibration, Posterior
from allocators.knapsack import relaxed_knapsack
from tests.objectives import BentObjective
from tests.surfaces import problem


def measured(p, objective, count, seed):
    """Knapsacks of randomly scaled surfaces, and their losses."""
    rng = random.Random(seed)
    table, found = p.table, []
    for _ in range(count):
        sizes = relaxed_knapsack(table.scaled(np.exp([rng.gauss(0, 0.5) for _ in table.names])))
        found.append((sizes, objective.true(table.targets(sizes))))
    return found


def rank_correlation(xs, ys) -> float:
    """Spearman's, of values without ties."""
    return float(np.corrcoef(rankdata(xs), rankdata(ys))[0, 1])


@pytest.fixture(scope="module")
def bent():
    p = problem(0.4, layers=10)
    return p, BentObjective(p, bend=0.6)


def test_unseen_allocations_are_ranked_better_than_before(bent):
    p, objective = bent
    calibration = Calibration.fit(p.table, measured(p, objective, 40, seed=0))
    fresh = measured(p, objective, 40, seed=1)
    truth = [loss for _, loss in fresh]
    before = rank_correlation([p.table.predicted(t) for t, _ in fresh], truth)
    predicted = [calibration.loss(p.table, t) for t, _ in fresh]
    after = rank_correlation(predicted, truth)
    assert after > 0.95
    assert after > before
    assert predicted == pytest.approx(truth, rel=0.1)


def test_its_knapsack_is_better_on_the_true_loss(bent):
    p, objective = bent
    calibration = Calibration.fit(p.table, measured(p, objective, 40, seed=0))
    corrected = relaxed_knapsack(calibration.apply(p.table))
    assert objective.true(p.table.targets(corrected)) < 0.99 * objective.true(Knapsack().allocate(p).targets)


def test_what_the_surfaces_know_is_left_alone():
    p = problem(0.4, layers=10)
    objective = BentObjective(p, bend=0.0, power=1.0)
    calibration = Calibration.fit(p.table, measured(p, objective, 20, seed=0))
    assert calibration.power == pytest.approx(1.0, abs=0.02)
    assert abs(calibration.own).max() < 0.02
    assert calibration.residual < 1e-3
    assert calibration.level == pytest.approx(0.0, abs=0.05)


def test_no_share_of_it_changes_nothing(bent):
    p, objective = bent
    calibration = Calibration.fit(p.table, measured(p, objective, 3, seed=0))
    assert calibration.apply(p.table, share=0.0).error == pytest.approx(p.table.error)


def test_one_measurement_sets_the_level(bent):
    p, objective = bent
    ((sizes, loss),) = measured(p, objective, 1, seed=0)
    assert Calibration.fit(p.table, [(sizes, loss)]).loss(p.table, sizes) == pytest.approx(loss, rel=0.02)


def test_the_jacobian_is_that_of_the_misfits(bent):
    """Against central differences, away from the prior's mode."""
    p, objective = bent
    posterior = Posterior(p.table, measured(p, objective, 5, seed=0))
    rng = np.random.default_rng(0)
    x = 0.3 * posterior.spread * rng.standard_normal(len(posterior.spread))
    steps = 1e-6 * np.eye(len(x))
    columns = [(posterior.misfits(x + step) - posterior.misfits(x - step)) / 2e-6 for step in steps]
    np.testing.assert_allclose(posterior.jacobian(x), np.stack(columns, axis=1), rtol=1e-5, atol=1e-5)


def gradient(posterior: Posterior, x: np.ndarray) -> np.ndarray:
    """Of the negative log posterior, in units of the prior."""
    return posterior.spread * (posterior.jacobian(x).T @ posterior.misfits(x)) + x / posterior.spread


def test_the_fit_is_a_mode(bent):
    """No parameter can be moved to a better posterior."""
    p, objective = bent
    posterior = Posterior(p.table, measured(p, objective, 12, seed=0))
    found = posterior.mode()
    assert np.linalg.norm(gradient(posterior, found)) < 1e-6 * np.linalg.norm(gradient(posterior, 0 * found))


def test_the_mode_is_that_of_least_squares_over_all_parameters(bent):
    """The steps through the measurements lead where steps through the parameters do."""
    p, objective = bent
    posterior = Posterior(p.table, measured(p, objective, 12, seed=0))

    def residuals(x: np.ndarray) -> np.ndarray:
        return np.concatenate([posterior.misfits(x), x / posterior.spread])

    zero = np.zeros(len(posterior.spread))
    wanted = least_squares(residuals, zero, x_scale=posterior.spread, xtol=1e-14, ftol=1e-14, gtol=1e-14).x
    assert posterior.mode() == pytest.approx(wanted, abs=1e-5)
