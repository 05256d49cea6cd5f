"""Weights for any target without a fit: exact where fits are, and in between at the price the surface says."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from globalopt.analysis.grid import Options
from globalopt.analysis.spans import compute_span
from globalopt.objective.candidates import AnchoredLayer, span_weight, take
from globalopt.values.budget import Target
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.span import Mask
from globalopt.values.surface import ErrorSurface

SPEC = LayerSpec("layer", 0, "layer", "q_proj", 64, 48)


def norm() -> tuple[Tensor, Tensor]:
    """`A` (d_out, d_out), far from diagonal, and `G` (d_in, d_in)."""
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(SPEC.d_out, 3, generator=generator, dtype=torch.float64)
    X = torch.randn(200, SPEC.d_in, generator=generator, dtype=torch.float64)
    return 30 * common @ common.mT + torch.eye(SPEC.d_out, dtype=torch.float64), X.mT @ X / 200


def products(residuals: Tensor) -> Tensor:
    """(k, k) `tr(A R_i G R_jᵀ)`."""
    A, G = norm()
    R = residuals.double()
    return (A @ R @ G).flatten(1) @ R.flatten(1).mT


def price(residual: Tensor) -> float:
    return float(products(residual[None])[0, 0])


def fitted(pattern: NM | None = None) -> AnchoredLayer:
    """Residuals whose errors in the norm are the surface's at the anchors, small as their rows cancel in it."""
    options = Options.of(SPEC, SPEC.max_rank, pattern)
    errors = [(1 - t.params(SPEC) / SPEC.numel) ** 2 * 0.98**t.rank for t in options.targets]
    surface = ErrorSurface(SPEC, options.targets, tuple(errors))
    generator = torch.Generator().manual_seed(0)
    A, _ = norm()
    residuals = []
    for anchor in (anchor for row in options.anchors for anchor in row):
        # What a least squares fit leaves has little where the norm is large.
        E = torch.linalg.solve(A, torch.randn(SPEC.d_out, SPEC.d_in, generator=generator, dtype=torch.float64))
        residuals.append(E * (surface.predict(anchor) / price(E)) ** 0.5)
    lost = torch.stack(residuals).float()
    norms = products(lost).diagonal().sqrt()
    return AnchoredLayer(surface, options.anchors, lost, products(lost) / norms / norms[:, None])


@pytest.mark.parametrize("pattern", [None, NM(2, 4)])
def test_at_an_anchor_it_is_the_fit(pattern):
    layer = fitted(pattern)
    # Ranks are whole numbers: of a later row only the anchor of the largest share lies on it.
    for anchor, residual in zip(layer.anchors[0], layer.residuals, strict=False):
        torch.testing.assert_close(layer.residual(anchor), residual, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kept", [0.1, 0.16, 0.25, 0.33, 0.5, 0.62])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.2])
def test_elsewhere_its_error_is_what_the_surface_predicts(kept, share):
    layer = fitted()
    rank = int(share * kept * SPEC.numel / (SPEC.d_out + SPEC.d_in))
    target = Target(rank, int(kept * SPEC.numel) - rank * (SPEC.d_out + SPEC.d_in))
    assert price(layer.residual(target)) == pytest.approx(layer.surface.predict(target), rel=1e-4)


def test_rows_of_several_fits_would_cost_far_more():
    # Why whole residuals are mixed, and what a sum of row errors would say of such a norm.
    low, high = fitted().residuals[1:3]
    rows = torch.where(torch.arange(SPEC.d_out)[:, None] % 2 == 0, low, high)
    assert price(rows) > 5 * max(price(low), price(high))


def test_a_small_change_of_a_target_is_a_small_change_of_the_layer():
    layer = fitted()
    counts = range(700, 1000, 5)
    made = [layer.residual(Target(0, nnz)) for nnz in counts]
    steps = [float((b - a).norm() / a.norm()) for a, b in itertools.pairwise(made)]
    assert max(steps) < 0.02


def test_dense_and_zero_are_themselves():
    layer = fitted()
    W = torch.randn(SPEC.d_out, SPEC.d_in, generator=torch.Generator().manual_seed(2))
    assert torch.equal(layer.weight(W, Target.dense(SPEC)), W)
    assert not layer.weight(W, Target.zero()).any()


def test_a_mask_of_the_most_important_components_is_the_target():
    W = torch.randn(12, 10, generator=torch.Generator().manual_seed(3))
    span = compute_span(W, scaling="none")
    everything = Mask(torch.ones(span.max_rank, dtype=torch.bool), torch.ones_like(span.S, dtype=torch.bool))
    torch.testing.assert_close(span_weight(span, everything), W)
    directions = torch.arange(span.max_rank) < span.max_rank
    entries = span.S.abs() >= span.S.abs().flatten().topk(20).values[-1]
    target = Mask(directions, entries).target()
    assert target == Target(span.max_rank, 20)
    torch.testing.assert_close(span_weight(span, Mask(directions, entries)), take(span, target).dense())
