"""Grids of few bits: nearest levels, codes that come back, fits that lower the error and keep the support."""

from __future__ import annotations

import itertools

import pytest
import torch

from globalopt.kernels import grid
from globalopt.kernels.cholesky import damped_cholesky, obs_factor
from globalopt.kernels.grid import codes, fit_scales, largest_scales, levels, snap, spread
from globalopt.kernels.grid_fit import grid_descent, grid_sweep, joint_descent
from globalopt.kernels.straight_through import straight_levels
from globalopt.rounding.stored import GridNorm, completed, spread_over, stored
from globalopt.values.decomposition import Decomposition, follows
from globalopt.values.layer import NM
from globalopt.values.metric import Gram, Metric
from globalopt.values.storage import BITS, GROUP, Storage

SHAPES = ((24, 40), (7, 130))


def problem(d_out: int, d_in: int, kept: float = 0.5):
    generator = torch.Generator().manual_seed(d_out)
    W = torch.randn(d_out, d_in, generator=generator)
    x = torch.randn(4 * d_in, d_in, generator=generator) @ torch.randn(d_in, d_in, generator=generator)
    S = W * (W.abs() > W.abs().flatten().kthvalue(int((1 - kept) * W.numel()) + 1).values - 1e-9)
    return W, S, x.mT @ x / len(x)


@pytest.mark.parametrize("bits", [bits for bits in BITS if bits < 16])
@pytest.mark.parametrize("mid_tread", [False, True])
def test_every_number_goes_to_the_nearest_level_and_its_code_brings_it_back(bits, mid_tread):
    numbers = torch.randn(300, generator=torch.Generator().manual_seed(bits))
    numbers[:20] *= 1e-3
    chosen = largest_scales(numbers, bits, GROUP) if mid_tread else fit_scales(numbers, bits, GROUP, mid_tread=False)
    assert bool(((chosen < 0) == mid_tread).all())
    scales = spread(chosen, GROUP, 300)
    every = torch.arange(2**bits, dtype=torch.uint8)[None].expand(300, -1)
    table = levels(every, scales[:, None], bits)
    nearest = (table - numbers[:, None]).abs().amin(1)
    found = snap(numbers, scales, bits)
    # Between the two levels about zero the sign decides, which are 2^-9 of a scale apart on a mid-tread grid.
    assert bool(((found - numbers).abs() <= nearest + scales.abs() * 2e-3 * mid_tread + 1e-6).all())
    assert bool((found != 0).all())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        again = levels(codes(found.to(dtype).float(), scales, bits), scales, bits)
        assert torch.equal(again, found), dtype


def test_the_scale_of_least_error_is_chosen_and_all_are_bfloat16():
    numbers = torch.cat([torch.full((3,), 0.6), torch.tensor([1.9])])
    plain, weighted = fit_scales(numbers, 3, 64), fit_scales(numbers, 3, 64, (numbers < 1).float())
    assert weighted != plain
    assert torch.equal(plain, plain.bfloat16().float())
    assert fit_scales(torch.zeros(3), 4, 64).tolist() == [0.0]


