"""Ratios of the solver's errors to those of quick fits: by hand, between anchors, and in the fits of a search."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from globalopt.analysis.collect import span_layers
from globalopt.analysis.fit_ratio import NOT_COMPARED, FitRatio, measure_ratios, sampled
from globalopt.analysis.fits import compare_fits, fit_layers
from globalopt.analysis.grid import Options
from globalopt.analysis.surfaces import fit_anchors
from globalopt.budgets.conversion import for_solver
from globalopt.models.layers import find_layers
from globalopt.models.walk import Batch, BlockRunner
from globalopt.protocols import Solver
from globalopt.runs.folder import Run
from globalopt.values.budget import Budget, Target
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.metric import Gram, Metric
from solvers import get_solver
from tests.tiny_models import tiny_ids, tiny_model

SPEC = LayerSpec("layer", 0, "site", "q_proj", 24, 32)
QUICK = get_solver("3basil", {"steps": "8"})


def problem(seed: int = 0) -> tuple[torch.Tensor, Metric]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, SPEC.d_in, generator=generator) * torch.linspace(0.2, 2, SPEC.d_in)
    return torch.randn(SPEC.d_out, SPEC.d_in, generator=generator), Metric(Gram(x.mT @ x / 200, 200))


def lost(weight: torch.Tensor, metric: Metric, options: Options) -> torch.Tensor:
    return fit_anchors(weight, metric, options, QUICK)


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
def test_ratios_are_of_the_errors(name):
    weight, metric = problem()
    options = Options.of(SPEC, 24)
    solver = get_solver(name, {})
    found = measure_ratios(weight, metric, options, lost(weight, metric, options), solver, budget_of(SPEC))
    anchors = [anchor for row in options.anchors for anchor in row]
    quick = QUICK.solve_path(QUICK.prepare(weight, metric), anchors)
    assert set(found) <= set(anchors)
    assert found
    for anchor, fit in zip(anchors, quick, strict=True):
        if anchor not in found:
            continue
        asked = for_solver(anchor, SPEC, solver, budget_of(SPEC))
        if not solver.low_rank:
            assert asked == Target(0, anchor.params(SPEC))
        own = solver.solve(solver.prepare(weight, metric), asked).value.dense()
        expected = metric.error(weight - own) / metric.error(weight - fit.value.dense())
        # Fitted to all targets at once, it is as it would be alone but for rounding.
        assert found[anchor] == pytest.approx(expected, rel=0.1)


def test_a_quick_solver_that_is_the_solver_changes_nothing_without_a_path():
    """A path's first target is fitted from nothing, as the solver fits it."""
    weight, metric = problem()
    options = Options.of(SPEC, 24)
    found = measure_ratios(weight, metric, options, lost(weight, metric, options), QUICK, budget_of(SPEC))
    first = min(found, key=lambda target: (target.nnz, target.rank))
    assert found[first] == pytest.approx(1.0, rel=0.02)


def test_a_layer_that_does_nothing_costs_nothing_by_any_solver():
    _, metric = problem()
    weight = torch.zeros(SPEC.d_out, SPEC.d_in)
    options = Options.of(SPEC, 24)
    oats = get_solver("oats", {})
    found = measure_ratios(weight, metric, options, lost(weight, metric, options), oats, budget_of(SPEC))
    assert set(found.values()) == {1.0}


def test_a_kind_has_its_own_ratio_and_others_the_geometric_mean():
    other = replace(SPEC, kind="up_proj")
    measured = []
    for sampled_spec, value in ((SPEC, 0.5), (other, 0.125)):
        options = Options.of(sampled_spec, 24)
        measured.append((options, {anchor: value for row in options.anchors for anchor in row}))
    ratio = FitRatio.of(measured)
    target = Target(2, 300)
    assert ratio.at(target, SPEC) == pytest.approx(0.5)
    assert ratio.at(target, other) == pytest.approx(0.125)
    assert ratio.at(target, replace(SPEC, kind="o_proj")) == pytest.approx(0.25)


def test_ratios_are_linear_in_logarithms_between_anchors():
    options = Options.of(SPEC, 24)
    rows = options.anchors
    low = {anchor: 1.0 for anchor in rows[0]}
    high = {anchor: 0.25 for anchor in rows[1]}
    ratio = FitRatio.of([(options, {**low, **high})])
    assert ratio.at(rows[0][1], SPEC) == pytest.approx(1.0)
    top = max(rows[1], key=lambda anchor: anchor.rank_share(SPEC))
    assert ratio.at(top, SPEC) == pytest.approx(0.25)
    between = Target(1, 400)
    t = between.rank_share(SPEC) / top.rank_share(SPEC)
    assert ratio.at(between, SPEC) == pytest.approx(0.25**t)
    assert NOT_COMPARED.at(between, SPEC) == 1.0
    assert FitRatio.of([(options, {})]).at(between, SPEC) == 1.0


@pytest.mark.parametrize("pattern", [None, NM(2, 4)])
def test_fits_are_scaled_to_what_the_solver_leaves(tmp_path, pattern):
    layers = find_layers(tiny_model("llama"), allow_low_coverage=True)
    runner = BlockRunner(layers, [Batch(tiny_ids(8, 12))])

    def errors(name: str, solver: Solver | None) -> tuple[dict[LayerSpec, dict[Target, float]], FitRatio]:
        run = Run.start(tmp_path / name, {}, {})
        span_layers(runner, run, "activation", keep_inputs=False)
        ratio = NOT_COMPARED
        if solver is not None:
            budget = budget_of(*layers.specs)
            ratio = compare_fits(layers, run, pattern, QUICK, solver, budget, lambda spec: None)
            # What is written is read, not measured again.
            assert compare_fits(layers, run, pattern, QUICK, QUICK, budget, lambda spec: None) == ratio
        unfitted = [spec for spec in layers.specs if not run.fits_path(spec).exists()]
        assert set(unfitted) == {*layers.specs} - ({*sampled(layers.specs)} if solver else set())
        fit_layers(layers, unfitted, run, pattern, QUICK, lambda spec: None, ratio=ratio)
        found = {}
        for spec in layers.specs:
            rows, lost = run.read_fits(spec)
            anchors = [anchor for row in rows for anchor in row]
            metric = Metric(run.read_gram(spec.site))
            found[spec] = {anchor: metric.error(E.float()) for anchor, E in zip(anchors, lost, strict=True)}
        return found, ratio

    quick, _ = errors("quick", None)
    own, ratio = errors("own", get_solver("oats", {"steps": "2"}))
    seen = []
    for spec in layers.specs:
        for anchor, error in quick[spec].items():
            seen.append(ratio.at(anchor, spec))
            assert own[spec][anchor] == pytest.approx(error * seen[-1], rel=0.02)
    assert max(abs(math.log(value)) for value in seen) > 0.2
