"""Convert a target into one that a solver can meet at no higher cost."""

from __future__ import annotations

from dataclasses import replace

from globalopt.errors import UsageError
from globalopt.protocols import Solver
from globalopt.values.budget import Budget, Target
from globalopt.values.layer import LayerSpec


def for_solver(target: Target, spec: LayerSpec, solver: Solver, budget: Budget) -> Target:
    """The target as `solver` can meet it, at no higher cost: what it lacks becomes what it has.

    Without low rank the rank becomes nonzeros, without a sparse part the nonzeros become rank, and a solver with a sign
    plane gets one, of rank 1, for as many nonzeros as the plane costs. A layer kept or dropped whole stays so.

    Raises:
        UsageError: the cost cannot be spent in that way.
    """
    if target.nnz == spec.numel or target == Target.zero():
        return target
    cost = budget.cost(target, spec)
    if solver.signs and not target.signs:
        return _with_signs(target, spec, solver, budget)
    if target.nnz and not solver.sparse:
        folded = budget.grow(Target(target.rank, 0), spec, "rank", spec.max_rank, cost)
        if not folded.rank:
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


def _with_signs(target: Target, spec: LayerSpec, solver: Solver, budget: Budget) -> Target:
    cost = budget.cost(target, spec)
    plane = Target(1, target.nnz if target.pattern else 0, target.pattern, signs=True)
    least = budget.cost(plane, spec)
    if least > cost:
        raise UsageError(
            f"Solver {solver.name} needs a sign plane, {least} {budget.accounting} or more for layer {spec.name}; its "
            f"target costs {cost}. Use a larger budget or another solver."
        )
    return plane if target.pattern else budget.grow(plane, spec, "nnz", spec.numel - 1, cost)
