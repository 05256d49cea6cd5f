"""Laws every solver of the table obeys."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from globalopt.errors import CalibrationError, NumericalError, UsageError
from globalopt.protocols import Outputs, Solver
from globalopt.types import NM, Decomposition, Gram, Metric, Status, Target, follows
from solvers import SOLVERS
from tests.synthetic import metric

pytestmark = pytest.mark.parametrize("solver", [cls() for cls in SOLVERS.values()], ids=list(SOLVERS))

D_OUT, D_IN = 16, 24
NUMEL = D_OUT * D_IN
CHAOS = 0.1  # a search over supports amplifies differences of rounding; on layers this small, to single weights


def fit(solver: Solver, W, norm, target, start=None):
    return solver.solve(solver.prepare(W, norm), target, start)


def weighted(norm: Metric, seed: int = 5) -> Metric:
    """`norm` with correlated outputs of very different importance."""
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(200, D_OUT, generator=generator) @ torch.randn(D_OUT, D_OUT, generator=generator)
    gradients = gradients * torch.logspace(-1.5, 0, D_OUT)
    return Metric(norm.inputs, Gram(gradients.mT @ gradients / 200, 200))


def undamped(W, norm: Metric, value) -> float:
    """`tr(A E G Eᵀ)` in float64, from scratch."""
    L = value.U.double() @ value.V.double()
    if value.signs is not None:
        L = L * value.signs.double()
    E = W.double() - value.S.double() - L
    A = torch.eye(len(W), dtype=torch.float64) if norm.outputs is None else norm.outputs.matrix.double()
    return float(torch.trace(A @ E @ norm.inputs.matrix.double() @ E.mT))


def target_of(solver: Solver, rank: int, nnz: int, pattern: NM | None = None) -> Target:
    return Target(rank, nnz, pattern, signs=solver.signs)


def zero(solver: Solver) -> Target:
    return target_of(solver, 0, 0)


def targets(solver: Solver) -> list[Target]:
    ranks = (0, 3, D_OUT) if solver.low_rank else (0,)
    counts = (0, 1, 131, NUMEL - 1, NUMEL) if solver.sparse else (0, NUMEL)
    found = [target_of(solver, rank, nnz) for rank in ranks for nnz in counts]
    if solver.patterns:
        for pattern in (NM(2, 4), NM(1, 4), NM(4, 8), NM(2, 8), NM(2, 3)):
            found += [target_of(solver, rank, NUMEL // pattern.of * pattern.keep, pattern) for rank in ranks]
    return found


def middle(solver: Solver) -> Target:
    return target_of(solver, 2 if solver.low_rank else 0, 131 if solver.sparse else 0)


def empty(W) -> Decomposition:
    return Decomposition(torch.zeros_like(W), W[:, :0], W[:0])


@pytest.mark.parametrize("outputs", [False, True], ids=["G", "A,G"])
def test_counts_pattern_and_reported_error(solver, outputs):
    W, norm = metric(D_OUT, D_IN, 300)
    norm = weighted(norm) if outputs else norm
    state = solver.prepare(W, norm)
    energy = undamped(W, norm, empty(W))
    for target in targets(solver):
        solution = solver.solve(state, target)
        value = solution.value
        assert value.nnz <= target.nnz, target
        assert value.rank <= target.rank, target
        assert value.fits(target), target
        assert target.pattern is None or follows(value.S, target.pattern)
        assert value.S.dtype == value.U.dtype == value.V.dtype == torch.float32
        expected = undamped(W, norm, value)
        assert solution.error == pytest.approx(expected, rel=1e-4, abs=1e-6 * energy), target
        if not outputs or solver.outputs is Outputs.FULL:
            assert solution.error <= energy * (1 + 1e-6), target
        assert solution.stats["damping"] >= 0
        assert solution.stats["steps"] >= 0


def test_budget_is_used(solver):
    W, norm = metric(D_OUT, D_IN, 300)
    value = fit(solver, W, norm, middle(solver)).value
    assert value.nnz == middle(solver).nnz
    assert value.rank == middle(solver).rank


def test_inputs_are_not_modified(solver):
    W, norm = metric(D_OUT, D_IN, 300)
    G = norm.inputs.matrix
    before = W.clone(), G.clone()
    state = solver.prepare(W, norm)
    first = solver.solve(state, middle(solver))
    assert torch.equal(W, before[0])
    assert torch.equal(G, before[1])
    # Nor is the state: another target in between changes nothing.
    solver.solve(state, target_of(solver, 1 if solver.low_rank else 0, 40 if solver.sparse else 0))
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
    nothing = solver.solve(state, zero(solver))
    assert not nothing.value.dense().any()
    assert nothing.error == pytest.approx(norm.error(W))
    assert solver.solve(state, target_of(solver, 0, NUMEL)).error <= 1e-9 * nothing.error


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
    exact = own.value
    solution = fit(solver, made, norm, target, exact)
    assert solution.error <= norm.error(made - exact.dense())
    nothing = fit(solver, W, norm, zero(solver)).value
    assert fit(solver, W, norm, target, nothing).error == own.error
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
        assert solution.value.nnz == middle(solver).nnz
    # More budget than live weights: these are all there.
    if solver_needs_inputs and solver.sparse:
        full = fit(solver, W, Metric(Gram(G, 300)), target_of(solver, 0, NUMEL - 1))
        assert full.error <= 1e-6 * norm.error(W)


def test_fewer_tokens_than_inputs(solver):
    W, norm = metric(D_OUT, D_IN, 6)
    solution = fit(solver, W, norm, middle(solver))
    assert solution.error == pytest.approx(undamped(W, norm, solution.value), rel=1e-3)
    assert solution.status is not Status.FALLBACK


def test_one_row_and_one_column(solver):
    W, norm = metric(1, D_IN, 300)
    if solver.sparse:
        assert fit(solver, W, norm, target_of(solver, 0, 7)).value.nnz == 7
    assert fit(solver, W[:, :1], Metric(Gram(norm.inputs.matrix[:1, :1], 300)), zero(solver)).value.nnz == 0
    if solver.low_rank:
        assert fit(solver, W, norm, target_of(solver, 1, 7 if solver.sparse else 0)).error <= 1e-6 * norm.error(W)


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


def test_outputs_count_as_much_as_asked(solver):
    W, norm = metric(D_OUT, D_IN, 300)
    full, target = weighted(norm), middle(solver)
    plain = replace(solver, outputs=Outputs.NONE)
    ignored = fit(plain, W, full, target).value
    assert torch.equal(ignored.dense(), fit(plain, W, norm, target).value.dense())
    if solver.low_rank:
        # With a low-rank part every solver can spend on the rows that count.
        rows = fit(replace(solver, outputs=Outputs.ROWS), W, full, target)
        assert rows.error < full.error(W - ignored.dense())


def test_the_scale_of_the_output_gram_changes_only_the_error(solver):
    W, norm = metric(D_OUT, D_IN, 300)
    full = weighted(norm)
    assert full.outputs is not None
    once = fit(solver, W, full, middle(solver))
    binary = fit(solver, W, Metric(norm.inputs, Gram(1024 * full.outputs.matrix, 300)), middle(solver))
    assert torch.equal(binary.value.dense(), once.value.dense())
    assert binary.error == 1024 * once.error


def test_outputs_that_the_loss_does_not_feel(solver):
    W, norm = metric(D_OUT, D_IN, 300)
    outputs = torch.diag(torch.arange(D_OUT) % 2.0)
    half = fit(solver, W, Metric(norm.inputs, Gram(outputs, 300)), middle(solver))
    assert math.isfinite(half.error)
    none = fit(solver, W, Metric(norm.inputs, Gram(torch.zeros(D_OUT, D_OUT), 300)), middle(solver))
    assert none.error == 0
    plain = fit(solver, W, norm, middle(solver)).value
    torch.testing.assert_close(none.value.dense(), plain.dense())


def test_permuting_inputs_permutes_the_answer(solver):
    W, norm = metric(D_OUT, D_IN, 300)
    order = torch.randperm(D_IN, generator=torch.Generator().manual_seed(3))
    permuted = Metric(Gram(norm.inputs.matrix[order][:, order], 300))
    straight, other = fit(solver, W, norm, middle(solver)), fit(solver, W[:, order], permuted, middle(solver))
    # A sweep from left to right depends on the order of columns; nothing else may.
    sweeps = solver.name in ("sparsegpt", "eora", "hassle-free", "slab")
    assert other.error == pytest.approx(straight.error, rel=0.5 if sweeps else CHAOS)


def test_single_precision_is_enough(solver):
    W, norm = metric(D_OUT, D_IN, 300)
    precise = Metric(Gram(norm.inputs.matrix.double(), 300))
    single, double = fit(solver, W, norm, middle(solver)), fit(solver, W.double(), precise, middle(solver))
    assert double.value.S.dtype == torch.float64
    assert single.error == pytest.approx(double.error, rel=CHAOS)


def test_a_path_fits_every_target(solver):
    W, norm = metric(D_OUT, D_IN, 300)
    state = solver.prepare(W, norm)
    rank = 2 if solver.low_rank else 0
    wanted = [target_of(solver, rank, nnz) for nnz in ((160, 60, 130, 0, NUMEL) if solver.sparse else (0, NUMEL, 0))]
    path = solver.solve_path(state, wanted)
    assert len(path) == len(wanted)
    for target, found in zip(wanted, path, strict=True):
        assert found.value.fits(target)
        assert found.error == pytest.approx(undamped(W, norm, found.value), rel=1e-4, abs=1e-6 * norm.error(W))
        assert found.error <= 1.4 * solver.solve(state, target).error + 1e-9 * norm.error(W)


def test_a_singular_gram_reports_its_damping(solver):
    W, _ = metric(D_OUT, D_IN, 300)
    x = torch.randn(D_IN, generator=torch.Generator().manual_seed(1))
    constant = Metric(Gram(torch.outer(x, x), 300))
    undamped_options = {name: 0.0 for name in ("damping", "diagonal_damping") if hasattr(solver, name)}
    bare = replace(solver, **undamped_options)
    solution = fit(bare, W, constant, middle(solver))
    assert math.isfinite(solution.error)
    if undamped_options:
        assert solution.stats["damping"] > 0
        assert solution.status is Status.FALLBACK


def test_refuses_what_it_cannot_do(solver):
    W, norm = metric(D_OUT, D_IN, 300)
    state = solver.prepare(W, norm)
    with pytest.raises(UsageError, match="sign"):
        solver.solve(state, Target(0, 10, signs=not solver.signs))
    with pytest.raises(UsageError, match="nonzeros"):
        solver.solve(state, Target(0, NUMEL + 1))
    with pytest.raises(UsageError, match="largest rank"):
        solver.solve(state, Target(D_OUT + 1, 10))
    with pytest.raises(UsageError, match="multiple"):
        solver.solve(state, Target(0, 10, NM(1, 5)))
    if not solver.sparse:
        with pytest.raises(UsageError, match=r"fold them into rank.*2 more"):
            solver.solve(state, Target(1, 100))
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
