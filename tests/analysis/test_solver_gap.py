"""Solver gaps: by hand, between anchors, and in the residuals of an analysis."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from globalopt.analysis.anchors import compare_solvers, solve_anchors
from globalopt.analysis.collect import write_grams, write_spans
from globalopt.analysis.grid import Options
from globalopt.analysis.layer_analysis import LayerAnalysis, read_gap
from globalopt.analysis.solver_gap import NO_GAP, SolverGap, measure_gap, sampled
from globalopt.budgets.conversion import convert_target
from globalopt.models.batch import Batch
from globalopt.models.block_runner import BlockRunner
from globalopt.models.finding import find_layers
from globalopt.runs.artefacts import GRAM
from globalopt.runs.records import AnchorSolutions
from globalopt.runs.workspace import Workspace
from globalopt.values.budget import Budget, Target
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.metric import Gram, Metric
from solvers import get_solver
from tests.tiny_models import tiny_ids, tiny_model

SPEC = LayerSpec("layer", 0, "site", "q_proj", 24, 32)
PROBE = get_solver("3basil", {"steps": "8"})


def problem(seed: int = 0) -> tuple[torch.Tensor, Metric]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, SPEC.d_in, generator=generator) * torch.linspace(0.2, 2, SPEC.d_in)
    return torch.randn(SPEC.d_out, SPEC.d_in, generator=generator), Metric(Gram(x.mT @ x / 200, 200))


def probed(weight: torch.Tensor, metric: Metric, options: Options) -> AnchorSolutions:
    anchors = [anchor for row in options.anchors for anchor in row]
    found = PROBE.solve_path(PROBE.prepare(weight, metric), anchors)
    return AnchorSolutions(options.anchors, tuple(solution.value for solution in found))


def budget_of(*specs: LayerSpec) -> Budget:
    return Budget.fraction(0.5, specs)


def spec(block: int, kind: str, d_out: int, d_in: int) -> LayerSpec:
    return LayerSpec(f"{block}.{kind}", block, f"{block}.{kind}", kind, d_out, d_in)


def test_a_layer_of_every_kind_is_sampled():
    kinds = {"q": (8, 8), "k": (4, 8), "up": (16, 8)}
    specs = [spec(block, kind, *shape) for block in range(4) for kind, shape in kinds.items()]
    again = LayerSpec("2.up.b", 2, "2.up.b", "up", 16, 8)
    assert [found.name for found in sampled([*specs, again])] == ["2.q", "2.k", "2.up"]


@pytest.mark.parametrize("name", ["3basil", "oats", "hassle-free", "sparsegpt", "eora", "svd", "slab"])
def test_gaps_are_ratios_of_errors(name):
    weight, metric = problem()
    options = Options.of(SPEC, 24)
    solver = get_solver(name, {})
    found = measure_gap(SPEC, weight, metric, probed(weight, metric, options), solver, budget_of(SPEC))
    anchors = [anchor for row in options.anchors for anchor in row]
    by_probe = PROBE.solve_path(PROBE.prepare(weight, metric), anchors)
    assert set(found) <= set(anchors)
    assert found
    for anchor, fit in zip(anchors, by_probe, strict=True):
        if anchor not in found:
            continue
        asked = convert_target(anchor, SPEC, solver, budget_of(SPEC))
        if not solver.low_rank:
            assert asked == Target(0, anchor.params(SPEC))
        shorter = solver.shorter()
        own = shorter.solve(shorter.prepare(weight, metric), asked).value.dense()
        expected = metric.error(weight - own) / metric.error(weight - fit.value.dense())
        # Fitted to all targets at once, it is as it would be alone but for rounding.
        assert found[anchor] == pytest.approx(expected, rel=0.1)


def test_a_probe_that_is_the_solver_changes_nothing_without_a_path():
    weight, metric = problem()
    rows = Options.of(SPEC, 24).anchors
    state = PROBE.prepare(weight, metric)
    alone = AnchorSolutions(rows, tuple(PROBE.solve(state, anchor).value for row in rows for anchor in row))
    found = measure_gap(SPEC, weight, metric, alone, PROBE, budget_of(SPEC))
    assert list(found) == [anchor for row in rows for anchor in row]
    assert list(found.values()) == pytest.approx([1.0] * len(found), rel=0.02)


def test_a_layer_that_does_nothing_costs_nothing_by_any_solver():
    _, metric = problem()
    weight = torch.zeros(SPEC.d_out, SPEC.d_in)
    options = Options.of(SPEC, 24)
    oats = get_solver("oats", {})
    found = measure_gap(SPEC, weight, metric, probed(weight, metric, options), oats, budget_of(SPEC))
    assert set(found.values()) == {1.0}


def test_a_kind_has_its_own_gap_and_others_the_geometric_mean():
    other = replace(SPEC, kind="up_proj")
    measured = []
    for sampled_spec, value in ((SPEC, 0.5), (other, 0.125)):
        options = Options.of(sampled_spec, 24)
        measured.append((options, {anchor: value for row in options.anchors for anchor in row}))
    gap = SolverGap.of(measured)
    target = Target(2, 300)
    assert gap.at(target, SPEC) == pytest.approx(0.5)
    assert gap.at(target, other) == pytest.approx(0.125)
    assert gap.at(target, replace(SPEC, kind="o_proj")) == pytest.approx(0.25)


def test_gaps_are_linear_in_logarithms_between_anchors():
    options = Options.of(SPEC, 24)
    rows = options.anchors
    low = {anchor: 1.0 for anchor in rows[0]}
    high = {anchor: 0.25 for anchor in rows[1]}
    gap = SolverGap.of([(options, {**low, **high})])
    assert gap.at(rows[0][1], SPEC) == pytest.approx(1.0)
    top = max(rows[1], key=lambda anchor: anchor.rank_share(SPEC))
    assert gap.at(top, SPEC) == pytest.approx(0.25)
    between = Target(1, 400)
    t = between.rank_share(SPEC) / top.rank_share(SPEC)
    assert gap.at(between, SPEC) == pytest.approx(0.25**t)
    assert NO_GAP.at(between, SPEC) == 1.0
    assert SolverGap.of([(options, {})]).at(between, SPEC) == 1.0


@pytest.mark.parametrize("pattern", [None, NM(2, 4)])
def test_residuals_are_scaled_to_what_the_solver_leaves(tmp_path, pattern):
    layers = find_layers(tiny_model("llama"), allow_low_coverage=True)
    runner = BlockRunner(layers, [Batch(tiny_ids(8, 12))])
    analysis = LayerAnalysis(layers, Workspace(tmp_path), pattern)
    write_grams(runner, analysis.work)
    write_spans(layers, analysis.work, layers.specs, "activation")
    solve_anchors(analysis, layers.specs, PROBE)
    assert read_gap(analysis) == NO_GAP
    compare_solvers(analysis, sampled(layers.specs), get_solver("oats", {"steps": "2"}), budget_of(*layers.specs))
    gap = read_gap(analysis)
    seen = []
    for spec in layers.specs:
        weight, metric = layers.weight(spec.name), Metric(analysis.work.get(GRAM, spec.site))
        plain, scaled = analysis.residuals(spec, weight), analysis.residuals(spec, weight, gap)
        for anchor in plain.anchors:
            seen.append(gap.at(anchor, spec))
            assert metric.error(scaled.at(anchor)) == pytest.approx(metric.error(plain.at(anchor)) * seen[-1], rel=0.02)
    assert max(abs(math.log(value)) for value in seen) > 0.2
