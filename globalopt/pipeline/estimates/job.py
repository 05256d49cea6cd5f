"""Describe the work of a run, as far as an estimate of its cost needs it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from globalopt.analysis.grid import ANCHORS
from globalopt.matching.training import Training
from globalopt.models.layers import ModelLayers
from globalopt.pipeline.embeddings import largest_budget, measures, menus
from globalopt.pipeline.plan import RefinementPlan, SearchPlan, probe_solver
from globalopt.protocols import Outputs, Reads, Solver
from globalopt.values.budget import NO_LIMITS, Limits
from globalopt.values.layer import NM


@dataclass(frozen=True)
class Job:
    """Describe the work of a run, as far as an estimate needs it.

    Args:
        kept: fraction kept of the compressible parameters.
        solver: solver of the refinement.
        probe: probe solver of the analysis.
        refines: whether layers are refined and a model is saved; not in a family of budgets.
        sweeps: whether a backward sweep computes output Grams.
        reads: what the allocator reads, which an analysis computes; nothing where there is no allocator.
        anchors: whether the analysis computes anchor solutions.
        compared: whether the solver is compared with the probe on a few layers.
        few_bits: whether layers may be stored in few bits: losses of rounding are measured, and solutions rounded.
        rounds: most rounds in which predicted losses are corrected.
        search_tokens: tokens of forward passes on which the allocator evaluates the objective.
        embeddings: how many roundings of embeddings are measured, one forward pass each.
        pattern, limits: of the options of every layer.
        matching, distillation: how blocks, and the whole model, are trained after refinement, or None.
        shared: whether a cache keeps the artefacts for other runs; otherwise they are deleted after their last use.

    >>> from globalopt.pipeline.example import example_plan
    >>> job = search_job(example_plan(budget=0.3), refines=True)
    >>> job.kept, job.solver.name, job.sweeps, job.anchors  # a uniform budget reads nothing
    (0.3, 'wanda', False, False)
    """

    kept: float
    solver: Solver
    probe: Solver
    refines: bool
    sweeps: bool
    reads: Reads = Reads.NOTHING
    anchors: bool = False
    compared: bool = False
    few_bits: bool = False
    rounds: int = 0
    search_tokens: int = 0
    embeddings: int = 0
    pattern: NM | None = None
    limits: Limits = NO_LIMITS
    matching: Training | None = None
    distillation: Training | None = None
    shared: bool = True


def search_job(plan: SearchPlan, refines: bool) -> Job:
    """Describe the work of a search, or with `refines` False of a family of budgets.

    >>> from globalopt.pipeline.example import example_plan
    >>> search_job(example_plan(solver="3basil", allocator="knapsack"), refines=True).anchors
    True
    """
    analysis, predicts = plan.analysis, Reads.SURFACES in plan.reads
    return Job(
        plan.rule.kept,
        analysis.solver,
        analysis.probe,
        refines=refines,
        sweeps=analysis.weighted
        or (predicts and (analysis.fisher or analysis.scaling == "output"))
        or (refines and plan.refinement.block_output_grams),
        reads=plan.reads,
        anchors=predicts and analysis.anchors,
        compared=predicts and analysis.compared,
        few_bits=analysis.rounds_numbers,
        rounds=plan.rounds if predicts else 0,
        search_tokens=plan.search_tokens if Reads.OBJECTIVE in plan.reads else 0,
        pattern=analysis.pattern,
        limits=analysis.limits,
        matching=plan.refinement.matching,
        distillation=plan.refinement.distillation,
    )


def within(job: Job, layers: ModelLayers, plan: SearchPlan) -> Job:
    """Return a job with what a budget leaves for layers beside the embeddings that it counts, and measures of these.

    Raises:
        BudgetError: nothing is left for the layers.

    >>> from globalopt.models.finding import find_layers
    >>> from globalopt.pipeline.example import example_plan
    >>> from globalopt.reference.tiny import tiny_llama
    >>> layers = find_layers(tiny_llama(), allow_low_coverage=True)
    >>> plan = example_plan(0.5, accounting="bytes", embeddings="8")
    >>> round(within(search_job(plan, refines=True), layers, plan).kept, 3)
    0.493
    """
    if plan.embeddings is None:
        return job
    measured = sum(each.bits < 16 for menu in menus(layers, plan) for each in menu) if measures(plan) else 0
    return replace(job, kept=largest_budget(layers, plan).kept, embeddings=measured)


def compress_job(plan: RefinementPlan, kept: float, few_bits: bool = False) -> Job:
    """Describe the work of a refinement to a budget that keeps a fraction `kept`, in `few_bits` or in 16.

    >>> from globalopt.pipeline.example import example_refinement
    >>> job = compress_job(example_refinement("sparsegpt"), kept=0.5)
    >>> job.anchors, job.refines
    (False, True)
    """
    return Job(
        kept,
        plan.solver,
        probe_solver(plan.solver),
        refines=True,
        sweeps=plan.output_grams or plan.block_output_grams,
        few_bits=few_bits,
        matching=plan.matching,
        distillation=plan.distillation,
    )


def is_weighted(job: Job) -> bool:
    """Tell whether the error metric of layers is chosen.

    >>> from globalopt.pipeline.example import example_plan
    >>> is_weighted(search_job(example_plan(solver="3basil", allocator="knapsack"), refines=True))
    True
    """
    return job.sweeps and job.solver.outputs is not Outputs.NONE


def anchor_count() -> int:
    """Count the anchors of a layer.

    >>> anchor_count()
    5
    """
    return sum(len(kept) for _, kept in ANCHORS)
