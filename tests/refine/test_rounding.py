"""What is saved in half precision loses less than its rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from globalopt.refine.rounding import rounded
from globalopt.values.budget import Target
from globalopt.values.decomposition import Decomposition
from globalopt.values.metric import Gram, Metric
from solvers import get_solver
from tests.synthetic import layer


@pytest.fixture(scope="module")
def fitted():
    W, gram = layer(48, 64, 400)
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randn(300, 48, generator=generator) @ torch.randn(48, 48, generator=generator)
    metric = Metric(gram, Gram(gradients.mT @ gradients / 300, 300))
    solver = get_solver("3basil", {"preset": "fast"})
    return W, metric, solver.solve(solver.prepare(W, metric), Target(12, 1800)).value


@pytest.mark.parametrize("with_outputs", [False, True])
def test_rounding_is_absorbed(fitted, with_outputs):
    W, metric, value = fitted
    metric = metric if with_outputs else Metric(metric.inputs)
    saved = rounded(value, W, metric, torch.bfloat16)
    cast = Decomposition(value.S.bfloat16(), value.U.bfloat16(), value.V.bfloat16())
    assert saved.S.dtype == saved.U.dtype == saved.V.dtype == torch.bfloat16
    assert torch.equal(saved.S, cast.S)
    assert metric.error(W - saved.dense()) < metric.error(W - cast.dense())


def test_single_precision_and_sign_planes_are_left_alone(fitted):
    W, metric, value = fitted
    assert torch.equal(rounded(value, W, metric, torch.float32).V, value.V)
    plane = replace(value, signs=torch.ones_like(value.S))
    assert torch.equal(rounded(plane, W, metric, torch.bfloat16).V, value.V.bfloat16())


def test_an_output_the_loss_does_not_feel(fitted):
    W, metric, value = fitted
    blind = Metric(metric.inputs, Gram(torch.zeros(48, 48), 300))
    assert torch.isfinite(rounded(value, W, blind, torch.bfloat16).V.float()).all()
