"""Spans are exact, and what is taken from them is what the options promise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from globalopt.analysis.grid import LARGEST_SHARE, Options
from globalopt.analysis.spans import SCALINGS, compute_span, input_scale
from globalopt.analysis.surfaces import calibrated_surface, span_errors
from globalopt.errors import UnknownNameError, UsageError
from globalopt.objective.candidates import take
from globalopt.runs.artefacts import SPAN
from globalopt.runs.workspace import Workspace
from globalopt.values.budget import Limits, Target
from globalopt.values.decomposition import follows
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.metric import Gram, Metric
from globalopt.values.span import Span
from globalopt.values.surface import interpolate
from solvers import get_solver
from tests.synthetic import layer

SPEC = LayerSpec("a", 0, "a", "a", 24, 40)
PATTERNS = [None, NM(2, 4)]


@pytest.fixture(scope="module")
def made():
    W, gram = layer(24, 40, 200)
    return W, gram, compute_span(W, gram)


def outputs(d_out: int) -> Gram:
    g = torch.randn(300, d_out, generator=torch.Generator().manual_seed(4)) * torch.linspace(0.1, 3, d_out)
    return Gram(g.mT @ g / 300, 300)


@pytest.mark.parametrize(("d_out", "d_in"), [(24, 40), (40, 24)])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_everything_taken_gives_back_the_weight(scaling, d_out, d_in):
    W, gram = layer(d_out, d_in, 200)
    span = compute_span(W, gram, scaling, outputs(len(W)))
    for rank in (0, span.max_rank // 2, span.max_rank):
        torch.testing.assert_close(take(span, Target(rank, W.numel())).dense(), W, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("d_out", "d_in"), [(24, 40), (40, 24)])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_span_that_was_written_has_rounded_directions_and_adds_up_to_the_weight(tmp_path, scaling, d_out, d_in):
    W, gram = layer(d_out, d_in, 200)
    span = compute_span(W, gram, scaling, outputs(len(W)))
    spec, work = LayerSpec("a", 0, "a", "a", d_out, d_in), Workspace(tmp_path)
    work.put(SPAN, spec, span.basis)
    found = work.get(SPAN, spec).span(W)
    for part in ("s", "scale", "rows"):
        assert torch.equal(getattr(found, part), getattr(span, part)), part
    for part in ("U", "Vh"):
        assert torch.equal(getattr(found, part), getattr(span, part).bfloat16().float()), part
    whole = (found.U * found.s) @ found.Vh + found.S
    torch.testing.assert_close(whole, (span.U * span.s) @ span.Vh + span.S)
    # What was read once and is written again is the same bits.
    work.put(SPAN, spec, found.basis)
    again = work.get(SPAN, spec).span(W)
    assert all(torch.equal(getattr(again, part), getattr(found, part)) for part in ("U", "Vh", "S"))


@pytest.mark.parametrize(("d_out", "d_in"), [(24, 40), (40, 24)])
def test_direct_directions_are_the_best_low_rank_approximation(d_out, d_in):
    W, gram = layer(d_out, d_in, 200)
    span = compute_span(W, gram, "direct")
    best = get_solver("svd", {"damping": "0"})
    for rank in (1, 5, 12):
        error = Metric(gram).error(W - take(span, Target(rank, 0)).dense())
        assert error == pytest.approx(best.solve(best.prepare(W, Metric(gram)), Target(rank, 0)).error, rel=1e-3)


def test_output_scaling_ranks_entries_by_their_effect_on_the_loss():
    W, gram = layer(24, 40, 200)
    A = outputs(24)
    span = compute_span(W, gram, "output", A)
    value = take(span, Target(0, 100))
    effect = W.abs() * gram.norms * (A.diagonal / A.diagonal.mean() + 1e-4).sqrt()[:, None]
    assert torch.equal(value.S != 0, effect >= effect.flatten().topk(100).values[-1])
    with pytest.raises(UsageError, match="needs their Gram A"):
        compute_span(W, gram, "output")


def test_taken_counts_are_the_targets(made):
    _, _, span = made
    value = take(span, Target(3, 100))
    assert (value.rank, value.nnz) == (3, 100)
    value = take(span, Target(2, 480, NM(2, 4)))
    assert value.nnz == 480
    assert follows(value.S, NM(2, 4))


def test_dead_inputs_keep_the_scaling_invertible():
    W, gram = layer(24, 40, 200)
    matrix = gram.matrix.clone()
    matrix[5] = matrix[:, 5] = 0
    dead = type(gram)(matrix, 200)
    assert bool((input_scale(dead, 40) > 0).all())
    assert torch.isfinite(take(compute_span(W, dead), Target(2, 50)).dense()).all()
    with pytest.raises(UnknownNameError, match="activation"):
        compute_span(W, gram, "activations")
    with pytest.raises(UsageError, match="needs the Gram"):
        compute_span(W)


def slow_errors(W: Tensor, span: Span, options: Options, metric: Metric) -> list[float]:
    """Every option cut from the span, and the entries that are dropped summed one by one."""
    found = []
    for target in options.targets:
        dropped = (W - take(span, target).dense()).double().square() * metric.inputs.diagonal.double()
        if metric.outputs is not None:
            dropped = dropped * metric.outputs.diagonal.double()[:, None]
        found.append(float(dropped.sum()))
    return found


@pytest.mark.parametrize("pattern", [None, NM(2, 4), NM(1, 4)], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["inputs", "inputs and outputs"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_span_errors_are_those_of_the_entries_that_each_option_drops(scaling, weighted, pattern):
    W, gram = layer(24, 40, 200)
    span = compute_span(W, gram, scaling, outputs(24))
    metric = Metric(gram, outputs(24) if weighted else None)
    options = Options.of(SPEC, span.max_rank, pattern)
    assert len(options.rows) > 2
    fast, slow = span_errors(span, options, metric), slow_errors(W, span, options, metric)
    assert len(fast) == len(options.targets)
    assert fast == pytest.approx(slow, rel=1e-3, abs=1e-5 * max(slow))


def test_span_errors_of_factors_alone_are_those_of_the_ranks_that_are_left():
    W, gram = layer(24, 40, 200)
    span, metric = compute_span(W, gram, "direct"), Metric(gram, outputs(24))
    options = Options.of(SPEC, span.max_rank, limits=Limits(sparse=False))
    assert options.factors
    fast, slow = span_errors(span, options, metric), slow_errors(W, span, options, metric)
    assert len(fast) == len(options.targets) > 4
    assert fast == pytest.approx(slow, rel=1e-3, abs=1e-5 * max(slow))
    assert fast[options.targets.index(Target.dense(SPEC))] == 0.0


def test_with_uncorrelated_inputs_and_gradients_span_errors_are_those_of_the_metric():
    W, gram = layer(24, 40, 200)
    A = outputs(24)
    metric = Metric(Gram(torch.diag(gram.diagonal), 200), Gram(torch.diag(A.diagonal), 300))
    span = compute_span(W, gram)
    options = Options.of(SPEC, span.max_rank)
    expected = [metric.error(W - take(span, target).dense()) for target in options.targets]
    assert span_errors(span, options, metric) == pytest.approx(expected, rel=1e-3, abs=1e-5 * max(expected))


def test_options_include_dense_and_zero_and_none_above_dense(made):
    _, _, span = made
    targets = Options.of(SPEC, span.max_rank).targets
    assert Target.dense(SPEC) in targets
    assert Target.zero() in targets
    assert all(target.params(SPEC) <= SPEC.numel for target in targets)
    assert all(target.rank * 64 <= LARGEST_SHARE * target.params(SPEC) for target in targets)
    assert len(set(targets)) == len(targets)
    assert len({target.rank for target in targets}) > 1


def test_under_a_pattern_only_the_rank_is_free(made):
    _, _, span = made
    targets = Options.of(SPEC, span.max_rank, NM(2, 4)).targets
    assert {target.nnz for target in targets} == {480}
    assert targets[0].rank == 0
    assert all(target.params(SPEC) <= SPEC.numel for target in targets)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_calibrated_surface_passes_through_its_anchors(made, pattern):
    W, gram, span = made
    metric = Metric(gram)
    options = Options.of(SPEC, span.max_rank, pattern)
    errors = span_errors(span, options, metric)
    targets = [target for row in options.anchors for target in row]
    solver = get_solver("3basil")
    found = solver.solve_path(solver.prepare(W, metric), [anchor for row in options.anchors for anchor in row])
    lost = torch.stack([W - solution.value.dense() for solution in found])
    fitted = [metric.error(E) for E in lost]
    assert len(fitted) == len(targets)
    surface = calibrated_surface(options, errors, fitted, metric.error(W))
    plain = calibrated_surface(options, errors, (), metric.error(W))
    for target, error in zip(targets, fitted, strict=True):
        if target in surface.targets:
            assert surface.predict(target) == pytest.approx(error, rel=1e-6)
        assert surface.predict(target) < plain.predict(target)


def test_prices_are_monotone_and_zero_has_a_floor():
    options = Options(SPEC, None, ((0, (0, 480, 960)),), 480)
    surface = calibrated_surface(options, [0.1, 0.5, 0.0], (), zero_error=2.0)
    assert surface.error == (2.0, 0.5, 0.0)
    assert calibrated_surface(options, [0.1, 0.5, 0.0], (), zero_error=0.0).error == (0.5, 0.5, 0.0)


def test_rank_is_worth_what_the_anchors_with_rank_say_whatever_the_span_says():
    spec = LayerSpec("layer", 0, "layer", "gate_proj", 640, 480)
    options = Options.of(spec, spec.max_rank)
    # A span that loses much where a little is kept as rank.
    hump = [(1 - t.params(spec) / spec.numel) * (4.0 if 0 < t.rank < 10 else 1.0) for t in options.targets]
    assert any(0 < rank < 10 for rank, _ in options.rows)
    anchors = [target for row in options.anchors for target in row]
    fitted = {anchor: (1 - anchor.params(spec) / spec.numel) ** 2 * (0.5 if anchor.rank else 1.0) for anchor in anchors}
    surface = calibrated_surface(options, hump, list(fitted.values()), 1.0)
    most = max(anchor.rank_share(spec) for anchor in options.anchors[1])

    def without_rank(kept: float) -> float:
        """The span's error 1 - kept times what is linear in logarithms between the anchors without rank."""
        ratios = [math.log(1 - anchor) for anchor in (0.07, 0.22, 0.55)]
        return (1 - kept) * math.exp(interpolate((0.07, 0.22, 0.55), ratios, kept))

    anchored = (0.25, 0.5)
    worth = [math.log(0.5 * (1 - kept) ** 2 / without_rank(kept)) for kept in anchored]
    for share in (0.04, 0.1, 0.15, 0.2, 0.25):
        target = min(
            (t for t in options.targets if t.nnz < spec.numel),
            key=lambda t: abs(t.params(spec) / spec.numel - 0.4) + abs(t.rank_share(spec) - share),
        )
        kept, x = target.params(spec) / spec.numel, target.rank_share(spec) / most
        expected = without_rank(kept) * math.exp(x * (2 - x) * interpolate(anchored, worth, kept))
        assert surface.predict(target) == pytest.approx(expected, rel=0.02)
    dense = surface.predict(Target.dense(spec))
    assert dense == 0.0
