"""Solutions with rank in some blocks alone, and what they say about the others."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from globalopt.analysis.anchors import solve_anchors
from globalopt.analysis.collect import write_grams, write_spans
from globalopt.analysis.layer_analysis import LayerAnalysis
from globalopt.analysis.predictions import predict
from globalopt.analysis.rank_worth import EVERY, FIRST, RankWorths, Worth, ranked
from globalopt.analysis.solver_gap import sampled
from globalopt.models.layers import find_layers
from globalopt.models.walk import Batch, BlockRunner
from globalopt.reference.tiny import tiny_llama
from globalopt.runs.artefacts import ANCHORS
from globalopt.runs.workspace import Workspace
from globalopt.values.budget import Target
from globalopt.values.layer import LayerSpec
from solvers import get_solver

SOLVER = get_solver("3basil", {"steps": "10"})


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> LayerAnalysis:
    """The analysis of a model of seven blocks up to anchor solutions; not to be changed."""
    layers, work = find_layers(tiny_llama(blocks=7), allow_low_coverage=True), Workspace(tmp_path_factory.mktemp("run"))
    write_grams(BlockRunner(layers, [Batch(torch.arange(128).view(8, 16) % 64)]), work)
    write_spans(layers, work, layers.specs, "activation")
    analysis = LayerAnalysis(layers, work)
    solve_anchors(analysis, layers.specs, SOLVER)
    return analysis


def test_every_kind_is_solved_with_rank_at_both_ends_and_between():
    depth = 40
    specs = [LayerSpec(f"{b}.{kind}", b, "in", kind, 2, 2) for b in range(depth) for kind in ("up", "down")]
    # A kind of few blocks: all of them.
    specs += [LayerSpec(f"{b}.gate", b, "in", "gate", 2, 2) for b in (5, 6, 30)]
    names = ranked(specs)
    blocks = sorted(int(name.split(".")[0]) for name in names if name.endswith("up"))
    assert blocks[:FIRST] == list(range(FIRST))
    assert blocks[-1] == depth - 1
    assert max(b - a for a, b in pairwise(blocks)) <= EVERY
    assert len(blocks) <= FIRST + 1 + depth / EVERY
    assert {"5.gate", "6.gate", "30.gate"} <= names
    assert {spec.name for spec in sampled(specs)} <= names


def test_a_layer_in_between_has_no_solution_with_rank_and_yet_a_price_of_it(deep):
    layers = deep.layers
    lacking = [spec for spec in layers.specs if spec.name not in ranked(layers.specs)]
    assert {spec.block for spec in lacking} == {4}
    found = dict(predict(deep, layers.specs))
    assert set(found) == set(layers.specs)
    for spec in lacking:
        solutions = deep.work.get(ANCHORS, spec)
        assert {target.rank for target in solutions.anchors} == {0}
        overlap = found[spec].overlap
        assert overlap is not None
        assert overlap.shape == (len(solutions.anchors),) * 2
        half, few = deep.options(spec).anchors[1][-1], deep.options(spec).sharing(0.5, 0.0)

        def worth(block: int, spec: LayerSpec = spec, half: Target = half, few: Target = few) -> float:
            """Log of what a share of rank is worth at half of the weights, in a block where it was solved."""
            (same,) = (other for other in layers.of_block(block) if other.kind == spec.kind)
            surface = found[same].surface
            return math.log(surface.predict(half) / surface.predict(few))

        # Options are interpolated, so that it holds roughly.
        assert worth(spec.block) == pytest.approx((worth(3) + worth(5)) / 2, abs=0.1)


def test_a_prediction_is_the_same_whatever_was_predicted_before(deep):
    specs = deep.layers.specs
    whole = dict(predict(deep, specs))
    for spec in (specs[0], specs[4 * 7 + 2]):
        ((_, alone),) = predict(deep, [spec])
        assert alone.surface == whole[spec].surface


def test_all_layers_are_solved_with_rank_where_that_is_asked_for(deep):
    every = LayerAnalysis(deep.layers, deep.work, all_ranked=True)
    assert all(len(every.anchor_rows(spec)) == 2 for spec in deep.layers.specs)


def test_experts_of_a_block_count_together_and_other_kinds_not_at_all():
    experts = [LayerSpec(f"{name}.up", 0, "in", "up", 2, 2) for name in "ab"]
    curves = (Worth((0.25, 0.5), (0.0, 0.2)), Worth((0.25, 0.5), (0.2, 0.4)))
    worths = RankWorths.of(list(zip(experts, curves, strict=True)))
    found = worths.at("up", 7, (0.25, 0.5))
    assert found is not None
    assert found.logs == pytest.approx((0.1, 0.3))
    assert worths.at("down", 0, (0.25,)) is None
