from __future__ import annotations

import pytest
import torch

from globalopt.kernels.cholesky import damped_cholesky, obs_factor
from globalopt.kernels.obs import obs_prune
from globalopt.values.decomposition import follows
from globalopt.values.layer import NM
from tests.reference import slab, sparsegpt
from tests.synthetic import layer


def problem(d_out=12, d_in=20):
    W, gram = layer(d_out, d_in, tokens=300)
    backwards = damped_cholesky(gram.matrix.double().flip(0, 1), 0.01)
    return W.double(), backwards.matrix.flip(0, 1), obs_factor(backwards.factor)


@pytest.mark.parametrize("layer_wide", [False, True])
@pytest.mark.parametrize("column_block", [1, 6, 128])
@pytest.mark.parametrize("nnz", [1, 77, 120, 239])
def test_equals_the_explicit_inverses(nnz, column_block, layer_wide):
    W, G, R = problem()
    ours = obs_prune(W, R, nnz, column_block=column_block, layer_wide=layer_wide)
    torch.testing.assert_close(ours, sparsegpt.prune(W, G, nnz, None, column_block, layer_wide))
    assert int(ours.count_nonzero()) == nnz


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(4, 5)], ids=str)
@pytest.mark.parametrize("column_block", [3, 8, 128])
def test_patterns_equal_the_explicit_inverses(pattern, column_block):
    W, G, R = problem()
    ours = obs_prune(W, R, 0, pattern, column_block=column_block)
    torch.testing.assert_close(ours, sparsegpt.prune(W, G, 0, pattern))
    assert follows(ours, pattern)
    assert int(ours.count_nonzero()) == 240 // pattern.of * pattern.keep


def test_zero_columns_use_no_budget():
    W, _, R = problem()
    W[:, 5:15] = 0
    S = obs_prune(W, R, 60, column_block=5)
    assert int(S.count_nonzero()) == 60
    assert not S[:, 5:15].any()


def error(W, S, G):
    return float((((W - S) @ G) * (W - S)).sum())


@pytest.mark.parametrize("layer_wide", [False, True])
@pytest.mark.parametrize(("nnz", "pattern"), [(0, None), (77, None), (240, None), (120, NM(2, 4)), (60, NM(1, 4))])
def test_what_is_not_kept_falls_to_the_floor(nnz, pattern, layer_wide):
    W, G, R = problem()
    floor = 0.5 * W.abs().mean() * torch.rand(12, 20, generator=torch.Generator().manual_seed(1)).double()
    before = floor.clone()
    S = obs_prune(W, R, nnz, pattern, column_block=32, layer_wide=layer_wide, floor=floor)
    kept, B = slab.sweep(W, G, floor, nnz, pattern, column_block=32)
    torch.testing.assert_close(S, kept + floor * B)
    assert torch.equal(floor, before)
    off = S.abs() != floor
    assert int(off.sum()) == nnz
    assert pattern is None or follows(off, pattern)


@pytest.mark.parametrize("layer_wide", [False, True])
@pytest.mark.parametrize("column_block", [1, 6])
def test_blocks_share_the_count_above_a_floor(column_block, layer_wide):
    W, G, R = problem()
    floor = (0.5 * W.abs().mean()).expand(12, 20)
    S = obs_prune(W, R, 77, column_block=column_block, layer_wide=layer_wide, floor=floor)
    assert int((S.abs() != floor).sum()) == 77
    # The error of a column is fed forward: each weight at its own side of the floor is worse.
    kept = torch.where(S.abs() != floor, W, torch.copysign(floor, W))
    assert error(W, S, G) < error(W, kept, G)


def test_a_floor_of_zero_is_none():
    W, _, R = problem()
    torch.testing.assert_close(obs_prune(W, R, 77, floor=torch.zeros_like(W)), obs_prune(W, R, 77))


def test_the_layer_is_not_modified():
    W, _, R = problem()
    before = W.clone(), R.clone()
    obs_prune(W, R, 77, column_block=6)
    assert torch.equal(W, before[0])
    assert torch.equal(R, before[1])
