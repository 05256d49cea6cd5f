"""Whole layers in few bits, as published: errors in the order that the methods promise, and grids that hold."""

from __future__ import annotations

import pytest
import torch

from globalopt.kernels.grid import codes, levels, spread
from globalopt.protocols import Rounding
from globalopt.rounding.published import on_grid
from globalopt.values.decomposition import Decomposition
from globalopt.values.metric import Metric
from globalopt.values.storage import GROUP, Storage
from tests.synthetic import layer


def whole(W: torch.Tensor) -> Decomposition:
    return Decomposition(W, W[:, :0], W[:0])


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_sweep_is_better_than_the_nearest_levels_and_descent_better_still(bits):
    W, gram = layer(48, 64, 400)
    metric = Metric(gram)
    errors = []
    for rounding in (Rounding.NEAREST, Rounding.SWEEP, Rounding.FITTED):
        found = on_grid(rounding, whole(W), W, metric, Storage(bits, bits))
        assert found.nnz == W.numel()
        assert found.scales is not None
        assert found.scales.S is not None
        each = spread(found.scales.S, GROUP, W.numel())
        numbers = found.S.flatten()
        torch.testing.assert_close(levels(codes(numbers, each, bits), each, bits), numbers)
        errors.append(metric.error(W - found.dense()))
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize("rounding", [Rounding.NEAREST, Rounding.SWEEP])
def test_zeros_of_a_weight_have_codes_too(rounding):
    W, gram = layer(48, 64, 400)
    W[3] = 0
    W[:, 5] = 0
    found = on_grid(rounding, whole(W), W, Metric(gram), Storage(4, 4))
    assert found.nnz == W.numel()
    if rounding is Rounding.NEAREST:
        assert found.S[3].abs().max() < 1e-15


def test_a_layer_that_is_dropped_and_one_in_16_bits_are_left_alone():
    W, gram = layer(48, 64, 400)
    dropped = on_grid(Rounding.SWEEP, whole(0 * W), W, Metric(gram), Storage(4, 4))
    assert (dropped.nnz, dropped.storage) == (0, Storage(4, 4))
    kept = on_grid(Rounding.SWEEP, whole(W), W, Metric(gram), Storage(16, 4))
    assert torch.equal(kept.S, W)
