from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from globalopt.kernels.norm import Norm, Side
from globalopt.protocols import Outputs
from globalopt.values.budget import Target
from globalopt.values.decomposition import Status
from globalopt.values.metric import Gram, Metric
from solvers._unit_diagonal import Damping, Sweepable, UnitDiagonal
from solvers.svd import SVD
from tests.synthetic import metric

EACH = pytest.mark.parametrize("outputs", [Outputs.NONE, Outputs.ROWS, Outputs.FULL])


def weighted(d_out=16, d_in=24):
    W, norm = metric(d_out, d_in, 300)
    return W, Metric(norm.inputs, metric(d_in, d_out, 200, seed=1)[1].inputs)


@EACH
def test_the_norm_is_the_damped_metric_of_the_weight(outputs):
    W, norm = weighted()
    assert norm.outputs is not None
    unit = UnitDiagonal.read(W, norm, Damping(0.02, 0.05, 0.1), outputs)
    G, A = norm.inputs.matrix.double(), norm.outputs.matrix.double()
    G = G + torch.diag(0.02 * G.diagonal().mean() + 0.05 * G.diagonal())
    damped = {
        Outputs.NONE: torch.eye(16).double(),
        Outputs.ROWS: torch.diag(A.diagonal()) / A.diagonal().mean(),
        # At a diagonal of ones again, however much was added to it.
        Outputs.FULL: (A + 0.1 * torch.diag(A.diagonal())) / (1.1 * A.diagonal().mean()),
    }[outputs]
    expected = float(torch.trace(damped @ W.double() @ G @ W.double().mT))
    assert float((unit.norm.times(unit.W) * unit.W).sum()) == pytest.approx(expected, rel=2e-3)


@EACH
def test_both_sides_have_a_unit_diagonal_and_the_factor_they_say(outputs):
    W, norm = weighted()
    unit = UnitDiagonal.read(W, norm, Damping(0.02, 0.05, 0.1), outputs)
    sides = [unit.inputs] + ([unit.norm.outputs] if unit.norm.outputs is not None else [])
    assert len(sides) == (2 if outputs is Outputs.FULL else 1)
    for side in sides:
        torch.testing.assert_close(side.matrix.diagonal(), torch.ones(len(side.matrix)))
        torch.testing.assert_close(side.factor @ side.factor.mT, side.matrix)


def test_what_is_restored_is_the_weight():
    W, norm = weighted()
    unit = UnitDiagonal.read(W, norm, Damping(0.02, 0.05, 0.1), Outputs.FULL)
    torch.testing.assert_close(unit.restored(unit.W, W[:, :0], W[:0]).dense(), W)


def test_an_indefinite_output_gram_reports_what_it_took():
    W, norm = weighted()
    g = torch.linspace(0.5, 2, 16)
    outputs = Metric(norm.inputs, Gram(torch.outer(g, g) - 0.01 * torch.diag(g * g), 1))
    bare, damped = (SVD(damping=0.01, output_damping=damping) for damping in (0.0, 0.1))
    solution = bare.solve(bare.prepare(W, outputs), Target(3, 0))
    assert solution.stats["damping"] > 0.01
    assert solution.status is Status.FALLBACK
    solution = damped.solve(damped.prepare(W, outputs), Target(3, 0))
    assert solution.stats["damping"] == 0.01
    assert solution.status is Status.CONVERGED


def test_a_sweep_adds_what_its_own_factor_took():
    W, norm = weighted()
    unit = UnitDiagonal.read(W, norm, Damping(0.01, 0.0, 0.1), Outputs.NONE)
    assert Sweepable.of(unit).damping == 0.01
    singular = Side(torch.ones(24, 24), unit.inputs.factor)
    swept = Sweepable.of(replace(unit, norm=Norm(singular)))
    assert swept.damping > 0.01
    assert torch.isfinite(swept.R).all()
