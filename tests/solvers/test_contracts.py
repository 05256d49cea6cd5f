"""Laws every solver of the table obeys, and what its options turn it into."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch

from globalopt.errors import CalibrationError, NumericalError, UsageError
from globalopt.protocols import Outputs, Solver
from globalopt.values.budget import Target
from globalopt.values.decomposition import Decomposition, Status, follows
from globalopt.values.layer import NM
from globalopt.values.metric import Gram, Metric
from solvers import SOLVERS, get_solver
from solvers.eora import EoRA, Pruning
from solvers.hassle_free import HassleFree, SparseStep
from solvers.magnitude import Magnitude
from solvers.oats import OATS
from solvers.slab import SLaB
from solvers.sparsegpt import SparseGPT
from solvers.three_basil import AdmmPreset, ThreeBASiL
from solvers.wanda import Wanda
from tests.synthetic import metric

VARIANTS: dict[str, Solver] = {name: cls() for name, cls in SOLVERS.items()} | {
    "magnitude, rows": Magnitude(outputs=Outputs.ROWS),
    "wanda, layer": Wanda(per_row=False, outputs=Outputs.ROWS),
    "sparsegpt, layer": SparseGPT(column_block=8, layer_wide=True, outputs=Outputs.ROWS),
    "eora, magnitude": EoRA(Pruning.MAGNITUDE, outputs=Outputs.ROWS),
    "eora, wanda": EoRA(Pruning.WANDA, outputs=Outputs.ROWS),
    "oats, layer": OATS(steps=20, per_row=False, outputs=Outputs.ROWS),
    "alps, full": get_solver("alps", {"outputs": "full"}),
    "hassle-free, alps": HassleFree(SparseStep.ALPS, steps=5, sparse_steps=20),
    "hassle-free, rows": HassleFree(steps=10, column_block=8, layer_wide=False, outputs=Outputs.ROWS),
    "3basil, fast": ThreeBASiL(AdmmPreset.FAST),
    "3basil, rows": ThreeBASiL(steps=40, outputs=Outputs.ROWS),
    "slab, published": SLaB(refit=0, search=0),
}

pytestmark = pytest.mark.parametrize("solver", VARIANTS.values(), ids=VARIANTS.keys())

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


def ends(solver: Solver) -> list[Target]:
    """Some of `targets`: none, some and all of the nonzeros, and one pattern, with as little and as much rank."""
    ranked = [target for target in targets(solver) if target.rank in (0, D_OUT)]
    return [t for t in ranked if (t.pattern == NM(2, 4) if t.pattern else t.nnz in (0, 131, NUMEL))]


def keeps_all(solver: Solver) -> bool:
    """Tell whether the solver keeps layers whole, or not at all."""
    return not solver.sparse and not solver.low_rank


def middle(solver: Solver) -> Target:
    if keeps_all(solver):
        return Target(0, NUMEL)
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


@pytest.mark.parametrize("outputs", [False, True], ids=["G", "A,G"])
def test_inputs_are_not_modified(solver, outputs):
    W, norm = metric(D_OUT, D_IN, 300)
    norm = weighted(norm) if outputs else norm
    start = fit(solver, W, norm, middle(solver)).value
    given = [W, norm.inputs.matrix, start.S, start.U, start.V]
    given += [] if norm.outputs is None else [norm.outputs.matrix]
    before = [tensor.clone() for tensor in given]
    state = solver.prepare(W, norm)
    first = solver.solve(state, middle(solver))
    solver.solve(state, middle(solver), start)
    solver.solve_site([(W, norm, middle(solver)), (W, norm, middle(solver))])
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, before, strict=True))
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


@pytest.mark.parametrize("outputs", [False, True], ids=["G", "A,G"])
def test_never_worse_than_a_feasible_start(solver, outputs):
    W, norm = metric(D_OUT, D_IN, 300)
    norm = weighted(norm) if outputs else norm
    target = middle(solver)
    own = fit(solver, W, norm, target)
    # A start no solver can beat: the weight is made so that it fits exactly.
    solution = fit(solver, own.value.dense(), norm, target, own.value)
    assert solution.error == 0
    # One that a solver without outputs, or in a hurry, cannot beat is better only in the whole metric.
    better = fit(ThreeBASiL(AdmmPreset.BEST), W, norm, Target(target.rank, target.nnz)).value
    better = replace(better, signs=torch.ones_like(W)) if solver.signs else better
    assert fit(solver, W, norm, target, better).error <= norm.error(W - better.dense())
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
    if solver_needs_inputs and not keeps_all(solver):
        assert not solution.value.S[:, dead].any()
        assert solution.value.nnz == middle(solver).nnz
    # More budget than live weights: these are all there.
    if solver_needs_inputs and solver.sparse:
        full = fit(solver, W, Metric(Gram(G, 300)), target_of(solver, 0, NUMEL - 1))
        assert full.error <= 1e-6 * norm.error(W)


@pytest.mark.parametrize("shape", [(24, 16), (40, 8)], ids=str)
def test_more_outputs_than_inputs(solver, shape):
    W, norm = metric(shape[0], shape[1], 300)
    state = solver.prepare(W, norm)
    nnz = W.numel() // 3 if solver.sparse else 0
    for rank in (0, 3, min(shape)) if solver.low_rank else (0,):
        target = target_of(solver, rank, nnz)
        solution = solver.solve(state, target)
        assert (solution.value.rank, solution.value.nnz) == (rank, nnz)
        assert solution.error == pytest.approx(undamped(W, norm, solution.value), rel=1e-4, abs=1e-6 * norm.error(W))
        # As many directions as there are leave nothing, but for SLaB, whose signs they carry too.
        if rank == min(shape) and not solver.signs:
            assert solution.error <= 1e-6 * norm.error(W)


@pytest.mark.parametrize("outputs", [False, True], ids=["G", "A,G"])
def test_more_budget_means_less_error(solver, outputs):
    W, norm = metric(D_OUT, D_IN, 300)
    norm = weighted(norm) if outputs and solver.outputs is not Outputs.NONE else norm
    state = solver.prepare(W, norm)
    if keeps_all(solver):
        grown = [(0, 0), (0, NUMEL)]
    elif solver.sparse:
        grown = [(0, 40), (0, 100), (0, 200), (0, NUMEL - 1)]
    else:
        grown = [(1, 0), (4, 0), (9, 0), (D_OUT, 0)]
    errors = [solver.solve(state, target_of(solver, rank, nnz)).error for rank, nnz in grown]
    assert all(after < 0.9 * before for before, after in pairwise(errors))
    assert errors[-1] <= 0.01 * norm.error(W)
    if solver.low_rank and solver.sparse:
        ranked = [solver.solve(state, target_of(solver, rank, 100)).error for rank in (0, 1, 4)]
        assert ranked[1] < 0.9 * ranked[0]
        # A second pair of factors shares its signs with the first.
        assert solver.signs or ranked[2] < 0.9 * ranked[1]


def test_a_parameter_that_is_a_view(solver):
    W, norm = metric(D_OUT, D_IN, 300)
    view = W.mT.contiguous().mT.requires_grad_()
    assert not view.is_contiguous()
    solution, plain = fit(solver, view, norm, middle(solver)), fit(solver, W, norm, middle(solver))
    assert solution.error == pytest.approx(plain.error, rel=CHAOS)
    assert not any(part.requires_grad for part in (solution.value.S, solution.value.U, solution.value.V))


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
    for target in ends(solver):
        assert fit(solver, W, scaled, target).error <= scaled.error(W)
    ours, plain = fit(solver, W, scaled, middle(solver)).error, fit(solver, W, norm, middle(solver)).error
    assert ours / scale == pytest.approx(plain, rel=CHAOS)


def test_equal_weights(solver):
    W, norm = torch.ones(D_OUT, D_IN), Metric(Gram(torch.eye(D_IN), 300))
    for target in ends(solver):
        assert fit(solver, W, norm, target).value.fits(target)


def test_a_layer_that_sees_only_zeros_is_fitted(solver):
    W, _ = metric(D_OUT, D_IN, 300)
    zeros = Metric(Gram(torch.zeros(D_IN, D_IN), 300))
    for target in (middle(solver), zero(solver)):
        solution = fit(solver, W, zeros, target)
        assert solution.error == 0
        assert torch.isfinite(solution.value.dense()).all()
        assert solution.value.fits(target)


def test_a_zero_weight_is_reproduced(solver):
    _, norm = metric(D_OUT, D_IN, 300)
    for target in ends(solver):
        assert fit(solver, torch.zeros(D_OUT, D_IN), norm, target).error == 0


def test_outputs_count_as_much_as_asked(solver):
    if "outputs" not in {field.name for field in fields(solver)}:
        assert solver.outputs is Outputs.NONE
        return
    W, norm = metric(D_OUT, D_IN, 300)
    full, target = weighted(norm), middle(solver)
    plain = replace(solver, outputs=Outputs.NONE)
    ignored = fit(plain, W, full, target).value
    assert torch.equal(ignored.dense(), fit(plain, W, norm, target).value.dense())
    # Without a low-rank part, only one whose rows share a count can spend more on the rows that count.
    if solver.low_rank or not getattr(solver, "per_row", False):
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


@pytest.mark.parametrize("outputs", [False, True], ids=["G", "A,G"])
def test_a_site_is_fitted_layer_by_layer(solver, outputs):
    W, norm = metric(D_OUT, D_IN, 300)
    counts = (0, 60, NUMEL, 150) if solver.sparse else (0, NUMEL, 0, NUMEL)
    layers = []
    for i, nnz in enumerate(counts):
        metrics = weighted(norm, seed=i) if outputs else norm
        layers.append((W * (i + 1), metrics, target_of(solver, 2 if solver.low_rank else 0, nnz)))
    found = solver.solve_site(layers)
    assert len(found) == len(layers)
    for (weight, metrics, target), solution in zip(layers, found, strict=True):
        alone = fit(solver, weight, metrics, target)
        assert (solution.value.rank, solution.value.nnz) == (alone.value.rank, alone.value.nnz)
        energy = metrics.error(weight)
        assert solution.error == pytest.approx(undamped(weight, metrics, solution.value), rel=1e-4, abs=1e-6 * energy)
        assert solution.error == pytest.approx(alone.error, rel=3 * CHAOS, abs=1e-6 * energy)


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
    for target in (middle(solver), target_of(solver, middle(solver).rank, 0)):
        solution = fit(bare, W, constant, target)
        assert math.isfinite(solution.error)
        if undamped_options:
            assert solution.stats["damping"] > 0, target
            assert solution.status is Status.FALLBACK, target


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
    if keeps_all(solver):
        for target in (Target(0, 100), Target(1, 0), Target(1, NUMEL)):
            with pytest.raises(UsageError, match=r"every weight of a layer or none, .* fewer bits"):
                solver.solve(state, target)
        return
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
    with pytest.raises(UsageError, match="15 outputs"):
        solver.prepare(W, Metric(norm.inputs, Gram(torch.eye(D_OUT - 1), 300)))
    with pytest.raises(CalibrationError):
        solver.prepare(W, Metric(Gram(torch.full((D_IN, D_IN), math.inf), 300)))
