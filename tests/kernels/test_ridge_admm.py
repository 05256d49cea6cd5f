from __future__ import annotations

import contextlib
import math
from itertools import pairwise

import pytest
import torch

from globalopt.kernels import ridge_admm as kernel
from globalopt.kernels.norm import Norm, Side
from globalopt.kernels.projection import keep_weights
from globalopt.kernels.ridge_admm import Schedule, SparseAndSubspace, StackedLayer, ridge_admm
from globalopt.kernels.support_refit import refit
from globalopt.values.budget import Target
from globalopt.values.decomposition import follows
from globalopt.values.layer import NM
from solvers._admm import AdmmSearch
from tests.kernels.norms import best_low_rank, correlated, matrices, problem, root, side, squared, unit

BOTH = pytest.mark.parametrize("weighted", [False, True], ids=["G", "A,G"])
RISE = Schedule(0.05, 0.8, steps=60, hold=4)


def keeper(nnz, pattern=None):
    return lambda magnitudes, size, exact: keep_weights(magnitudes, math.ceil(size * nnz), pattern)


def alone(W, norm, rank, nnz, schedule=RISE, start=None, pattern=None):
    """The fit of a single layer, and the run it came from."""
    part = StackedLayer(slice(0, len(W)), norm.outputs, rank, keeper(nnz, pattern))
    found = ridge_admm(W, norm.inputs, [part], schedule, None if start is None else [start])
    return found.fits[0], found


def residual(W, fit):
    return W - fit.S - fit.subspace.U @ fit.subspace.factor(W - fit.S)


def literal(W, norm, rank, nnz, schedule, start=None):
    """The loop of the docstring with every product written out: dense systems, roots of `A` and of `G`."""
    A, G = matrices(norm, W.shape)
    half = root(A)
    U, L = None, torch.zeros_like(W)
    ahead = 0
    Z = Y = torch.zeros_like(W)
    if start is not None:
        Z, L = start.S, start.subspace.U @ start.subspace.U.mT @ A @ (W - start.S)
        Y = torch.where(Z == 0, A @ (W - Z - L) @ G, 0.0)
    step, rests = 0, False
    support = Z != 0
    while step < schedule.steps and not rests:
        exact = step >= kernel.EXACT_FROM * schedule.steps
        penalty, seen = schedule.penalty(step), support
        for _ in range(min(schedule.hold, schedule.steps - step)):
            R = A @ (W - L - ahead) @ G - Y + penalty * Z
            system = torch.kron(A, G) + penalty * torch.eye(W.numel()).double()
            S = torch.linalg.solve(system, R.flatten()).view_as(W)
            proposal = S + Y / penalty
            count = math.ceil(schedule.size(step) * nnz)
            support = torch.zeros(W.numel(), dtype=torch.bool)
            support[proposal.abs().flatten().argsort(descending=True)[:count]] = True
            support = support.view_as(W)
            Z = torch.where(support, proposal, 0.0)
            Y = Y + penalty * (S - Z)
            M = W - S
            before, first = L, U is None
            if rank and U is None:
                U = torch.linalg.svd(half @ M @ root(G)).U[:, :rank]
            elif U is not None:
                U = torch.linalg.qr(half @ M @ G @ M.mT @ half @ U).Q
            if U is not None:
                L = torch.linalg.solve(half, U @ U.mT @ half @ M)
                ahead = 0 if first else kernel.MOMENTUM * (L - before)
            step += 1
        if schedule.size(step - 1) == 1:
            moved, left = float((support != seen).sum() / support.sum()), schedule.steps - step
            rests = exact and left >= schedule.hold and moved * left / schedule.hold <= kernel.SETTLED_SHARE
    return Z, L if U is None else torch.linalg.solve(half, U @ U.mT @ half @ (W - Z)), step


@BOTH
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("steps", [1, 2, 3, 22])
def test_every_step_is_the_formulas(weighted, rank, steps):
    W, norm = problem((6, 9), weighted)
    schedule = Schedule(0.05, 0.8, steps, hold=3)
    fit, found = alone(W, norm, rank, 20, schedule)
    S, L, taken = literal(W, norm, rank, 20, schedule)
    torch.testing.assert_close(fit.S, S)
    torch.testing.assert_close(W - fit.S - residual(W, fit), L)
    assert (found.steps, fit.subspace.rank) == (taken, rank)


