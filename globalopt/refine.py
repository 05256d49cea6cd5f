"""Stage 3: fit every layer to its target, block by block, on the inputs the compressed prefix really produces."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from globalopt.capture import BlockRunner, walk_blocks
from globalopt.errors import GlobalOptError, NumericalError, UsageError
from globalopt.protocols import Solver
from globalopt.store import Run
from globalopt.summary import LayerResult
from globalopt.types import Budget, Decomposition, Gram, LayerSpec, Metric, Solution, Status, Target


def for_solver(target: Target, spec: LayerSpec, solver: Solver, budget: Budget) -> Target:
    """The target as `solver` can meet it: a solver without low rank gets the rank's cost as nonzeros.

    Raises:
        UsageError: the rank cannot become nonzeros, because the pattern fixes their number.
    """
    if target.rank == 0 or solver.low_rank:
        return target
    if target.pattern is not None:
        raise UsageError(
            f"Solver {solver.name} has no low-rank part, and pattern {target.pattern} leaves no room to keep rank "
            f"{target.rank} of layer {spec.name} as nonzeros. Use a solver with low rank."
        )
    return budget.grow(replace(target, rank=0), spec, "nnz", spec.numel - 1, budget.cost(target, spec))


@dataclass(frozen=True)
class Refinement:
    """What one refinement needs beside the model: targets, solver, budget, dtype of what is saved."""

    targets: Mapping[str, Target]
    solver: Solver
    budget: Budget
    dtype: torch.dtype
    predicted: Mapping[str, float | None]


def refine(
    runner: BlockRunner,
    plan: Refinement,
    run: Run,
    outputs: Callable[[LayerSpec], Gram | None],
    device: torch.device | None = None,
    advance: Callable[[str], None] = lambda detail: None,
) -> Iterator[LayerResult]:
    """Fit, save and put in place every layer, in model order; a layer that is already saved is read instead.

    The model of `runner` is changed in place: each weight becomes the dense sum of what was saved, in the saved
    dtype, so that later blocks see exactly what a user will load.

    Args:
        outputs: output Gram `A` of a layer where one was collected; the layer errors are then in nats.
        advance: called with the layer's name after each layer.
    Raises:
        NumericalError: a solution is not finite, breaks its target after the cast, or the solver failed; the
            message names the layer.
    """
    layers = runner.layers
    for visit in walk_blocks(runner, device):
        unsolved = [spec for spec in visit.specs if not run.layer_path(spec).exists()]
        grams = visit.grams() if unsolved else {}
        for spec in visit.specs:
            if spec in unsolved:
                target = for_solver(plan.targets[spec.name], spec, plan.solver, plan.budget)
                weight, found = layers.weight(spec.name), outputs(spec)
                metric = Metric(grams[spec.site], found and found.to(weight.device))
                value, facts = _fit(weight, metric, target, spec, plan)
                run.write_layer(spec, value, facts)
            value, facts = run.read_layer(spec)
            layers.set_weight(spec.name, value.dense())
            yield _result(spec, value, facts, plan)
            advance(spec.name)
        visit.replaced()


def _fit(
    weight: Tensor, metric: Metric, target: Target, spec: LayerSpec, plan: Refinement
) -> tuple[Decomposition, dict[str, float | str]]:
    started = time.perf_counter()
    try:
        if target.nnz == spec.numel:
            value = Decomposition(weight, weight.new_zeros(spec.d_out, 0), weight.new_zeros(0, spec.d_in))
            solution = Solution(value, 0.0)
        else:
            solution = plan.solver.solve(plan.solver.prepare(weight, metric), target)
        value = stored(solution.value, target, plan.dtype)
    except GlobalOptError as cause:
        cause.args = (f"Layer {spec.name}: {cause}",)
        raise
    E = weight - value.dense()
    plain = Metric(metric.inputs)
    energy = plain.error(weight)
    return value, {
        "actual": metric.error(E) / 2 if metric.outputs is not None else plain.error(E),
        "relative": plain.error(E) / energy if energy > 0 else 0.0,
        "status": solution.status.value,
        "damping": float(solution.stats.get("damping", 0.0)),
        "seconds": time.perf_counter() - started,
    }


def stored(value: Decomposition, target: Target, dtype: torch.dtype) -> Decomposition:
    """The decomposition as it is saved, in `dtype`; `NumericalError` if it then breaks its target."""
    cast = Decomposition(value.S.to(dtype), value.U.to(dtype), value.V.to(dtype), value.signs)
    if not cast.fits(target):
        raise NumericalError(
            f"the solution keeps rank {cast.rank} and {cast.nnz} nonzeros; the target is rank {target.rank}, "
            f"{target.nnz} nonzeros, pattern {target.pattern or 'unstructured'}."
        )
    return cast


def _result(spec: LayerSpec, value: Decomposition, facts: Mapping[str, float | str], plan: Refinement) -> LayerResult:
    target = Target(value.rank, value.nnz)
    asked = plan.targets[spec.name]
    return LayerResult(
        name=spec.name,
        block=spec.block,
        kind=spec.kind,
        d_out=spec.d_out,
        d_in=spec.d_in,
        rank=value.rank,
        nnz=value.nnz,
        pattern=str(asked.pattern) if asked.pattern else None,
        cost=plan.budget.cost(replace(target, pattern=asked.pattern), spec),
        dense_cost=plan.budget.cost(Target.dense(spec), spec),
        predicted=plan.predicted[spec.name],
        actual=float(facts["actual"]),
        relative=float(facts["relative"]),
        status=Status(facts["status"]).value,
        damping=float(facts["damping"]),
        seconds=float(facts["seconds"]),
    )
