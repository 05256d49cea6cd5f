"""Solutions at all anchors in some blocks alone, and what they say about the others."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from globalopt.analysis.anchor_curves import (
    FIRST,
    PARTS,
    AnchorCurves,
    Curve,
    CurvesOverDepth,
    fully_solved,
    middle,
)
from globalopt.analysis.layer_analysis import LayerAnalysis
from globalopt.analysis.predictions import predict
from globalopt.analysis.solver_gap import sampled
from globalopt.runs.artefacts import ANCHORS
from globalopt.values.budget import Target
from globalopt.values.layer import LayerSpec
from tests.analysis.deep import EveryAnchor, solved


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> LayerAnalysis:
    """The analysis of a model of seven blocks up to anchor solutions; not to be changed."""
    return solved(LayerAnalysis, tmp_path_factory.mktemp("run"))


def test_every_kind_is_solved_at_all_anchors_at_both_ends_and_between():
    depth = 40
    specs = [LayerSpec(f"{b}.{kind}", b, "in", kind, 2, 2) for b in range(depth) for kind in ("up", "down")]
    # A kind of few blocks: all of them.
    specs += [LayerSpec(f"{b}.gate", b, "in", "gate", 2, 2) for b in (5, 6, 30)]
    names = fully_solved(specs)
    blocks = sorted(int(name.split(".")[0]) for name in names if name.endswith("up"))
    assert blocks[:FIRST] == list(range(FIRST))
    assert blocks[-1] == depth - 1
    assert max(b - a for a, b in pairwise(blocks)) <= depth / PARTS
    assert len(blocks) <= FIRST + 2 + PARTS
    assert {"5.gate", "6.gate", "30.gate"} <= names
    assert {spec.name for spec in sampled(specs)} <= names


def test_a_layer_in_between_is_solved_once_and_takes_the_rest_from_its_neighbours(deep):
    layers = deep.layers
    lacking = [spec for spec in layers.specs if spec.name not in fully_solved(layers.specs)]
    assert {spec.block for spec in lacking} == {4}
    found = dict(predict(deep, layers.specs))
    assert set(found) == set(layers.specs)
    for spec in lacking:
        sparse, ranked = deep.options(spec).anchors
        assert deep.work.get(ANCHORS, spec).anchors == (middle(sparse),)
        overlap = found[spec].overlap
        assert overlap is not None
        assert overlap.shape == (1, 1)
        half, few = ranked[-1], deep.options(spec).sharing(0.5, 0.0)

        def worth(block: int, spec: LayerSpec = spec, half: Target = half, few: Target = few) -> float:
            """Log of what a share of rank is worth at half of the weights, in a block where it was solved."""
            (same,) = (other for other in layers.of_block(block) if other.kind == spec.kind)
            surface = found[same].surface
            return math.log(surface.predict(half) / surface.predict(few))

        # Options are interpolated, so that it holds roughly.
        assert worth(spec.block) == pytest.approx((worth(3) + worth(5)) / 2, abs=0.15)


def test_a_layer_solved_once_is_predicted_nearly_as_if_it_were_solved_at_every_anchor(deep, tmp_path):
    specs, every = deep.layers.specs, solved(EveryAnchor, tmp_path)
    true, guessed = dict(predict(every, specs)), dict(predict(deep, specs))
    for spec in specs:
        logs = [
            math.log(guessed[spec].surface.predict(anchor) / true[spec].surface.predict(anchor))
            for row in deep.options(spec).anchors
            for anchor in row
        ]
        lacks = spec.name not in fully_solved(specs)
        assert max(map(abs, logs)) <= (0.6 if lacks else 0.0)
        # At the one that was solved, up to where its path began.
        assert abs(logs[1]) <= (0.1 if lacks else 0.0)


def test_a_prediction_is_the_same_whatever_was_predicted_before(deep):
    specs = deep.layers.specs
    whole = dict(predict(deep, specs))
    for spec in (specs[0], specs[4 * 7 + 2]):
        ((_, alone),) = predict(deep, [spec])
        assert alone.surface == whole[spec].surface


def test_experts_of_a_block_count_together_and_other_kinds_not_at_all():
    experts = [LayerSpec(f"{name}.up", 0, "in", "up", 2, 2) for name in "ab"]
    worths = (Curve((0.25, 0.5), (0.0, 0.2)), Curve((0.25, 0.5), (0.2, 0.4)))
    level = Curve((0.2, 0.5), (0.0, -0.3))
    curves = CurvesOverDepth.of(
        [
            *((spec, AnchorCurves(level, worth)) for spec, worth in zip(experts, worths, strict=True)),
            (LayerSpec("down", 0, "in", "down", 2, 2), AnchorCurves(level, None)),
        ]
    )
    found = curves.at("up", 7, (0.2, 0.5), (0.25, 0.5))
    assert found.worth is not None
    assert found.worth.logs == pytest.approx((0.1, 0.3))
    assert found.level.logs == pytest.approx(level.logs)
    assert curves.at("down", 0, (0.2, 0.5), (0.25,)).worth is None