@pytest.mark.parametrize("mid_tread", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_scales_are_those_of_trying_all_for_each_group_alone(mid_tread, weighted):
    generator = torch.Generator().manual_seed(0)
    numbers, weights = torch.randn(2 * grid.GROUPS_AT_ONCE * 8 + 3, generator=generator), None
    if weighted:
        weights = torch.rand(len(numbers), generator=generator)
    found = fit_scales(numbers, 4, 8, weights, mid_tread)
    assert len(found) == -(-len(numbers) // 8)
    for g in (0, grid.GROUPS_AT_ONCE - 1, grid.GROUPS_AT_ONCE, len(found) - 1):
        some = slice(8 * g, 8 * g + 8)
        group, weight = numbers[some], torch.tensor(1.0) if weights is None else weights[some]

        def error(scale: torch.Tensor, group: torch.Tensor = group, weight: torch.Tensor = weight) -> float:
            return float(((snap(group, scale, 4) - group).double().square() * weight).sum())

        shrinks = (*grid.SHRINKS, *(-shrink for shrink in grid.TREAD_SHRINKS if mid_tread))
        best = min(error((shrink * group.abs().max() / 7.5).bfloat16().float()) for shrink in shrinks)
        assert error(found[g]) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [3, 5])
def test_fits_beat_rounding_to_the_nearest_level_on_the_same_support(shape, bits):
    W, S, G = problem(*shape)
    norm, metric = GridNorm.of(G), Metric(Gram(G, 100))
    support = S != 0
    scales = torch.zeros_like(S).masked_scatter_(
        support, spread(fit_scales(S[support], bits, GROUP), GROUP, int(support.sum()))
    )
    nearest = snap(S, scales, bits)
    swept = norm.sweep(S, scales, bits)
    fitted = grid_descent(W, swept, scales, bits, norm.matrix, passes=2)
    assert metric.error(W - fitted) < min(metric.error(W - swept), metric.error(W - nearest))
    for found in (nearest, swept, fitted):
        assert torch.equal(found != 0, support)


def test_small_weights_of_large_inputs_are_rounded_to_nearly_zero():
    """Half-integer levels would ruin small weights in a column whose inputs are hundreds of times larger."""
    W, _, _ = problem(24, 128, kept=1.0)
    x = torch.randn(512, 128, generator=torch.Generator().manual_seed(0))
    W[:, 5], x[:, 5] = W[:, 5] / 100, x[:, 5] * 300
    gram = Gram(x.mT @ x / len(x), 512)
    metric, value = Metric(gram), Decomposition(W, W[:, :0], W[:0])
    weights = gram.diagonal.expand_as(W).flatten()
    half_integers = spread(fit_scales(W.flatten(), 4, GROUP, weights, mid_tread=False), GROUP, W.numel()).view_as(W)
    found = stored(value, W, metric, Storage(4, 4))
    assert found.scales is not None
    assert found.scales.S is not None
    assert bool((found.scales.S < 0).any())
    assert metric.error(W - found.dense()) < 0.1 * metric.error(W - snap(W, half_integers, 4))
    usual = spread(largest_scales(W.flatten(), 4, GROUP), GROUP, W.numel()).view_as(W)
    assert metric.error(W - found.dense()) < metric.error(W - snap(W, usual, 4))


def test_half_integer_levels_are_chosen_where_no_number_is_near_zero():
    numbers = torch.randn(64 * 50, generator=torch.Generator().manual_seed(0))
    pruned = numbers[numbers.abs() > 0.7]
    assert float((fit_scales(pruned, 3, GROUP) > 0).float().mean()) > 0.8


def test_the_sweep_begins_with_the_largest_inputs():
    """From left to right, large inputs at the end would have nothing to their right that makes up for them."""
    W, _, G = problem(24, 40, kept=1.0)
    size = torch.logspace(0, 2, 40)
    G = G * size * size[:, None]
    norm, metric = GridNorm.of(G), Metric(Gram(G, 100))
    assert norm.order.tolist() == G.diagonal().argsort(descending=True).tolist()
    grids = spread(largest_scales(W.flatten(), 4, GROUP), GROUP, W.numel()).view_as(W)
    R = obs_factor(damped_cholesky(norm.matrix.flip(0, 1), 0.0).factor)
    in_place = grid_sweep(W, grids, 4, R)
    assert metric.error(W - norm.sweep(W, grids, 4)) < 0.9 * metric.error(W - in_place)


def test_descent_stops_where_no_single_level_lowers_the_error():
    W, S, G = problem(5, 9)
    scales = (S != 0) * 0.4
    found = grid_descent(W, snap(S, scales, 3), scales, 3, G, passes=50)
    metric = Metric(Gram(G, 10))
    least = metric.error(W - found)
    for i, j in (S != 0).nonzero().tolist():
        for code in range(8):
            other = found.clone()
            other[i, j] = (code - 3.5) * 0.4
            assert metric.error(W - other) >= least * (1 - 1e-5)


@pytest.mark.parametrize("storage", [Storage(8, 8), Storage(4, 8), Storage(3, 5), Storage(16, 6), Storage(5, 16)])
@pytest.mark.parametrize("outputs", [False, True])
def test_stored_parts_lie_on_their_grids_and_keep_rank_and_support(storage, outputs):
    W, S, G = problem(24, 40)
    A = problem(8, 24)[2] if outputs else None
    U, _, V = torch.linalg.svd(W - S)
    value = Decomposition(S, U[:, :4], V[:4])
    metric = Metric(Gram(G, 100), None if A is None else Gram(A, 100))
    found = stored(value, W, metric, storage)
    assert (found.storage, found.rank) == (storage, 4)
    assert torch.equal(found.S != 0, S != 0)
    parts = {"S": found.S[found.S != 0], "U": found.U.mT.flatten(), "V": found.V.flatten()}
    for name, numbers in parts.items():
        bits = storage.values if name == "S" else storage.factors
        scales = getattr(found.scales, name)
        if bits == 16:
            assert scales is None
            continue
        each = spread(scales, GROUP, len(numbers))
        torch.testing.assert_close(levels(codes(numbers, each, bits), each, bits), numbers)


def test_more_bits_cost_less_error():
    W, S, G = problem(24, 40)
    U, s, V = torch.linalg.svd(W - S)
    value, metric = Decomposition(S, U[:, :4] * s[:4], V[:4]), Metric(Gram(G, 100))
    errors = [metric.error(W - stored(value, W, metric, Storage(bits, 8)).dense()) for bits in (3, 4, 5, 6, 8)]
    assert errors == sorted(errors, reverse=True)


def test_groups_of_a_pattern_are_filled_up():
    S = torch.zeros(2, 8)
    S[0, 3] = 1.0
    filled = completed(S, NM(2, 4))
    assert follows(filled, NM(2, 4))
    assert int(filled.count_nonzero()) == 8
    torch.testing.assert_close(filled, S)


def test_the_sweep_of_a_whole_matrix_beats_rounding_to_the_nearest_level():
    W, _, G = problem(24, 40, kept=1.0)
    norm, metric = GridNorm.of(G), Metric(Gram(G, 100))
    scales = spread(fit_scales(W.flatten(), 4, GROUP), GROUP, W.numel()).view_as(W)
    assert metric.error(W - norm.sweep(W, scales, 4)) < 0.7 * metric.error(W - snap(W, scales, 4))


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_that_make_up_for_each_other_lower_the_joint_error_and_never_raise_it(shape):
    W, S, G = problem(*shape)
    A = problem(5, shape[0])[2]
    A += 0.01 * A.diagonal().mean() * torch.eye(len(A))
    norm, metric = GridNorm.of(G), Metric(Gram(G, 100), Gram(A, 100))
    levels, scales = norm.fit(S, S, 3)
    grids, errors = spread_over(levels, scales), []
    for passes in range(4):
        found = joint_descent(W, levels, grids, 3, G, A, passes)
        assert torch.equal(found != 0, S != 0)
        errors.append(metric.error(W - found))
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]


