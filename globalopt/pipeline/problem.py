"""Pose the allocation problem of an analysed model, from the predictions, profiles and spans of its run."""

from __future__ import annotations

import torch
from torch import Tensor

from globalopt.analysis.grid import Options
from globalopt.pipeline.embeddings import largest_budget
from globalopt.pipeline.plan import AnalysisPlan, SearchPlan
from globalopt.pipeline.session import Session
from globalopt.protocols import Reads
from globalopt.runs.artefacts import DIRECTIONS, PREDICTION, PROFILE, ROUNDING
from globalopt.runs.folder import Run
from globalopt.values.layer import LayerSpec
from globalopt.values.problem import Problem
from globalopt.values.rounding_losses import with_storages
from globalopt.values.span import Span
from globalopt.values.surface import ErrorSurface


def pose(session: Session, plan: SearchPlan, run: Run, reads: Reads | None = None) -> Problem:
    """Pose the allocation problem of an analysed model: the error surfaces of its layers, under its budget.

    Where no losses are predicted, as the allocator does not read them, a layer has two options, dense and zero, and its
    surface is its share of the weights.

    Args:
        run: with predictions, profiles and spans, as far as they are read. The problem's spans are right while the
            session's model is dense.
        reads: what is read; None is what the plan's allocator reads.

    >>> from pathlib import Path
    >>> from globalopt.pipeline.analyse import analyse
    >>> from globalopt.pipeline.example import example_plan, example_reporter, example_session
    >>> session, plan = example_session(), example_plan(allocator="knapsack")
    >>> with Run.start(Path("posed"), {}, {}) as run:
    ...     _ = analyse(session, example_reporter(), plan.analysis, run)
    ...     problem = pose(session, plan, run)
    >>> len(problem.specs), problem.budget.limit, {target.rank for target in problem.surfaces[0].targets}
    (14, 2176, {0})
    """
    reads = plan.reads if reads is None else reads
    specs = {spec.name: spec for spec in session.layers.specs}
    if Reads.SURFACES in reads:
        surfaces = tuple(run.get(PREDICTION, spec).surface for spec in specs.values())
    else:
        surfaces = tuple(_unpredicted(spec, plan.analysis) for spec in specs.values())
    if plan.analysis.rounds_numbers:
        losses = [run.get(ROUNDING, s.spec) if Reads.SURFACES in reads else None for s in surfaces]
        menu = plan.analysis.storages
        surfaces = tuple(with_storages(s, each, menu) for s, each in zip(surfaces, losses, strict=True))
    solver = plan.analysis.solver
    if Reads.SURFACES in reads and not (solver.sparse or solver.low_rank):
        surfaces = tuple(_of_whole(surface) for surface in surfaces)
    profiles = {name: run.get(PROFILE, spec) for name, spec in specs.items()} if Reads.PROFILES in reads else {}

    def span(name: str) -> Span:
        return span_of(run, specs[name], session.layers.weight(name))

    return Problem(
        surfaces,
        largest_budget(session.layers, plan),
        plan.analysis.pattern,
        plan.seed,
        profiles,
        plan.analysis.limits,
        span if Reads.SPANS in reads else None,
    )


def span_of(run: Run, spec: LayerSpec, weight: Tensor) -> Span:
    """Read the span of a layer into main memory, given its dense weight.

    >>> from pathlib import Path
    >>> from globalopt.values.span import SpanBasis
    >>> u, spec = torch.full((2, 1), 0.5**0.5), LayerSpec("up_proj", 0, "up_proj", "up_proj", 2, 2)
    >>> basis = SpanBasis(u, torch.tensor([4.0]), u.mT, scale=torch.ones(2), rows=torch.ones(2, 1))
    >>> with Run.start(Path("span"), {}, {}) as run:
    ...     run.put(DIRECTIONS, spec, basis)
    ...     span = span_of(run, spec, torch.tensor([[2.0, 2.0], [2.0, 7.0]]))
    >>> span.s, round(float(span.S[1, 1]), 2)
    (tensor([4.]), 5.0)
    """
    return run.get(DIRECTIONS, spec).span(weight).to(torch.device("cpu"))


def _of_whole(surface: ErrorSurface) -> ErrorSurface:
    """Leave the options that keep every weight, for a solver that drops none: they differ by their storages alone."""
    whole = [(t, e) for t, e in zip(surface.targets, surface.error, strict=True) if t.nnz == surface.spec.numel]
    targets, errors = zip(*whole, strict=True)
    return ErrorSurface(surface.spec, targets, errors)


def _unpredicted(spec: LayerSpec, plan: AnalysisPlan) -> ErrorSurface:
    """Make a surface that says nothing of a layer but its size; its options are those that a uniform budget needs."""
    most = spec.max_rank if plan.solver.low_rank else 0
    targets = Options.of(spec, most, plan.pattern, plan.limits).targets
    return ErrorSurface(spec, targets, tuple(float(spec.numel - target.params(spec)) for target in targets))
