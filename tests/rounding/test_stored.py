"""Decompositions in few bits: what one part loses, another makes up for."""

from __future__ import annotations

import torch

from globalopt.rounding.stored import stored
from globalopt.values.decomposition import Decomposition
from globalopt.values.metric import Metric
from globalopt.values.storage import Storage
from tests.synthetic import layer


def test_factors_in_16_bits_make_up_for_rounded_values():
    W, gram = layer(48, 64, 400)
    metric = Metric(gram)
    draw = torch.Generator().manual_seed(0)
    U, V = torch.randn(48, 6, generator=draw), torch.randn(6, 64, generator=draw)
    support = torch.rand(48, 64, generator=draw) < 0.5
    exact = Decomposition((W - U @ V) * support, U, V)
    value = stored(exact, W, metric, Storage(3, 16))
    assert value.scales is not None
    assert (value.scales.U, value.scales.V) == (None, None)
    assert metric.error(W - value.dense()) < 0.9 * metric.error(W - value.S - U @ V)