def test_every_entry_of_the_factors_has_a_code_also_where_the_weight_has_none():
    W = problem(24, 70)[0]
    W[:, 5], W[3] = 0, 0
    U, s, V = torch.linalg.svd(W, full_matrices=False)
    U[3], V[:, 5] = 0, 0
    value, metric = Decomposition(W * 0, U[:, :4] * s[:4], V[:4]), Metric(Gram(problem(24, 70)[2], 100))
    found = stored(value, W, metric, Storage(16, 4))
    assert (found.scales.U.numel(), found.scales.V.numel()) == (-(-24 * 4 // GROUP), -(-70 * 4 // GROUP))  # pyright: ignore[reportOptionalMemberAccess]
    assert bool((found.U != 0).all() and (found.V != 0).all())


def test_levels_of_mid_tread_grids_pass_gradients_as_those_of_others_do():
    x = torch.tensor([0.2, -0.9, 7.0, -3.4], requires_grad=True)
    log_scales = torch.zeros(1, requires_grad=True)
    with torch.enable_grad():
        found = straight_levels(x, log_scales, bits=3, group=4, mid_tread=torch.tensor([True]))
        found.sum().backward()
    assert found.tolist() == pytest.approx([0.0, -1.0, 3.0, -3.0], abs=0.01)
    assert x.grad is not None
    assert log_scales.grad is not None
    assert x.grad.tolist() == [1.0, 1.0, 0.0, 1.0]
    assert log_scales.grad.item() == pytest.approx(found.sum().item())
    torch.testing.assert_close(found, snap(x, torch.tensor(-1.0), 3))
