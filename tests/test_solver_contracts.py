"""Laws every solver of the table obeys."""

from __future__ import annotations

import math

import pytest
import torch

from globalopt.errors import CalibrationError, NumericalError, UsageError
from globalopt.protocols import Solver
from globalopt.types import NM, Decomposition, Gram, Metric, Status, Target, follows
from solvers import SOLVERS
from tests.synthetic import metric

pytestmark = pytest.mark.parametrize("solver", [cls() for cls in SOLVERS.values()], ids=list(SOLVERS))

D_OUT, D_IN = 16, 24
NUMEL = D_OUT * D_IN
CHAOS = 0.1  # a search over supports amplifies differences of rounding; on layers this small, to single weights


def fit(solver: Solver, W, norm, target, start=None):
    return solver.solve(solver.prepare(W, norm), target, start)


def undamped(W, G, value) -> float:
    """`tr(E G Eᵀ)` in float64, from scratch."""
    E = W.double() - value.S.double() - value.U.double() @ value.V.double()
    return float(torch.trace(E @ G.double() @ E.mT))


def targets(solver: Solver) -> list[Target]:
    ranks = (0, 3, D_OUT) if solver.low_rank else (0,)
    counts = (0, 1, 131, NUMEL - 1, NUMEL)
    found = [Target(rank, nnz) for rank in ranks for nnz in counts]
    if solver.patterns:
        for pattern in (NM(2, 4), NM(1, 8), NM(2, 3)):
            found += [Target(rank, NUMEL // pattern.of * pattern.keep, pattern) for rank in ranks]
    return found


def middle(solver: Solver) -> Target:
    return Target(2 if solver.low_rank else 0, 131)


def test_counts_pattern_and_reported_error(solver):
    W, norm = metric(D_OUT, D_IN, 300)
    state = solver.prepare(W, norm)
    energy = undamped(W, norm.inputs.matrix, Decomposition(torch.zeros_like(W), W[:, :0], W[:0]))
    for target in targets(solver):
        solution = solver.solve(state, target)
        value = solution.value
        assert value.nnz <= target.nnz, target
        assert value.rank <= target.rank, target
        assert value.fits(target), target
        assert target.pattern is None or follows(value.S, target.pattern)
        assert value.S.dtype == value.U.dtype == value.V.dtype == torch.float32
        expected = undamped(W, norm.inputs.matrix, value)
        assert solution.error == pytest.approx(expected, rel=1e-4, abs=1e-6 * energy), target
        assert solution.error <= energy * (1 + 1e-6), target
        assert solution.stats["damping"] >= 0
        assert solution.stats["steps"] >= 0


def test_budget_is_used(solver):
    W, norm = metric(D_OUT, D_IN, 300)
    assert fit(solver, W, norm, middle(solver)).value.nnz == 131


def test_inputs_are_not_modified(solver):
    W, norm = metric(D_OUT, D_IN, 300)
    G = norm.inputs.matrix
    before = W.clone(), G.clone()
    state = solver.prepare(W, norm)
    first = solver.solve(state, middle(solver))
    assert torch.equal(W, before[0])
    assert torch.equal(G, before[1])
    # Nor is the state: another target in between changes nothing.
    solver.solve(state, Target(0, 40))
    again = solver.solve(state, middle(solver))
    fresh = fit(solver, W, norm, middle(solver))
    for other in (again, fresh):
        assert torch.equal(first.value.S, other.value.S)
        assert torch.equal(first.value.U, other.value.U)
        assert torch.equal(first.value.V, other.value.V)
        assert first.error == other.error


def test_everything_kept_is_exact_and_nothing_kept_is_zero(solver):
    W, norm = metric(D_OUT, D_IN, 300)
    state = solver.prepare(W, norm)
    zero = solver.solve(state, Target.zero())
    assert not zero.value.dense().any()
    assert zero.error == pytest.approx(norm.error(W))
    assert solver.solve(state, Target(0, NUMEL)).error <= 1e-9 * zero.error


def test_answer_scales_with_the_weight(solver):
    W, norm = metric(D_OUT, D_IN, 300)
    small, large = fit(solver, W, norm, middle(solver)), fit(solver, 4 * W, norm, middle(solver))
    torch.testing.assert_close(large.value.dense(), 4 * small.value.dense())


def test_gram_scale_changes_only_the_error(solver):
    W, norm = metric(D_OUT, D_IN, 300)
    once = fit(solver, W, norm, middle(solver))
    scaled = fit(solver, W, Metric(Gram(1e3 * norm.inputs.matrix, 300)), middle(solver))
    assert scaled.error == pytest.approx(1e3 * once.error, rel=CHAOS)
    binary = fit(solver, W, Metric(Gram(1024 * norm.inputs.matrix, 300)), middle(solver))
    assert torch.equal(binary.value.dense(), once.value.dense())
    assert binary.error == 1024 * once.error


def test_permuting_outputs_permutes_the_answer(solver):
    W, norm = metric(D_OUT, D_IN, 300)
    order = torch.randperm(D_OUT, generator=torch.Generator().manual_seed(3))
    straight, permuted = fit(solver, W, norm, middle(solver)), fit(solver, W[order], norm, middle(solver))
    if solver.low_rank:
        assert permuted.error == pytest.approx(straight.error, rel=CHAOS)
    else:
        torch.testing.assert_close(permuted.value.dense(), straight.value.dense()[order])


def test_never_worse_than_a_feasible_start(solver):
    W, norm = metric(D_OUT, D_IN, 300)
    target = middle(solver)
    own = fit(solver, W, norm, target)
    # A start no solver can beat: the weight is made so that it fits exactly.
    made = W + own.value.dense() - W
    exact = Decomposition(own.value.S, own.value.U, own.value.V)
    solution = fit(solver, made, norm, target, exact)
    assert solution.error <= norm.error(made - exact.dense())
    empty = Decomposition(torch.zeros_like(W), W[:, :0], W[:0])
    assert fit(solver, W, norm, target, empty).error == own.error
    # More nonzeros than the target allows: not a start.
    assert fit(solver, W, norm, target, Decomposition(W, W[:, :0], W[:0])).error == own.error


def test_dead_inputs_cost_no_budget(solver):
    W, norm = metric(D_OUT, D_IN, 300)
    dead = torch.zeros(D_IN, dtype=torch.bool)
    dead[4:16] = True
    G = norm.inputs.matrix.masked_fill(dead | dead[:, None], 0.0)
    W = W.masked_fill(dead, 50.0)
    solver_needs_inputs = solver.needs > 0
    solution = fit(solver, W, Metric(Gram(G, 300)), middle(solver))
    assert math.isfinite(solution.error)
    if solver_needs_inputs:
        assert not solution.value.S[:, dead].any()
        assert solution.value.nnz == 131
    # More budget than live weights: these are all there.
    full = fit(solver, W, Metric(Gram(G, 300)), Target(0, NUMEL - 1))
    if solver_needs_inputs:
        assert full.error <= 1e-6 * norm.error(W)


def test_fewer_tokens_than_inputs(solver):
    W, norm = metric(D_OUT, D_IN, 6)
    solution = fit(solver, W, norm, middle(solver))
    assert solution.error == pytest.approx(undamped(W, norm.inputs.matrix, solution.value), rel=1e-3)
    assert solution.status is not Status.FALLBACK


def test_one_row_and_one_column(solver):
    W, norm = metric(1, D_IN, 300)
    assert fit(solver, W, norm, Target(0, 7)).value.nnz == 7
    assert fit(solver, W[:, :1], Metric(Gram(norm.inputs.matrix[:1, :1], 300)), Target.zero()).value.nnz == 0
    if solver.low_rank:
        assert fit(solver, W, norm, Target(1, 7)).error <= 1e-9 * norm.error(W)


def test_half_precision_weights(solver):
    W, norm = metric(D_OUT, D_IN, 300)
    half = W.bfloat16()
    expected = fit(solver, half.float(), norm, middle(solver))
    solution = fit(solver, half, norm, middle(solver))
    assert torch.equal(solution.value.dense(), expected.value.dense())
    assert solution.error == expected.error


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_tiny_and_huge_activations(solver, scale):
    W, norm = metric(D_OUT, D_IN, 300)
    scaled = Metric(Gram(scale * norm.inputs.matrix, 300))
    for target in targets(solver):
        assert fit(solver, W, scaled, target).error <= scaled.error(W)
    ours, plain = fit(solver, W, scaled, middle(solver)).error, fit(solver, W, norm, middle(solver)).error
    assert ours / scale == pytest.approx(plain, rel=CHAOS)


def test_equal_weights(solver):
    W, norm = torch.ones(D_OUT, D_IN), Metric(Gram(torch.eye(D_IN), 300))
    for target in targets(solver):
        assert fit(solver, W, norm, target).value.fits(target)


def test_a_zero_weight_is_reproduced(solver):
    _, norm = metric(D_OUT, D_IN, 300)
    for target in targets(solver):
        assert fit(solver, torch.zeros(D_OUT, D_IN), norm, target).error == 0


def test_output_metric_is_ignored(solver):
    W, norm = metric(D_OUT, D_IN, 300)
    outputs = Gram(torch.diag(torch.arange(1.0, D_OUT + 1)), 300)
    plain = fit(solver, W, norm, middle(solver))
    both = fit(solver, W, Metric(norm.inputs, outputs), middle(solver))
    assert both.error == plain.error


def test_refuses_what_it_cannot_do(solver):
    W, norm = metric(D_OUT, D_IN, 300)
    state = solver.prepare(W, norm)
    with pytest.raises(UsageError, match="sign"):
        solver.solve(state, Target(0, 10, signs=True))
    with pytest.raises(UsageError, match="nonzeros"):
        solver.solve(state, Target(0, NUMEL + 1))
    with pytest.raises(UsageError, match="largest rank"):
        solver.solve(state, Target(D_OUT + 1, 10))
    with pytest.raises(UsageError, match="multiple"):
        solver.solve(state, Target(0, 10, NM(1, 5)))
    if not solver.low_rank:
        with pytest.raises(UsageError, match=r"fold the rank.*40 more"):
            solver.solve(state, Target(1, 10))


def test_refuses_broken_layers(solver):
    W, norm = metric(D_OUT, D_IN, 300)
    with pytest.raises(NumericalError, match="NaN"):
        solver.prepare(W.clone().index_fill_(0, torch.tensor([2]), math.nan), norm)
    with pytest.raises(UsageError, match=r"\(16, 23\)"):
        solver.prepare(W[:, 1:], norm)
    with pytest.raises(CalibrationError):
        solver.prepare(W, Metric(Gram(torch.full((D_IN, D_IN), math.inf), 300)))