@BOTH
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("steps", [1, 2, 14])
def test_every_step_of_a_warm_start_is_the_formulas(weighted, rank, steps):
    W, norm = problem((6, 9), weighted)
    neighbour, _ = alone(W, norm, rank, 12)
    schedule = Schedule(0.05, 0.8, steps, hold=3, begun=0.3, grown=0.6)
    fit, found = alone(W, norm, rank, 20, schedule, neighbour)
    S, L, taken = literal(W, norm, rank, 20, schedule, neighbour)
    torch.testing.assert_close(fit.S, S)
    torch.testing.assert_close(W - fit.S - residual(W, fit), L)
    assert found.steps == taken


@pytest.mark.parametrize("weighted", [(), (0, 1, 2), (1,)], ids=["G", "A,G", "some A,G"])
def test_stacked_layers_are_solved_as_if_alone(weighted):
    sizes, ranks, counts = (6, 4, 7), (2, 0, 1), (20, 9, 30)
    W, norm = problem((sum(sizes), 9), False)
    assert norm.inputs is not None
    schedule = Schedule(0.05, 0.8, steps=20, hold=4)
    parts, expected, begin = [], [], 0
    for seed, (size, rank, nnz) in enumerate(zip(sizes, ranks, counts, strict=True)):
        rows = slice(begin, begin + size)
        outputs = side(unit(correlated(size, seed))) if seed in weighted else None
        parts.append(StackedLayer(rows, outputs, rank, keeper(nnz)))
        expected.append(literal(W[rows], Norm(norm.inputs, outputs), rank, nnz, schedule))
        begin += size
    before = W.clone()
    found = ridge_admm(W, norm.inputs, parts, schedule)
    assert torch.equal(W, before)
    # They end together; alone none of them ends before.
    assert {found.steps, *(steps for _, _, steps in expected)} == {20}
    for part, fit, (S, L, _) in zip(parts, found.fits, expected, strict=True):
        torch.testing.assert_close(fit.S, S)
        torch.testing.assert_close(fit.subspace.U @ fit.subspace.factor(W[part.rows] - fit.S), L)


def test_a_warm_start_of_stacked_layers_keeps_them_apart():
    W, norm = problem((10, 9), False)
    assert norm.inputs is not None
    rows, ranks, counts = (slice(0, 6), slice(6, 10)), (2, 1), (20, 9)
    outputs = [side(unit(correlated(part.stop - part.start, part.start))) for part in rows]
    parts = [
        StackedLayer(r, A, rank, keeper(nnz)) for r, A, rank, nnz in zip(rows, outputs, ranks, counts, strict=True)
    ]
    starts = ridge_admm(W, norm.inputs, parts, RISE).fits
    schedule = Schedule(0.05, 0.8, steps=6, hold=6, begun=0.5, grown=0.8)
    found = ridge_admm(W, norm.inputs, parts, schedule, starts)
    for part, fit, start, nnz in zip(parts, found.fits, starts, counts, strict=True):
        S, _, _ = literal(W[part.rows], Norm(norm.inputs, part.outputs), part.rank, nnz, schedule, start)
        torch.testing.assert_close(fit.S, S)


# ------------------------------------------------------------------------------------------------- schedules


def test_the_penalty_rises_along_its_formula():
    schedule = Schedule(0.02, 5.0, steps=50, hold=1)
    penalties = [schedule.penalty(step) for step in range(50)]
    assert penalties[0] == 0.02
    assert all(before < after < 5.0 for before, after in pairwise(penalties))
    assert penalties[20] == pytest.approx(0.02 * 250 ** (0.4**1.3))


def test_a_warm_start_skips_a_share_of_the_rise():
    cold, warm = Schedule(0.02, 5.0, steps=50, hold=1), Schedule(0.02, 5.0, steps=50, hold=1, begun=0.4)
    assert warm.penalty(0) == pytest.approx(cold.penalty(20))
    assert warm.penalty(25) == pytest.approx(cold.penalty(35))


def test_the_support_grows_to_its_full_size():
    schedule = Schedule(1.0, 2.0, steps=50, hold=1, grown=0.2, full=0.5)
    sizes = [schedule.size(step) for step in range(50)]
    assert sizes[0] == pytest.approx(0.2 + 0.8 / 25)
    assert sizes[9] == pytest.approx(0.2 + 0.8 * 10 / 25)
    assert all(before < after for before, after in pairwise(sizes[:25]))
    assert all(size == 1 for size in sizes[25:])
    assert Schedule(1.0, 2.0, steps=50, hold=1, grown=1.0).size(0) == 1


