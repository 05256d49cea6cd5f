"""Curves of a layer against their definitions, and what of them is kept."""

from __future__ import annotations

import torch

from globalopt.analysis.curves import POINTS, layer_curves
from globalopt.values.metric import Gram
from tests.synthetic import layer


def test_curves_are_singular_values_and_saliencies_of_the_scaled_weight():
    for shape in ((24, 40), (40, 24)):
        W, gram = layer(*shape, 200)
        scaled = W.double() * gram.matrix.diagonal().double().sqrt()
        found = layer_curves(W, gram)
        for curve, expected in (
            (found.singular, torch.linalg.svdvals(scaled)),
            (found.saliency, scaled.abs().flatten().sort(descending=True).values),
        ):
            assert curve.count == len(expected)
            kept = expected[torch.tensor(curve.places) - 1]
            torch.testing.assert_close(torch.tensor(curve.values).double(), kept, rtol=1e-4, atol=0)


def test_places_are_few_distinct_and_reach_both_ends():
    W, gram = layer(64, 96, 200)
    found = layer_curves(W, gram)
    for curve in (found.singular, found.saliency):
        assert curve.places[0] == 1
        assert curve.places[-1] == curve.count
        assert list(curve.places) == sorted(set(curve.places))
        assert len(curve.places) <= POINTS
    ratios = torch.tensor(found.saliency.places[-10:]).double().log().diff()
    torch.testing.assert_close(ratios, ratios.mean().expand(9), rtol=1e-2, atol=0)


def test_what_is_zero_but_for_rounding_is_zero():
    W, gram = layer(12, 20, 200)
    W[6:] = W[:6]
    values = layer_curves(W, gram).singular.values
    assert min(values[:6]) > 0
    assert set(values[6:]) == {0.0}
    dead = Gram(torch.zeros(20, 20), 1)
    assert set(layer_curves(W, dead).saliency.values) == {0.0}


def test_a_single_weight_is_a_curve():
    found = layer_curves(torch.tensor([[-3.0]]), Gram(torch.tensor([[4.0]]), 1))
    assert found.saliency.values == (6.0,)
    assert found.singular.count == 1
