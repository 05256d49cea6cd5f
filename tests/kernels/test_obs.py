from __future__ import annotations

import pytest
import torch

from globalopt.kernels.cholesky import damped_cholesky, obs_factor
from globalopt.kernels.obs import obs_prune
from globalopt.types import NM, follows
from tests.reference import sparsegpt
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
