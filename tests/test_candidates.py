"""Weights for any target without a fit: exact where fits are, and in between at the price the surface says."""

from __future__ import annotations

import pytest
import torch

from globalopt.candidates import FittedLayer, span_weight
from globalopt.span import compute_span, take
from globalopt.surface import Options
from globalopt.types import NM, ErrorSurface, LayerSpec, Mask, Target

SPEC = LayerSpec("layer", 0, "layer", "q_proj", 64, 48)


def fitted(pattern: NM | None = None) -> FittedLayer:
    """Residuals whose squared norms are the surface's errors at the anchors."""
    options = Options.of(SPEC, SPEC.max_rank, pattern)
    errors = [(1 - t.params(SPEC) / SPEC.numel) ** 2 * 0.98**t.rank for t in options.targets]
    surface = ErrorSurface(SPEC, options.targets, tuple(errors))
    generator = torch.Generator().manual_seed(0)
    residuals = []
    for anchor in (anchor for row in options.anchors for anchor in row):
        E = torch.randn(SPEC.d_out, SPEC.d_in, generator=generator)
        # Rows of equal norm: then shares of rows are shares of the error.
        E /= torch.linalg.vector_norm(E, dim=1, keepdim=True)
        residuals.append(E * (surface.predict(anchor) / SPEC.d_out) ** 0.5)
    return FittedLayer(surface, options.anchors, torch.stack(residuals))


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
    # 64 rows cannot be dealt out in exact shares.
    assert float(layer.residual(target).square().sum()) == pytest.approx(layer.surface.predict(target), rel=0.1)


def test_a_small_change_of_a_target_moves_few_rows():
    layer = fitted()
    a, b = (layer.residual(Target(0, nnz)) for nnz in (900, 930))
    same = torch.nn.functional.cosine_similarity(a, b, dim=1) > 0.999
    assert int(same.sum()) >= SPEC.d_out - 4


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
