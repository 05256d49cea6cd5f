"""Outliers and tail exponents against their definitions, written out slowly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from globalopt.analysis.profiles import NO_TAIL, profile_block, tail_exponent
from globalopt.errors import NumericalError, UsageError
from globalopt.values.metric import Gram
from globalopt.values.problem import OUTLIER_THRESHOLDS
from tests.synthetic import layer


@pytest.fixture(scope="module")
def block():
    """Three layers of different shapes on two sites."""
    q, shared = layer(24, 40, 200, seed=1)
    k, _ = layer(12, 40, 200, seed=2)
    down, other = layer(40, 16, 200, seed=3)
    return {"q": q, "k": k, "down": down}, {"q": shared, "k": shared, "down": other}


def slow_outliers(weights: dict[str, Tensor], grams: dict[str, Gram], M: int) -> dict[str, float]:
    effects = {
        name: [
            abs(float(W[i, j])) * math.sqrt(float(grams[name].matrix[j, j]))
            for i in range(W.shape[0])
            for j in range(W.shape[1])
        ]
        for name, W in weights.items()
    }
    everything = [a for one in effects.values() for a in one]
    mean = sum(everything) / len(everything)
    return {name: sum(a > M * mean for a in one) / len(one) for name, one in effects.items()}


def slow_exponent(W: Tensor) -> float:
    """The fix-finger estimate by numpy, from singular values and a histogram."""
    values = sorted(np.linalg.svd(W.double().numpy(), compute_uv=False) ** 2)
    counts, edges = np.histogram(np.log10(values), 100)
    peak = 10 ** edges[np.argmax(counts)]
    best = (math.inf, math.nan)
    for start, least in enumerate(values[:-1]):
        if not 0.95 * peak <= least <= 1.5 * peak:
            continue
        tail = values[start:]
        alpha = 1 + len(tail) / sum(math.log(value / least) for value in tail)
        distance = max(abs(1 - (value / least) ** (1 - alpha) - i / len(tail)) for i, value in enumerate(tail))
        best = min(best, (distance, alpha))
    return best[1]


def test_outliers_are_counted_against_the_whole_block(block):
    weights, grams = block
    profiles = profile_block(weights, grams)
    assert list(profiles) == ["q", "k", "down"]
    for M in OUTLIER_THRESHOLDS:
        slow = slow_outliers(weights, grams, M)
        assert {name: profile.outliers[M] for name, profile in profiles.items()} == slow
    assert any(slow_outliers(weights, grams, 5).values())


@pytest.mark.parametrize(("d_out", "d_in"), [(60, 90), (90, 60), (128, 128), (200, 24)])
def test_exponent_is_the_fix_finger_estimate(d_out, d_in):
    W, _ = layer(d_out, d_in, 10, seed=d_out)
    assert tail_exponent(W) == pytest.approx(slow_exponent(W), rel=1e-6)


def test_exponent_ignores_scale_and_orientation():
    W, _ = layer(60, 90, 10)
    assert tail_exponent(1e-3 * W) == pytest.approx(tail_exponent(W), rel=1e-5)
    assert tail_exponent(W.mT) == pytest.approx(tail_exponent(W), rel=1e-9)


@pytest.mark.parametrize("exponent", [2.0, 3.0, 4.0])
def test_exponent_of_a_power_law(exponent):
    """Eigenvalues at the quantiles of the density `lambda^-exponent` above 1; the peak is its lower end."""
    n = 400
    quantiles = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    eigenvalues = (1 - quantiles) ** (-1 / (exponent - 1))
    assert tail_exponent(eigenvalues.sqrt().diag()) == pytest.approx(exponent, rel=0.03)


def test_exponent_drops_eigenvalues_that_are_rounding():
    W, _ = layer(30, 40, 10)
    padded = torch.zeros(50, 40)
    padded[:30] = W
    padded[30:] = W[:20]
    spectrum = torch.linalg.svdvals(padded.double())[:30]
    assert tail_exponent(padded) == pytest.approx(slow_exponent(spectrum.diag()), rel=1e-6)


@pytest.mark.parametrize(
    "W", [torch.zeros(8, 12), torch.ones(8, 12), torch.eye(8), torch.randn(1, 12), torch.randn(12, 1)]
)
def test_no_tail(W):
    assert tail_exponent(W) is None


def test_two_eigenvalues_are_the_shortest_tail():
    assert tail_exponent(torch.diag(torch.tensor([1.0, math.e]))) == pytest.approx(1 + 2 / 2)


def test_dead_layers_and_inputs_stand_aside(block):
    weights, grams = block
    without = profile_block(weights, grams)
    mean = sum(profile.alpha for profile in without.values()) / 3
    zero, dead = torch.zeros(24, 40), Gram(torch.zeros(40, 40), 10)
    found = profile_block({**weights, "zero": zero}, {**grams, "zero": grams["q"]})
    assert found["zero"].outliers == dict.fromkeys(OUTLIER_THRESHOLDS, 0.0)
    assert found["zero"].alpha == pytest.approx(mean)
    assert profile_block({"q": weights["q"]}, {"q": dead})["q"].outliers == dict.fromkeys(OUTLIER_THRESHOLDS, 0.0)
    assert profile_block({"zero": zero}, {"zero": dead})["zero"].alpha == NO_TAIL


def test_half_precision_weights(block):
    weights, grams = block
    half = {name: W.half() for name, W in weights.items()}
    assert profile_block(half, grams) == profile_block({name: W.float() for name, W in half.items()}, grams)


def test_bad_input(block):
    weights, grams = block
    with pytest.raises(UsageError, match="only one of them is there: k"):
        profile_block({"q": weights["q"]}, {"q": grams["q"], "k": grams["k"]})
    with pytest.raises(NumericalError, match="layer q is not finite"):
        profile_block({"q": weights["q"] * math.nan}, {"q": grams["q"]})
