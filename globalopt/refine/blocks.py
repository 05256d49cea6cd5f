"""Solve every layer at its target, block by block, on the hidden states of the blocks compressed before it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from torch import Tensor

from globalopt.errors import GlobalOptError, NumericalError
from globalopt.machine import ranks
from globalopt.machine.memory import trim_memory
from globalopt.matching.block import Matching, match_block
from globalopt.models.block_runner import BlockRunner
from globalopt.models.layers import ModelLayers
from globalopt.models.walk import BlockVisit, visit_blocks, walk_blocks
from globalopt.protocols import Needs, Solver
from globalopt.refine.needed import needed
from globalopt.refine.rounding import rounded
from globalopt.rounding.published import on_grid
from globalopt.rounding.stored import without_zeros
from globalopt.runs.artefacts import BLOCK_OUTPUT_GRAM, MATCHED_BLOCK, METRIC_CHOICE, OUTPUT_GRAM, SOLVED_LAYER
from globalopt.runs.files import read_metadata
from globalopt.runs.folder import Run
from globalopt.runs.records import Matched, SolvedLayer
from globalopt.values.budget import Budget, Target
from globalopt.values.decomposition import Decomposition, Solution, Status
from globalopt.values.layer import LayerSpec
from globalopt.values.layer_results import LayerResult
from globalopt.values.metric import Gram, Metric
from globalopt.values.storage import PLAIN

VERSION = 6
"""Raised whenever solved layers or matched blocks, or what is stored of them, change, other than by their solver."""


class Order(StrEnum):
    """Name the time at which the Grams of a block are computed.

    `SITE`: each input site's Gram after the layers before it are replaced. `BLOCK`: all of a block's Grams at once,
    before any of its layers is replaced.

    >>> Order("site")
    <Order.SITE: 'site'>
    """

    SITE = "site"
    BLOCK = "block"


@dataclass(frozen=True)
class Refinement:
    """Define how the layers of a model are refined.

    Args:
        targets: by layer, as the solver can meet them (`budgets.conversion.convert_target`).
        solver: solves every layer.
        budget: gives the unit in which the cost of layers is reported.
        dtype: floating-point type of the saved weights.
        predicted: predicted loss by layer, reported beside the actual one; None where there is none.
        output_grams: whether there are output Grams of the layers, so that errors are in nats per token.
        metric_choices: whether the metric of every layer was chosen (`METRIC_CHOICE`); otherwise it has the output Gram
            wherever there is one.
        order: when Grams are computed.
        matching: how blocks are matched, or None.
        seed: of matching.

    >>> from solvers import get_solver
    >>> plan = Refinement({}, get_solver("wanda"), Budget(8, 16), torch.bfloat16, {})
    >>> plan.order
    <Order.BLOCK: 'block'>
    """

    targets: Mapping[str, Target]
    solver: Solver
    budget: Budget
    dtype: torch.dtype
    predicted: Mapping[str, float | None]
    output_grams: bool = False
    metric_choices: bool = False
    order: Order = Order.BLOCK
    matching: Matching | None = None
    seed: int = 0

    @property
    def reads(self) -> Needs:
        """Return how much of the input Grams is read."""
        few_bits = any(not target.storage.plain for target in self.targets.values())
        return needed(self.solver, few_bits, self.output_grams)


def refine(
    runner: BlockRunner,
    plan: Refinement,
    run: Run,
    device: torch.device | None = None,
    advance: Callable[[str], None] = lambda detail: None,
    begin: Callable[[], None] = lambda: None,
) -> Iterator[LayerResult]:
    """Solve every layer at its target, in model order, and yield its errors; a layer that is saved already is read.

    The model of `runner` is changed in place: each weight becomes the dense sum of the saved parts, in the saved type,
    so that later blocks are fitted to the hidden states of exactly the model that a user will load. Several processes
    share the windows, the layers of a block and the windows of every step of its matching.

    Args:
        runner: of the dense model, on the calibration text.
        run: where layers are saved, with the output Grams and metric choices that the plan needs.
        device: where a block is moved for its turn; None leaves it.
        advance: called with the layer's name after each layer.
        begin: called once, when what is needed of the dense model in front of the first block is known: it may replace
            what comes before, so that blocks are fitted to the inputs that they will have.
    Yields:
        The costs and errors of a layer: `actual` is `tr(A E G Eᵀ) / 2` in nats per token with output Grams, else
        `tr(E G Eᵀ)`, with `E` the dense weight less the solution, and `tr(E Eᵀ)` where no Gram is read. Then no text is
        read either, if blocks are not matched.
    Raises:
        NumericalError: a solution is not finite, exceeds its target after the cast, or the solver failed; the message
            names the layer.

    >>> from pathlib import Path
    >>> from globalopt.models.batch import Batch
    >>> from globalopt.models.finding import find_layers
    >>> from globalopt.reference.tiny import tiny_llama
    >>> from solvers import get_solver
    >>> layers = find_layers(tiny_llama(), allow_low_coverage=True)
    >>> targets = {spec.name: Target(0, spec.numel // 2) for spec in layers.specs}
    >>> predicted = dict.fromkeys(targets)
    >>> plan = Refinement(targets, get_solver("wanda"), Budget.fraction(0.5, layers.specs), torch.float32, predicted)
    >>> runner = BlockRunner(layers, [Batch(torch.arange(64).view(4, 16))])
    >>> with Run.start(Path("run"), {}, {}) as run:
    ...     results = list(refine(runner, plan, run))
    >>> sum(result.nnz for result in results), sum(spec.numel for spec in layers.specs)
    (2176, 4352)
    """
    layers = runner.layers
    dense = _DenseStates(runner) if plan.matching is not None and plan.matching.share > 0 else None
    begin()
    still = plan.reads is Needs.NOTHING and plan.matching is None
    for visit in visit_blocks(runner, device) if still else walk_blocks(runner, device):
        unsolved = ranks.told(run.missing(SOLVED_LAYER, visit.specs))
        grams = _grams(visit, plan) if unsolved and plan.order is Order.BLOCK else {}
        wanted = _wanted(visit, plan, run, dense)
        _solve(visit, unsolved, grams, plan, run)
        # Freed before the next block computes its own.
        del grams
        if plan.matching is not None:
            _match(visit, plan, run, wanted)
        del wanted
        for spec in visit.specs:
            value = run.layer(spec)
            # What is read again with its block is not held in between.
            layers.place(spec.name, value.dense if layers.lazy is None else partial(_saved_weight, run, spec))
            yield _result(spec, value, read_metadata(run.path(SOLVED_LAYER, spec)), plan)
            advance(spec.name)
        if ranks.writer():
            if plan.matching is not None:
                # The matched block holds its layers; what stays of these is how they were solved.
                run.discard_tensors(SOLVED_LAYER, visit.specs)
            run.discard(OUTPUT_GRAM, visit.specs)
            run.discard(BLOCK_OUTPUT_GRAM, [visit.index])
        visit.replaced()


def _grams(visit: BlockVisit, plan: Refinement, sites: Sequence[str] | None = None) -> dict[str, Gram]:
    """Compute the Grams of input sites, all of the block by default; identities where none is read."""
    if plan.reads is Needs.NOTHING:
        wanted = {spec.site: spec for spec in visit.specs if sites is None or spec.site in sites}
        device = visit.layers.device_of(visit.index)
        return {site: Gram(torch.eye(spec.d_in, device=device), 1) for site, spec in wanted.items()}
    return visit.grams(sites, exact=plan.reads is Needs.GRAM)


def _solve(
    visit: BlockVisit, unsolved: Sequence[LayerSpec], grams: Mapping[str, Gram], plan: Refinement, run: Run
) -> None:
    """Solve and save the layers `unsolved` of a block, site by site.

    Args:
        grams: by site, computed before any layer is replaced; empty for `Order.SITE`.
    """
    layers = visit.layers
    own = ranks.share(unsolved, LayerSpec.solve_cost)
    for site in dict.fromkeys(spec.site for spec in visit.specs):
        here = [spec for spec in visit.specs if spec.site == site and spec in unsolved]
        if plan.order is Order.SITE:
            found = _grams(visit, plan, [site]) if here else {}
            mine = ranks.share(here, LayerSpec.solve_cost)
        else:
            found, mine = grams, [spec for spec in here if spec in own]
        if mine:
            _solve_site(layers, mine, found[site], plan, run)
            if layers.lazy is not None:
                # The memory that a solver freed is too fragmented for the next site.
                trim_memory()
        if plan.order is Order.SITE:
            ranks.written(run)
            for spec in visit.specs:
                if spec.site == site:
                    layers.place(spec.name, partial(_solved_weight, run, spec))
            visit.replaced()
    ranks.written(run)


def _solve_site(layers: ModelLayers, specs: Sequence[LayerSpec], gram: Gram, plan: Refinement, run: Run) -> None:
    """Solve and save the layers `specs` of one input site with the Gram `gram` (d_in, d_in)."""
    jobs = []
    for spec in specs:
        weight = layers.weight(spec.name)
        outputs = run.get(OUTPUT_GRAM, spec).to(weight.device) if plan.output_grams else None
        metric = Metric(gram, outputs)
        weighted = not plan.metric_choices or run.get(METRIC_CHOICE, spec).uses_output_gram
        jobs.append(Job(spec, weight, metric, metric if weighted else Metric(gram), plan.targets[spec.name]))
    for job, solved in zip(jobs, _solve_together(jobs, plan), strict=True):
        run.put(SOLVED_LAYER, job.spec, solved)


class _DenseStates:
    """Hold the hidden states (b, t, d) of the dense model, by batch, before the block that is being compressed."""

    def __init__(self, runner: BlockRunner) -> None:
        self._runner = runner
        self.states = [runner.keep(runner.first(i)) for i in range(len(runner))]

    @torch.no_grad()
    def advance(self, block: int) -> list[Tensor]:
        """Compute the hidden states after `block`, whose weights are still dense."""
        runner = self._runner
        self.states = [runner.keep(runner.run(block, i, x).to(x.device)) for i, x in enumerate(self.states)]
        return self.states


def _wanted(visit: BlockVisit, plan: Refinement, run: Run, dense: _DenseStates | None) -> list[Tensor]:
    """Compute the target outputs of matching, by batch, while the weights are still dense; empty if it is done."""
    behind = dense.advance(visit.index) if dense is not None else []
    if plan.matching is None or ranks.told(run.has(MATCHED_BLOCK, visit.index)):
        return []
    share = plan.matching.share
    if not behind:
        return visit.outputs()
    return [torch.lerp(here, there, share) for here, there in zip(visit.outputs(), behind, strict=True)]


def _match(visit: BlockVisit, plan: Refinement, run: Run, wanted: Sequence[Tensor]) -> None:
    """Match the block if that is not done yet, and put its norms in place."""
    assert plan.matching is not None, "checked by the caller"
    if wanted:
        values = {spec.name: run.get(SOLVED_LAYER, spec).value for spec in visit.specs}
        outputs = run.get(BLOCK_OUTPUT_GRAM, visit.index) if plan.matching.loss.weighted else None
        started = time.perf_counter()
        trained, match = match_block(
            visit.runner, visit.index, visit.inputs, wanted, values, plan.matching, outputs, plan.seed
        )
        found = trained.values()
        for spec in visit.specs:
            checked(found[spec.name], plan.targets[spec.name])
        metadata = {**asdict(match), "loss": plan.matching.loss.value, "seconds": time.perf_counter() - started}
        if ranks.writer():
            run.put(MATCHED_BLOCK, visit.index, Matched(found, trained.norm_values(), metadata))
        ranks.written(run)
    for name, value in run.get(MATCHED_BLOCK, visit.index).norms.items():
        visit.layers.set_parameter(name, value)


def _solved_weight(run: Run, spec: LayerSpec) -> Tensor:
    """Read the dense weight of a solved layer, before matching."""
    return run.get(SOLVED_LAYER, spec).value.dense()


def _saved_weight(run: Run, spec: LayerSpec) -> Tensor:
    """Read the dense weight of a finished layer, after matching if there was any."""
    return run.layer(spec).dense()


@dataclass(frozen=True, eq=False)
class Job:
    """Hold one layer to be solved.

    Args:
        weight: (d_out, d_in), dense.
        metric: metric of the reported error.
        solved: metric that the solver minimises; it may lack the output Gram of `metric`.
        target: rank, nonzeros and pattern to keep within.

    >>> spec, W = LayerSpec("up", 0, "in", "up", 2, 2), torch.eye(2)
    >>> metric = Metric(Gram(torch.eye(2), 4))
    >>> Job(spec, W, metric, metric, Target(0, 2)).target.nnz
    2
    """

    spec: LayerSpec
    weight: Tensor
    metric: Metric
    solved: Metric
    target: Target


def _solve_together(jobs: Sequence[Job], plan: Refinement) -> list[SolvedLayer]:
    """Solve the layers of one site together; each reports a share of the time in proportion to its size."""
    searched = [job for job in jobs if 0 < job.target.nnz < job.spec.numel or job.target.rank]
    made = {job.spec: _saved(job, _whole(job), plan, 0.0) for job in jobs if job not in searched}
    if searched:
        started = time.perf_counter()
        try:
            # Solvers know nothing of bits: what they find is rounded after them.
            solutions = plan.solver.solve_site(
                [(job.weight, job.solved, replace(job.target, storage=PLAIN)) for job in searched]
            )
        except GlobalOptError as cause:
            cause.args = (f"Layer {', '.join(job.spec.name for job in searched)}: {cause}",)
            raise
        seconds = (time.perf_counter() - started) / sum(job.spec.numel for job in searched)
        for job, solution in zip(searched, solutions, strict=True):
            made[job.spec] = _saved(job, solution, plan, seconds * job.spec.numel)
    return [made[job.spec] for job in jobs]


def _whole(job: Job) -> Solution:
    """Make the solution that keeps or drops a whole layer, which needs no solver."""
    S = job.weight if job.target.nnz else torch.zeros_like(job.weight)
    if job.target.nnz and job.target.storage.values < 16:
        # A weight that is zero has a code as all others: to leave it out would take an index of the whole layer.
        S = without_zeros(S.float())
    value = Decomposition(S, S.new_zeros(job.spec.d_out, 0), S.new_zeros(0, job.spec.d_in))
    return Solution(value, job.metric.error(job.weight - value.dense()))


def _saved(job: Job, solution: Solution, plan: Refinement, seconds: float) -> SolvedLayer:
    """Round a solution to the saved type, check it against its target, and compute the error of the rounded one."""
    try:
        value = solution.value
        if not job.target.storage.plain:
            how, storage, pattern = plan.solver.rounding, job.target.storage, job.target.pattern
            value = on_grid(how, value, job.weight, job.solved, storage, pattern)
        value = checked(rounded(value, job.weight, job.solved, plan.dtype), job.target)
    except GlobalOptError as cause:
        cause.args = (f"Layer {job.spec.name}: {cause}",)
        raise
    E = job.weight - value.dense()
    plain = Metric(job.metric.inputs)
    energy, error = plain.error(job.weight), plain.error(E)
    return SolvedLayer(
        value,
        {
            "actual": job.metric.error(E) / 2 if job.metric.outputs is not None else error,
            "relative": error / energy if energy > 0 else 0.0,
            "status": solution.status.value,
            "damping": float(solution.stats.get("damping", 0.0)),
            "seconds": seconds,
            # 0: another Gram stood in for one of this layer's own. Where none is read, no token is missed.
            "tokens": min(gram.tokens for gram in (job.metric.inputs, job.metric.outputs) if gram is not None),
            "trace": solution.trace,
        },
    )


def checked(value: Decomposition, target: Target) -> Decomposition:
    """Return `value` if it keeps no more than its target; `NumericalError` otherwise.

    >>> kept = Decomposition(torch.eye(2), torch.zeros(2, 0), torch.zeros(0, 2))
    >>> checked(kept, Target(0, 2)).nnz
    2
    """
    if not value.fits(target):
        raise NumericalError(
            f"the solution keeps rank {value.rank} and {value.nnz} of {value.S.numel()} nonzeros; the target is rank "
            f"{target.rank}, {target.nnz} nonzeros, pattern {target.pattern or 'unstructured'}; it is stored in "
            f"{value.storage} bits of {target.storage}."
        )
    return value


def _result(spec: LayerSpec, value: Decomposition, facts: Mapping[str, Any], plan: Refinement) -> LayerResult:
    """Collect the costs and errors of a saved layer."""
    pattern = plan.targets[spec.name].pattern
    target = Target(value.rank, value.nnz, pattern, value.signs is not None, value.storage)
    return LayerResult(
        name=spec.name,
        block=spec.block,
        kind=spec.kind,
        d_out=spec.d_out,
        d_in=spec.d_in,
        rank=value.rank,
        nnz=value.nnz,
        pattern=str(pattern) if pattern else None,
        cost=plan.budget.cost(target, spec),
        dense_cost=plan.budget.cost(Target.dense(spec), spec),
        predicted=plan.predicted[spec.name],
        actual=float(facts["actual"]),
        relative=float(facts["relative"]),
        status=Status(facts["status"]).value,
        damping=float(facts["damping"]),
        seconds=float(facts["seconds"]),
        bytes=target.bytes(spec),
        storage=str(target.storage),
        signs=target.signs,
    )