@BOTH
def test_the_support_starts_empty_and_grows_to_its_count(weighted):
    W, norm = problem((12, 20), weighted)
    asked = []

    def keep(magnitudes, size, exact):
        asked.append(size)
        return keep_weights(magnitudes, math.ceil(size * 80))

    schedule = Schedule(0.05, 0.8, steps=40, hold=4)
    assert norm.inputs is not None
    found = ridge_admm(W, norm.inputs, [StackedLayer(slice(0, 12), norm.outputs, 2, keep)], schedule)
    assert asked == [schedule.size(step) for step in range(found.steps)]
    assert asked[0] < 0.1
    assert int(found.fits[0].S.count_nonzero()) == 80


def test_products_and_counts_are_exact_for_the_last_steps(monkeypatch):
    W, norm = problem((12, 20), False)
    assert norm.inputs is not None
    asked, switched = [], []

    def keep(magnitudes, size, exact):
        asked.append(exact)
        return keep_weights(magnitudes, math.ceil(size * 80))

    @contextlib.contextmanager
    def watched(tensor):
        yield lambda: switched.append(len(asked))

    monkeypatch.setattr(kernel, "fast_products", watched)
    schedule = Schedule(0.05, 0.8, steps=40, hold=4)
    found = ridge_admm(W, norm.inputs, [StackedLayer(slice(0, 12), None, 2, keep)], schedule)
    assert found.steps == 40
    assert switched[0] == 28
    assert asked == [False] * 28 + [True] * 12


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_counts_are_exact_however_few_steps_there_are(steps):
    W, norm = problem((256, 260), False)  # so many entries that thresholds are estimated from some of them
    search = AdmmSearch(steps, rounds=0)
    assert int(search.run([W], [norm], [Target(0, 30_000)]).fits[0].S.count_nonzero()) == 30_000


@pytest.mark.parametrize("weighted", [False, True])
def test_changes_in_bfloat16_end_where_float32_does(monkeypatch, weighted):
    errors, solved = [], []
    exact_ridge = kernel.ridge

    def counted(*arguments):
        pair = exact_ridge(*arguments)
        return pair._replace(exact=lambda R: solved.append(1) or pair.exact(R))

    monkeypatch.setattr(kernel, "ridge", counted)
    W, norm = problem((48, 64), weighted)
    norm = Norm(*(each and Side(each.matrix.float(), each.factor.float()) for each in (norm.inputs, norm.outputs)))
    assert norm.inputs is not None

    def keep(magnitudes, size, exact):
        return keep_weights(magnitudes, math.ceil(size * 1200))

    for rough in (False, True):
        monkeypatch.setattr(kernel, "rough_products", lambda tensor, rough=rough: rough)
        solved.clear()
        layer = StackedLayer(slice(0, 48), norm.outputs, 4, keep)
        found = ridge_admm(W.float(), norm.inputs, [layer], Schedule(0.05, 0.8, steps=60, hold=6))
        (fit,) = found.fits
        E = W.float() - fit.S
        E = E - fit.subspace.U @ fit.subspace.factor(E)
        errors.append(squared(norm, E))
        # Once after every change of the penalty, or at every step.
        assert len(solved) == (math.ceil(found.steps / 6) if rough else found.steps)
    assert errors[0] != errors[1]
    # Another support of so few entries is worth a few percent, either way.
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


def test_a_support_at_rest_ends_only_once_it_is_counted_exactly():
    W, norm = problem((12, 20), False)
    assert norm.inputs is not None
    fixed = keep_weights(W.abs(), 80)
    asked = []

    def keep(magnitudes, size, exact):
        asked.append(exact)
        return fixed if exact else keep_weights(W.abs(), 79)

    schedule = Schedule(0.05, 0.8, steps=60, hold=5, full=0.2)
    found = ridge_admm(W, norm.inputs, [StackedLayer(slice(0, 12), None, 2, keep)], schedule)
    # Exact from step 45 on; between 45 and 50 one entry came, after 50 none.
    assert asked == [False] * 45 + [True] * 10
    assert (found.steps, found.moved) == (55, 0)
    assert torch.equal(found.fits[0].S != 0, fixed)


