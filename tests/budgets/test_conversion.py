"""A target becomes one that the solver can meet, at no higher cost."""

from __future__ import annotations

import pytest

from globalopt.budgets.conversion import convert_target
from globalopt.errors import UsageError
from globalopt.values.budget import Budget, Target
from globalopt.values.layer import LayerSpec
from solvers import get_solver


@pytest.mark.parametrize("solver", ["svd", "slab"])
@pytest.mark.parametrize(("d_out", "d_in"), [(1, 32), (32, 1)])
def test_a_layer_with_one_output_or_input_is_kept_whole_or_dropped(solver, d_out, d_in):
    spec = LayerSpec("gate", 0, "gate", "gate", d_out, d_in)
    budget = Budget(16, 32)
    for nnz in (0, 1, 16, 31):
        converted = convert_target(Target(0, nnz), spec, get_solver(solver), budget)
        assert converted.rank == 0
        assert budget.cost(converted, spec) <= budget.cost(Target(0, nnz), spec)
    dense = Target.dense(spec)
    assert convert_target(dense, spec, get_solver(solver), budget) == dense


def test_any_other_layer_whose_nonzeros_buy_no_rank_is_named():
    spec = LayerSpec("up", 0, "up", "up", 8, 32)
    with pytest.raises(UsageError, match="16 nonzeros of layer up do not buy one rank"):
        convert_target(Target(0, 16), spec, get_solver("svd"), Budget(16, 256))
