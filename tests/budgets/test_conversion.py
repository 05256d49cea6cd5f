"""A target becomes one that the solver can meet, at no higher cost."""

from __future__ import annotations

import pytest

from globalopt.budgets.conversion import convert_target
from globalopt.errors import UsageError
from globalopt.values.budget import Budget, Target
from globalopt.values.layer import LayerSpec
from globalopt.values.storage import Storage
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


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
def test_a_solver_without_parts_keeps_whole_layers_in_few_bits_or_says_what_that_costs(solver):
    spec = LayerSpec("up", 0, "up", "up", 64, 64)
    budget, method = Budget(8192, 8192, "bytes"), get_solver(solver)
    few = Storage(4, 4)
    whole = Target(0, spec.numel, storage=few)
    for target in (Target(4, 3400, storage=few), Target(0, 3840, storage=few)):
        assert convert_target(target, spec, method, budget) == whole
        assert budget.cost(whole, spec) <= budget.cost(target, spec)
    with pytest.raises(UsageError, match="in 4 bits that takes 2176 bytes for layer up; its target costs 1600"):
        convert_target(Target(0, 2048, storage=few), spec, method, budget)
    with pytest.raises(UsageError, match="in 16 bits that takes 8192 bytes"):
        convert_target(Target(4, 2048), spec, method, budget)
    for target in (Target.dense(spec), Target.zero(), whole):
        assert convert_target(target, spec, method, budget) == target
