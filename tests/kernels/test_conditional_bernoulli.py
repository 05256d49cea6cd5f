"""The conditional Bernoulli distribution against enumeration, and at the size it is used at."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from globalopt.kernels.conditional_bernoulli import ConditionalBernoulli, log_partition

CASES = [(1, 0), (1, 1), (5, 0), (5, 2), (5, 5), (8, 3)]


def weights(n, spread=2.0):
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) * spread


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def enumerated(log_weights, count):
    """Slow twin: every subset of `count` variables with its weight."""
    n = len(log_weights)
    return {
        chosen: math.exp(sum(float(log_weights[i]) for i in chosen))
        for chosen in itertools.combinations(range(n), count)
    }


@pytest.mark.parametrize(("n", "count"), CASES)
def test_partition_and_inclusion_by_enumeration(n, count):
    log_weights = weights(n)
    subsets = enumerated(log_weights, count)
    total = sum(subsets.values())
    assert float(log_partition(log_weights, count)[0, count]) == pytest.approx(math.log(total), abs=1e-12)
    mu = torch.tensor([sum(w for s, w in subsets.items() if i in s) for i in range(n)], dtype=torch.float64) / total
    torch.testing.assert_close(ConditionalBernoulli.of(log_weights, count).inclusion(), mu)


def test_inclusion_is_the_gradient_of_the_log_partition():
    log_weights = weights(30)
    step = 1e-5
    slopes = []
    for i in range(30):
        moved = [log_weights.clone(), log_weights.clone()]
        moved[0][i] += step
        moved[1][i] -= step
        up, down = (float(log_partition(m, 11)[0, 11]) for m in moved)
        slopes.append((up - down) / (2 * step))
    mu = ConditionalBernoulli.of(log_weights, 11).inclusion()
    torch.testing.assert_close(mu, torch.tensor(slopes, dtype=torch.float64), atol=1e-8, rtol=0)


def test_frequencies_of_subsets():
    log_weights = weights(6, spread=1.0)
    subsets = enumerated(log_weights, 3)
    total = sum(subsets.values())
    drawn = ConditionalBernoulli.of(log_weights, 3).sample(20_000, generator())
    for chosen, weight in subsets.items():
        expected = weight / total
        row = torch.zeros(6, dtype=torch.bool)
        row[list(chosen)] = True
        seen = float((drawn == row).all(1).double().mean())
        assert abs(seen - expected) < 5 * math.sqrt(expected * (1 - expected) / 20_000) + 1e-9


@pytest.mark.parametrize(("n", "count"), CASES)
def test_every_sample_has_the_count(n, count):
    drawn = ConditionalBernoulli.of(weights(n, spread=30.0), count).sample(50, generator())
    assert drawn.shape == (50, n)
    assert (drawn.sum(1) == count).all()


def test_same_seed_same_samples():
    law = ConditionalBernoulli.of(weights(20), 9)
    assert torch.equal(law.sample(7, generator(3)), law.sample(7, generator(3)))


def test_sound_at_full_size():
    log_weights = weights(4000, spread=10.0)
    law = ConditionalBernoulli.of(log_weights, 2000)
    mu = law.inclusion()
    assert ((mu >= 0) & (mu <= 1 + 1e-12)).all()
    assert float(mu.sum()) == pytest.approx(2000, abs=1e-7)
    assert (mu[log_weights.argsort()].diff() > -1e-9).all()
    drawn = law.sample(40, generator())
    assert (drawn.sum(1) == 2000).all()
    assert float((drawn.double().mean(0) - mu).abs().mean()) < 0.05


def test_more_ones_than_variables_is_refused():
    with pytest.raises(ValueError, match="4 of 3 variables"):
        log_partition(weights(3), 4)