def test_a_slow_change_near_the_end_is_rest():
    W, norm = problem((12, 20), False)
    inputs = norm.inputs
    assert inputs is not None

    def steps(moving):
        """Steps taken where `moving` of 200 entries are others after every change of the penalty."""
        seen = []

        def keep(magnitudes, size, exact):
            seen.append(size)
            mask = torch.zeros(240)
            shift = len(seen) // 5 % 2 * moving
            mask[shift : shift + 200] = 1
            return mask.view(12, 20).to(magnitudes.dtype)

        schedule = Schedule(0.05, 0.8, steps=60, hold=5, full=0.1)
        return ridge_admm(W, inputs, [StackedLayer(slice(0, 12), None, 2, keep)], schedule).steps

    assert steps(40) == 60
    # One out and one in, of 200: at that pace the last five steps would move a hundredth.
    assert steps(1) == 55


# ------------------------------------------------------------------------------------------------- what it finds


@BOTH
def test_patterns_hold_at_the_end(weighted):
    W, norm = problem((12, 20), weighted)
    fit, _ = alone(W, norm, 2, 120, pattern=NM(2, 4))
    assert follows(fit.S, NM(2, 4))
    assert int(fit.S.count_nonzero()) == 120


@BOTH
def test_a_warm_start_from_its_own_solution_stays_there(weighted):
    W, norm = problem((24, 32), weighted)
    fit, _ = alone(W, norm, 2, 200, Schedule(0.05, 0.8, steps=120, hold=8))
    again, _ = alone(W, norm, 2, 200, Schedule(0.05, 0.8, steps=24, hold=8, begun=0.9, grown=1.0), fit)
    stayed = (again.S != 0) & (fit.S != 0)
    assert int(stayed.sum()) >= 190
    assert squared(norm, residual(W, again)) <= 1.01 * squared(norm, residual(W, fit))


def test_white_inputs_and_rank_zero_keep_the_largest_weights():
    W = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)).double()
    fit, _ = alone(W, Norm(side(torch.eye(10).double())), 0, 20, Schedule(0.5, 5.0, steps=200, hold=4))
    torch.testing.assert_close(fit.S, W * keep_weights(W.abs(), 20), rtol=0, atol=1e-3)


@BOTH
def test_a_search_beats_the_largest_entries(weighted):
    W, norm = problem((24, 32), weighted)
    fit, _ = alone(W, norm, 0, 200)
    assert squared(norm, residual(W, fit)) < 0.7 * squared(norm, W * ~keep_weights(W.abs(), 200))
    low_rank = best_low_rank(W, norm, 2)
    largest = W * keep_weights((W - low_rank).abs(), 200)
    fit, _ = alone(W, norm, 2, 200)
    M = W - largest
    assert squared(norm, residual(W, fit)) < 0.7 * squared(norm, M - best_low_rank(M, norm, 2))


@BOTH
def test_recovers_a_sparse_plus_low_rank_matrix(weighted):
    generator = torch.Generator().manual_seed(0)
    _, norm = problem((30, 40), weighted)
    L = torch.randn(30, 2, generator=generator) @ torch.randn(2, 40, generator=generator)
    S = torch.zeros(1200)
    S[torch.randperm(1200, generator=generator)[:60]] = 10.0
    S = S.view(30, 40)
    fit, found = alone((S + L).double(), norm, 2, 60, Schedule(0.01, 5.0, steps=400, hold=8))
    assert torch.equal(fit.S != 0, S != 0)
    assert found.steps < 400
    assert found.moved == 0
    # It ends with the support, before the values are at their optimum; the refit of every solver brings them there.
    refitted = SparseAndSubspace(*refit((S + L).double(), *fit, norm, rounds=2, steps=4))
    assert float(residual((S + L).double(), refitted).norm() / (S + L).norm()) < 0.05


def test_the_share_that_moved_is_of_the_last_change_of_the_penalty():
    W, norm = problem((24, 32), False)
    supports = []

    def keep(magnitudes, size, exact):
        supports.append(keep_weights(magnitudes, math.ceil(size * 200)))
        return supports[-1]

    assert norm.inputs is not None
    found = ridge_admm(W, norm.inputs, [StackedLayer(slice(0, 24), None, 2, keep)], RISE)
    assert found.steps == len(supports) == 60
    assert found.moved == int((supports[-1] != supports[-5]).sum()) / 200
    unsettled = alone(W, norm, 2, 200, Schedule(0.05, 0.8, steps=3, hold=1, full=1.0))[1]
    assert unsettled.moved > 0
