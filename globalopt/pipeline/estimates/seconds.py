"""Estimate the seconds of every stage of a run.

Time is that of matrix products, 2 T P operations per forward pass on T tokens through P parameters, and of solving
layers, which grows as d_out d_in (d_out + d_in); reading and writing files are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from globalopt.analysis.anchor_curves import fully_solved
from globalopt.analysis.collect import ANALYSED
from globalopt.analysis.corrections import WINDOWS as CORRECTION_WINDOWS
from globalopt.analysis.grid import ANCHORS
from globalopt.analysis.metric_choices import WINDOWS as CHECKED_WINDOWS
from globalopt.analysis.rounding import FEW
from globalopt.analysis.solver_gap import sampled
from globalopt.evaluation.samples import NEW_TOKENS, PROMPT_TOKENS
from globalopt.models.walk import SAMPLED
from globalopt.pipeline import timing
from globalopt.pipeline.estimates.job import Job, anchor_count, is_weighted
from globalopt.pipeline.estimates.shape import Shape
from globalopt.protocols import Needs, Reads
from globalopt.refine.needed import needed
from globalopt.values.layer import LayerSpec

ON_A_PATH = 0.9
"""Time of the probe solver per target on a path of targets, as a fraction of its time for one target alone."""

SHORTER = 0.4
"""Time of the shorter version of a solver, with which the probe is compared, as a fraction of the solver's."""

OF_KIND = 4
"""Solutions of a layer of each kind that are rounded as a refinement rounds them, about."""

GRID_PRODUCTS = 4
"""Products with a Gram while a layer is rounded."""

STEP = 1e-3
"""Seconds that a block takes to read one token, apart from the products with its weights."""


def stage_seconds(shape: Shape, job: Job, rate: float, fit: float, device: torch.device) -> dict[str, float]:
    """Estimate the seconds of every stage.

    >>> from globalopt.pipeline.example import example_plan
    >>> from globalopt.pipeline.estimates.job import search_job
    >>> from globalopt.pipeline.estimates.shape import Structure
    >>> from globalopt.pipeline.options import ModelOptions, TextOptions
    >>> models, job = ModelOptions(), search_job(example_plan(), refines=True)
    >>> shape = Shape.of(Structure.of(models), models, TextOptions())
    >>> list(stage_seconds(shape, job, rate=1e11, fit=1e-3, device=torch.device("cpu")))
    ['refine', 'evaluate', 'samples']
    """
    texts = shape.texts

    def forward(tokens: float) -> float:
        return 2 * tokens * shape.parameters / rate

    def fits(seconds: float, specs: Sequence[LayerSpec] = shape.specs) -> float:
        return sum(seconds * timing.size(spec) for spec in specs)

    def on_grid(seconds: float, specs: Sequence[LayerSpec], joint: bool = False) -> float:
        products = sum(2 * spec.numel * (spec.d_in + joint * spec.d_out) for spec in specs)
        return sum(seconds * timing.column_size(spec, joint) for spec in specs) + GRID_PRODUCTS * products / rate

    tokens, window = shape.tokens, texts.seqlen
    grams = 2 * tokens * sum(specs[0].d_in ** 2 for specs in shape.sites.values()) / rate
    outputs = 2 * tokens * sum(spec.d_out**2 for spec in shape.specs) / rate
    products = sum(2 * spec.numel * (spec.d_out + spec.d_in) for spec in shape.specs)
    predicts, weighted = Reads.SURFACES in job.reads, is_weighted(job)
    found: dict[str, float] = {}
    if shape.written:
        # Every step multiplies the weights with few tokens, so that reading them takes longest.
        rows = shape.written_at_once
        steps = math.ceil(shape.written / rows) * texts.seqlen
        found["self-text"] = steps * (2 * rows * shape.parameters / timing.rate(device, rows) + STEP * shape.blocks)
    probed = timing.fit_seconds(job.probe, job.kept, device, weighted) if weighted or job.anchors else 0.0
    anchors, some = anchor_count(), fully_solved(shape.specs)
    solved = [spec for spec in shape.specs if spec.name in some] if job.anchors else []
    if job.sweeps:
        # A forward pass, and another one with a backward pass.
        found["labels"] = (4 * forward(tokens) + grams + outputs) / ANALYSED
    elif predicts or Reads.PROFILES in job.reads:
        found["grams"] = (forward(tokens) + grams) / ANALYSED
    if Reads.PROFILES in job.reads:
        found["profile"] = 2 * sum(2 * spec.numel * min(spec.d_out, spec.d_in) for spec in shape.specs) / rate
    if predicts:
        found["span"] = fits(timing.span_seconds(device))
    if job.anchors:
        found["anchors"] = fits(probed) + ON_A_PATH * (anchors - 1) * fits(probed, solved)
    elif weighted:
        found["probe"] = fits(probed)
    if weighted:
        # The dense model, the model with all layers replaced, forward and backward, and a few layers alone.
        found["metric"] = (5 + len(shape.specs) / 20) * forward(CHECKED_WINDOWS * window)
    if job.compared:
        shorter = 1.0 if job.solver.shorter() == job.solver else SHORTER
        found["gap"] = shorter * anchors * fits(fit, sampled(shape.specs))
    rounded = timing.rounding_seconds(job.solver, job.kept, device, weighted) if job.few_bits else 0.0
    if predicts and job.few_bits:
        # A fit of the dense weight and one of a sparse solution; scales for every number of bits, of all solutions.
        fitted = timing.grid_fit_seconds(device)
        found["rounding"] = sum(on_grid(fitted, specs) for specs in (shape.specs, solved))
        numbers = sum(spec.numel for spec in shape.specs) + sum(ANCHORS[0][1]) * sum(spec.numel for spec in solved)
        found["rounding"] += len(FEW) * numbers * timing.scale_seconds(device)
        found["rounding"] += OF_KIND * on_grid(rounded, sampled(shape.specs), weighted)
    if predicts:
        found["predict"] = (anchors if job.anchors else 1) * products / rate
    if job.embeddings:
        found["embeddings"] = (1 + job.embeddings) * forward(CORRECTION_WINDOWS * window)
    if job.rounds:
        found["correct"] = 4 * job.rounds * forward(CORRECTION_WINDOWS * window)
    if job.search_tokens:
        found["search"] = forward(job.search_tokens)
    if job.refines:
        # Its Grams, and the outputs of the layers that it has replaced.
        reads = needed(job.solver, job.few_bits, job.sweeps)
        walks = 2 * forward(tokens) if reads > Needs.NOTHING or job.matching is not None else 0.0
        read = {Needs.NOTHING: 0.0, Needs.DIAGONAL: 1 / SAMPLED, Needs.GRAM: 1.0}[reads]
        found["refine"] = walks + read * grams + fits(fit)
        if job.few_bits:
            found["refine"] += on_grid(rounded, shape.specs, weighted)
        if job.matching is not None:
            # Forward and backward passes with the loss of held-out windows, and as much again for other operations.
            found["match blocks"] = 2 * 3 * job.matching.epochs * forward(tokens)
        if job.distillation is not None:
            found["match model"] = 2 * 3 * job.distillation.epochs * forward(tokens)
    if job.refines and texts.evaluate:
        found["evaluate"] = 4 * forward(texts.eval_windows * texts.seqlen)
        if texts.samples:
            found["samples"] = 2 * forward(texts.samples * (PROMPT_TOKENS + NEW_TOKENS))
    return found
