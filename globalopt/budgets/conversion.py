"""Convert a target into one that a solver can meet at no higher cost."""

from __future__ import annotations

from dataclasses import replace

from globalopt.errors import UsageError
from globalopt.protocols import Solver
from globalopt.values.budget import Budget, Target
from globalopt.values.layer import LayerSpec


def convert_target(target: Target, spec: LayerSpec, solver: Solver, budget: Budget) -> Target:
    """Convert a target into one that `solver` can meet, at no higher cost.

    For a solver without a low-rank part, rank becomes nonzeros; for one without a sparse part, nonzeros become rank. A
    solver with a plane of signs gets one, of rank 1, paid for with nonzeros. One without either part gets all nonzeros.
    The targets of layers that are kept dense or dropped do not change, nor do the bits in which any layer is stored. A
    layer with one output or input has no low rank that is cheaper than itself: where the solver has nothing else for
    it, it is dropped.

    Args:
        budget: its accounting is that of the cost.
    Raises:
        UsageError: the cost of the target does not reach for the parts that the solver has; or the solver has a plane
            of signs, and the layer is stored in fewer than 16 bits.

    >>> from solvers import get_solver
    >>> spec = LayerSpec("up_proj", 0, "mlp", "up_proj", 8, 4)
    >>> converted = convert_target(Target(rank=1, nnz=4), spec, get_solver("wanda"), Budget(limit=16, total=32))
    >>> converted.rank, converted.nnz
    (0, 16)
    """
    if target.nnz == spec.numel or not target.rank + target.nnz:
        return target
    cost = budget.cost(target, spec)
    if not solver.sparse and not solver.low_rank:
        return _whole(target, spec, solver, budget, cost)
    if solver.signs and not target.signs:
        return _with_signs(target, spec, solver, budget)
    if target.nnz and not solver.sparse:
        folded = budget.grow(replace(target, nnz=0, pattern=None), spec, "rank", spec.max_rank, cost)
        if not folded.rank:
            if spec.max_rank == 1:
                return folded
            raise UsageError(
                f"Solver {solver.name} has no sparse part, and the {target.nnz} nonzeros of layer {spec.name} do not "
                "buy one rank. Use a larger budget or another solver."
            )
        return folded
    if target.rank and not solver.low_rank:
        if target.pattern is not None:
            raise UsageError(
                f"Solver {solver.name} has no low-rank part, and pattern {target.pattern} leaves no room to keep rank "
                f"{target.rank} of layer {spec.name} as nonzeros. Use a solver with low rank."
            )
        return budget.grow(replace(target, rank=0), spec, "nnz", spec.numel - 1, cost)
    return target


def _whole(target: Target, spec: LayerSpec, solver: Solver, budget: Budget, cost: int) -> Target:
    """Convert a target into one that keeps the whole layer in the same storage, if that costs at most `cost`."""
    whole = Target(0, spec.numel, storage=target.storage)
    if (least := budget.cost(whole, spec)) > cost:
        raise UsageError(
            f"Solver {solver.name} keeps every weight, and in {target.storage.values} bits that takes {least} "
            f"{budget.accounting} for layer {spec.name}; its target costs {cost}. Use a larger budget, fewer bits, or "
            "another solver."
        )
    return whole


def _with_signs(target: Target, spec: LayerSpec, solver: Solver, budget: Budget) -> Target:
    """Convert a target into a plane of signs of rank 1 and as many nonzeros as the rest of the cost allows."""
    if not target.storage.plain:
        raise UsageError(
            f"Solver {solver.name} keeps a plane of signs, which goes with 16 bits alone, and the budget stores layer "
            f"{spec.name} in {target.storage}. Use another solver, or a budget of 16 bits."
        )
    cost = budget.cost(target, spec)
    plane = Target(1, target.nnz if target.pattern else 0, target.pattern, signs=True)
    least = budget.cost(plane, spec)
    if least > cost:
        if spec.max_rank == 1:
            return Target.zero()
        raise UsageError(
            f"Solver {solver.name} needs a sign plane, {least} {budget.accounting} or more for layer {spec.name}; its "
            f"target costs {cost}. Use a larger budget or another solver."
        )
    return plane if target.pattern else budget.grow(plane, spec, "nnz", spec.numel - 1, cost)
