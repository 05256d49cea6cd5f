"""Stage 3: fit every layer to its target, block by block, on the inputs the compressed prefix really produces."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from torch import Tensor

from globalopt.budgets.conversion import for_solver
from globalopt.errors import GlobalOptError, NumericalError
from globalopt.machine.memory import give_back
from globalopt.matching.block import Matching, match_block
from globalopt.models.layers import ModelLayers
from globalopt.models.walk import BlockRunner, BlockVisit, walk_blocks
from globalopt.protocols import Solver
from globalopt.refine.rounding import rounded
from globalopt.runs.folder import Run
from globalopt.values.budget import Budget, Target
from globalopt.values.decomposition import Decomposition, Solution, Status
from globalopt.values.layer import LayerSpec
from globalopt.values.metric import Gram, Metric
from globalopt.values.results import LayerResult


class Order(StrEnum):
    """When the Grams of a block are taken.

    `site`: of each input site after the layers before it were replaced. `block`: of all sites at once, before any was.
    """

    SITE = "site"
    BLOCK = "block"


@dataclass(frozen=True)
class Refinement:
    """What one refinement needs beside the model.

    Args:
        targets: by layer.
        dtype: of what is saved.
        predicted: by layer, to be reported.
        order: see `Order`.
        matching: how blocks are matched, or None.
        seed: of matching.
    """

    targets: Mapping[str, Target]
    solver: Solver
    budget: Budget
    dtype: torch.dtype
    predicted: Mapping[str, float | None]
    order: Order = Order.BLOCK
    matching: Matching | None = None
    seed: int = 0


def refine(
    runner: BlockRunner,
    plan: Refinement,
    run: Run,
    outputs: Callable[[LayerSpec], Gram | None],
    device: torch.device | None = None,
    advance: Callable[[str], None] = lambda detail: None,
    weighs: Callable[[LayerSpec], bool] = lambda spec: True,
) -> Iterator[LayerResult]:
    """Fit, save and put in place every layer, in model order; a layer that is already saved is read instead.

    The model of `runner` is changed in place: each weight becomes the dense sum of what was saved, in the saved
    dtype, so that later blocks see exactly what a user will load.

    Args:
        outputs: output Gram `A` of a layer where one was collected; the layer errors are then in nats.
        advance: called with the layer's name after each layer.
        weighs: whether a layer is fitted in its output Gram too, and not only reported in it.
    Raises:
        NumericalError: a solution is not finite, breaks its target after the cast, or the solver failed; the
            message names the layer.
    """
    layers = runner.layers
    dense = _DenseStates(runner) if plan.matching is not None and plan.matching.share > 0 else None
    for visit in walk_blocks(runner, device):
        unsolved = [spec for spec in visit.specs if not run.layer_path(spec).exists()]
        grams = visit.grams() if unsolved and plan.order is Order.BLOCK else {}
        wanted = _wanted(visit, plan, run, dense)
        _solve(visit, unsolved, grams, plan, run, outputs, weighs)
        # Not held while the next block makes its own.
        del grams
        if plan.matching is not None:
            _match(visit, plan, run, wanted)
        del wanted
        for spec in visit.specs:
            value, facts = run.read_layer(spec)
            layers.place(spec.name, partial(_saved_weight, run, spec))
            yield _result(spec, value, facts, plan)
            advance(spec.name)
        visit.replaced()


def _solve(
    visit: BlockVisit,
    unsolved: Sequence[LayerSpec],
    grams: Mapping[str, Gram],
    plan: Refinement,
    run: Run,
    outputs: Callable[[LayerSpec], Gram | None],
    weighs: Callable[[LayerSpec], bool],
) -> None:
    """Fit and save the layers `unsolved` of a block, site by site; `grams` are those taken before any is replaced."""
    layers = visit.layers
    for site in dict.fromkeys(spec.site for spec in visit.specs):
        here = [spec for spec in visit.specs if spec.site == site and spec in unsolved]
        if here:
            gram = grams[site] if plan.order is Order.BLOCK else visit.grams([site])[site]
            _solve_site(layers, here, gram, plan, run, outputs, weighs)
            if layers.lazy is not None:
                # What a solver freed lies in pieces that the next site would not fit into.
                give_back()
        if plan.order is Order.SITE:
            for spec in visit.specs:
                if spec.site == site:
                    layers.place(spec.name, partial(_fitted_weight, run, spec))
            visit.replaced()


def _solve_site(
    layers: ModelLayers,
    specs: Sequence[LayerSpec],
    gram: Gram,
    plan: Refinement,
    run: Run,
    outputs: Callable[[LayerSpec], Gram | None],
    weighs: Callable[[LayerSpec], bool],
) -> None:
    """Fit and save the layers `specs`, which have the inputs of `gram` (d_in, d_in) in common."""
    jobs = []
    for spec in specs:
        weight, found = layers.weight(spec.name), outputs(spec)
        target = for_solver(plan.targets[spec.name], spec, plan.solver, plan.budget)
        metric = Metric(gram, found and found.to(weight.device))
        jobs.append(Job(spec, weight, metric, metric if weighs(spec) else Metric(gram), target))
    for job, (value, facts) in zip(jobs, _fit(jobs, plan), strict=True):
        run.write_layer(job.spec, value, facts)


class _DenseStates:
    """Hidden states (b, t, d) that the dense model has where a walk of the compressed one is, by batch."""

    def __init__(self, runner: BlockRunner) -> None:
        self._runner = runner
        self.states = [runner.keep(runner.first(i)) for i in range(len(runner))]

    @torch.no_grad()
    def advance(self, block: int) -> list[Tensor]:
        """Those behind `block`, whose weights are still dense."""
        runner = self._runner
        self.states = [runner.keep(runner.run(block, i, x).to(x.device)) for i, x in enumerate(self.states)]
        return self.states


def _wanted(visit: BlockVisit, plan: Refinement, run: Run, dense: _DenseStates | None) -> list[Tensor]:
    """What the block should answer, by batch, while its weights are still dense; empty where nobody will ask."""
    behind = dense.advance(visit.index) if dense is not None else []
    if plan.matching is None or run.matched_path(visit.index).exists():
        return []
    share = plan.matching.share
    if not behind:
        return visit.outputs()
    return [torch.lerp(here, there, share) for here, there in zip(visit.outputs(), behind, strict=True)]


def _match(visit: BlockVisit, plan: Refinement, run: Run, wanted: Sequence[Tensor]) -> None:
    """Match the block if that is not done yet, and put its norms in place."""
    assert plan.matching is not None, "asked for by the caller"
    path = run.matched_path(visit.index)
    if not path.exists():
        values = {spec.name: run.read_fitted(spec)[0] for spec in visit.specs}
        outputs = run.read_block_outputs(visit.index) if plan.matching.loss.weighted else None
        started = time.perf_counter()
        trained, match = match_block(
            visit.runner, visit.index, visit.inputs, wanted, values, plan.matching, outputs, plan.seed
        )
        found = trained.values()
        for spec in visit.specs:
            checked(found[spec.name], for_solver(plan.targets[spec.name], spec, plan.solver, plan.budget))
        facts = {**asdict(match), "loss": plan.matching.loss.value, "seconds": time.perf_counter() - started}
        run.write_matched(path, found, trained.norm_values(), facts)
    for name, value in run.read_matched(path, [])[1].items():
        visit.layers.set_parameter(name, value)


def _fitted_weight(run: Run, spec: LayerSpec) -> Tensor:
    return run.read_fitted(spec)[0].dense()


def _saved_weight(run: Run, spec: LayerSpec) -> Tensor:
    return run.read_layer(spec)[0].dense()


@dataclass(frozen=True, eq=False)
class Job:
    """One layer to fit in `fitted`, and to report in `metric`."""

    spec: LayerSpec
    weight: Tensor
    metric: Metric
    fitted: Metric
    target: Target


Saved = tuple[Decomposition, dict[str, Any]]


def _fit(jobs: Sequence[Job], plan: Refinement) -> list[Saved]:
    """Fit the layers of one site together; their time is shared out by size."""
    searched = [job for job in jobs if job.target.nnz < job.spec.numel and job.target != Target.zero()]
    made = {job.spec: _saved(job, _whole(job), plan, 0.0) for job in jobs if job not in searched}
    if searched:
        started = time.perf_counter()
        try:
            solutions = plan.solver.solve_site([(job.weight, job.fitted, job.target) for job in searched])
        except GlobalOptError as cause:
            cause.args = (f"Layer {', '.join(job.spec.name for job in searched)}: {cause}",)
            raise
        seconds = (time.perf_counter() - started) / sum(job.spec.numel for job in searched)
        for job, solution in zip(searched, solutions, strict=True):
            made[job.spec] = _saved(job, solution, plan, seconds * job.spec.numel)
    return [made[job.spec] for job in jobs]


def _whole(job: Job) -> Solution:
    """A layer kept or dropped as a whole, which needs no solver."""
    S = job.weight if job.target.nnz else torch.zeros_like(job.weight)
    value = Decomposition(S, S.new_zeros(job.spec.d_out, 0), S.new_zeros(0, job.spec.d_in))
    return Solution(value, job.metric.error(job.weight - value.dense()))


def _saved(job: Job, solution: Solution, plan: Refinement, seconds: float) -> Saved:
    try:
        value = checked(rounded(solution.value, job.weight, job.fitted, plan.dtype), job.target)
    except GlobalOptError as cause:
        cause.args = (f"Layer {job.spec.name}: {cause}",)
        raise
    E = job.weight - value.dense()
    plain = Metric(job.metric.inputs)
    energy = plain.error(job.weight)
    return value, {
        "actual": job.metric.error(E) / 2 if job.metric.outputs is not None else plain.error(E),
        "relative": plain.error(E) / energy if energy > 0 else 0.0,
        "status": solution.status.value,
        "damping": float(solution.stats.get("damping", 0.0)),
        "seconds": seconds,
        "trace": solution.trace,
    }


def checked(value: Decomposition, target: Target) -> Decomposition:
    """The decomposition as it is saved; `NumericalError` if it breaks its target."""
    if not value.fits(target):
        raise NumericalError(
            f"the solution keeps rank {value.rank} and {value.nnz} nonzeros; the target is rank {target.rank}, "
            f"{target.nnz} nonzeros, pattern {target.pattern or 'unstructured'}."
        )
    return value


def _result(spec: LayerSpec, value: Decomposition, facts: Mapping[str, Any], plan: Refinement) -> LayerResult:
    asked = plan.targets[spec.name]
    target = Target(value.rank, value.nnz, asked.pattern, value.signs is not None)
    return LayerResult(
        name=spec.name,
        block=spec.block,
        kind=spec.kind,
        d_out=spec.d_out,
        d_in=spec.d_in,
        rank=value.rank,
        nnz=value.nnz,
        pattern=str(asked.pattern) if asked.pattern else None,
        cost=plan.budget.cost(target, spec),
        dense_cost=plan.budget.cost(Target.dense(spec), spec),
        predicted=plan.predicted[spec.name],
        actual=float(facts["actual"]),
        relative=float(facts["relative"]),
        status=Status(facts["status"]).value,
        damping=float(facts["damping"]),
        seconds=float(facts["seconds"]),
        bytes=target.bytes(spec),
    )
