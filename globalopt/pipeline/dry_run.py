"""What a run would take, before it is started: parameters, coverage, memory, disk, time. Nothing is loaded or written.

All of it comes from the model's config (its layers are found with zeros for weights) and from two measurements on this
machine: a product of matrices, and a fit of one small layer by the solver. With T calibration tokens, L blocks, hidden
size h, b bytes per value computed with, vocabulary V, and P parameters of which P_out lie outside the blocks:

    peak    = this process now + weights + hidden states + the largest of the stages
    weights = 3 b P of a model that fits (the changed one, the original, the saved one); else b of the largest block and
              P_out in the type it is stored in
    states  = b T h (L + 1) where a backward sweep needs those of all blocks, else 2 b T h; none where they go to files
    stages  : a block's Grams, 4 d_in² bytes each and one more, and what the solver works with (`WORKING`);
              logits, two models' in evaluation, `LABEL_COPIES` of a batch's where labels are sampled;
              what a search holds of its candidates

Time is that of the products, 2 T P each forward pass, and of the fits, which grow as d_out d_in (d_out + d_in); reading
and writing files are left out. It is a guess within a factor of three or so; memory and disk are upper ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from globalopt.analysis.grid import Options
from globalopt.analysis.one_layer_losses import MEASURED_WINDOWS
from globalopt.analysis.solver_gap import sampled
from globalopt.evaluation.perplexity import LAZY_LOGITS_AT_ONCE, LOGITS_AT_ONCE, SOFTMAX_AT_ONCE
from globalopt.kernels.top_kl import TOP
from globalopt.machine.memory import WHOLE_COPIES, available, resident
from globalopt.matching.training import Training
from globalopt.models.layers import ModelLayers, find_layers, token_embedding
from globalopt.models.loading import load_structure, reference_folder, resolve_device
from globalopt.models.streaming import dtype_of
from globalopt.objective.kl_to_dense import LAZY_SHARE, WEIGHTS_AT_ONCE
from globalopt.objective.of_run import ANCHORS_AT_ONCE
from globalopt.pipeline import timing
from globalopt.pipeline.options import ModelOptions, TextOptions
from globalopt.pipeline.plan import RefinementPlan, SearchPlan, probe_solver
from globalopt.pipeline.session import WORKING_BLOCKS
from globalopt.protocols import Needs, Outputs, Solver
from globalopt.values.layer import LayerSpec
from globalopt.values.results import DryRun

WORKING = {Needs.NOTHING: (6, 0), Needs.DIAGONAL: (6, 1), Needs.GRAM: (12, 5)}
"""Weights of a site's layers, and Grams of it, that a solver holds at once, by what it reads; float32."""

LABEL_COPIES = 5
"""Tensors of the size of a batch's logits, in float32, while labels are sampled and their gradients taken."""

ON_A_PATH = 0.7
"""What quick fits take on a path of targets, of their time alone."""

TRAINED = 5 * 4 + 8
"""Bytes per trained number: itself, its gradient, Adam's two moments, the best so far, and where it belongs."""


@dataclass(frozen=True)
class Job:
    """What is to be done.

    Args:
        kept: fraction of the compressible parameters.
        quick: fits layers that are only looked at.
        searches: whether an analysis and an allocation come first.
        search_tokens: forward tokens of the search.
        refines: whether a model comes out; of a family of budgets none does.
        sweeps: whether a backward sweep prices layers or collects output Grams.
        fits: whether layers are priced by fits.
        matching, distillation: how blocks, and the whole model, are trained after the fits, or None.
    """

    kept: float
    solver: Solver
    quick: Solver
    searches: bool
    refines: bool
    sweeps: bool
    fits: bool = False
    search_tokens: int = 0
    matching: Training | None = None
    distillation: Training | None = None


def search_job(plan: SearchPlan, refines: bool) -> Job:
    """The work of a search, for an estimate; of a family of budgets none is refined."""
    return Job(
        plan.rule.kept,
        plan.analysis.solver,
        plan.analysis.probe,
        searches=True,
        refines=refines,
        sweeps=plan.analysis.fisher,
        fits=plan.analysis.anchors,
        search_tokens=plan.search_tokens,
        matching=plan.refinement.matching,
        distillation=plan.refinement.distillation,
    )


def compress_job(plan: RefinementPlan, kept: float) -> Job:
    """The work of a refinement to a budget that keeps a fraction `kept`, for an estimate."""
    return Job(
        kept,
        plan.solver,
        probe_solver(plan.solver.outputs),
        searches=False,
        refines=True,
        sweeps=plan.output_grams or plan.block_output_grams,
        matching=plan.matching,
        distillation=plan.distillation,
    )


@dataclass(frozen=True, eq=False)
class Structure:
    """The layers of a model without its weights, and the type these are stored in."""

    layers: ModelLayers
    stored: torch.dtype

    @classmethod
    def of(cls, models: ModelOptions) -> Structure:
        """That of the model the options name; errors as `load_model` and `find_layers`."""
        source = models.model or str(reference_folder())
        model, stored = load_structure(source, models.dtype, models.trust_remote_code)
        return cls(find_layers(model, models.allow_low_coverage), stored)


def dry_run(structure: Structure, models: ModelOptions, texts: TextOptions, job: Job) -> DryRun:
    """Estimate a run; see the module for the formulas."""
    layers = structure.layers
    shape = _Shape.of(structure, models, texts)
    memory, lazy, in_files = _memory(shape, models, job)
    device = resolve_device(models.device)
    rate = timing.rate(device)
    fit_seconds = timing.fit_seconds(job.solver, job.kept, device)
    return DryRun(
        model=models.model or "reference",
        parameters=shape.parameters,
        block_params=layers.coverage.block_params,
        covered=layers.coverage.covered,
        skipped=dict(layers.coverage.skipped),
        blocks=len(layers.blocks),
        layers=len(layers.specs),
        lazy=lazy,
        states_in_files=in_files,
        memory=memory,
        disk=_disk(shape, job),
        seconds=_seconds(shape, job, rate, fit_seconds, device),
        rate=rate,
        fit_seconds=fit_seconds,
    )


@dataclass(frozen=True)
class _Shape:
    """Numbers of a model and its text."""

    specs: tuple[LayerSpec, ...]
    parameters: int
    outside: int
    block: int
    blocks: int
    width: int
    vocabulary: int
    computed: int
    stored: int
    texts: TextOptions

    @classmethod
    def of(cls, structure: Structure, models: ModelOptions, texts: TextOptions) -> _Shape:
        layers, model = structure.layers, structure.layers.model
        parameters = sum(p.numel() for p in model.parameters())
        blocks = [sum(p.numel() for p in block.parameters()) for block in layers.blocks]
        on_cpu = resolve_device(models.device).type == "cpu"
        return cls(
            specs=layers.specs,
            parameters=parameters,
            outside=parameters - sum(blocks),
            block=max(blocks),
            blocks=len(blocks),
            width=token_embedding(model).embedding_dim,
            vocabulary=model.config.get_text_config(decoder=True).vocab_size,
            computed=(dtype_of(model) if on_cpu or models.dtype != "auto" else structure.stored).itemsize,
            stored=structure.stored.itemsize,
            texts=texts,
        )

    @property
    def tokens(self) -> int:
        return self.texts.nsamples * self.texts.seqlen

    @property
    def sites(self) -> dict[str, list[LayerSpec]]:
        found: dict[str, list[LayerSpec]] = {}
        for spec in self.specs:
            found.setdefault(spec.site, []).append(spec)
        return found


def _memory(shape: _Shape, models: ModelOptions, job: Job) -> tuple[dict[str, int], bool, bool]:
    """Bytes by what they are for; whether blocks come one at a time; whether hidden states go to files."""
    here = resident()
    room = available(resolve_device(models.device)) if models.limit is None else models.limit - here
    whole = WHOLE_COPIES * shape.parameters * shape.computed
    row = shape.tokens * shape.width * shape.computed
    every = row * (shape.blocks + 1)
    lazy = whole + every > room
    in_files = lazy and every + WORKING_BLOCKS * shape.block * shape.computed > room
    narrow = min(shape.stored, shape.computed)
    weights = shape.outside * narrow + shape.block * shape.computed if lazy else whole
    stages = {
        "Grams and solver": _largest_fit(shape, job),
        "logits": _logits(shape, job, lazy),
        "candidates": _candidates(shape, job, lazy),
        "matching": _training(shape, job),
    }
    largest = max(stages, key=lambda name: stages[name])
    states = every if job.sweeps else 2 * row
    memory = {"this process now": here, "weights": weights, "hidden states": 0 if in_files else states}
    return {**memory, largest: stages[largest]}, lazy, in_files


def _largest_fit(shape: _Shape, job: Job) -> int:
    weights, grams = WORKING[job.solver.needs]
    held = dict.fromkeys(range(shape.blocks), 0)
    most = 0
    for specs in shape.sites.values():
        gram = 4 * specs[0].d_in ** 2
        held[specs[0].block] += gram
        outputs = max(4 * spec.d_out**2 for spec in specs) if job.sweeps else 0
        most = max(most, weights * 4 * sum(spec.numel for spec in specs) + grams * gram + 2 * outputs, 2 * gram)
    return max(held.values()) + most


def _logits(shape: _Shape, job: Job, lazy: bool) -> int:
    window = shape.texts.seqlen * shape.vocabulary
    at_once = LAZY_LOGITS_AT_ONCE if lazy else LOGITS_AT_ONCE
    rows = max(1, min(shape.texts.batch_size, at_once // window))
    # Log probabilities of both models, their exponentials, differences and products.
    evaluation = 2 * rows * window * shape.computed + 6 * 4 * min(SOFTMAX_AT_ONCE, window)
    labels = LABEL_COPIES * 4 * min(shape.texts.batch_size, shape.texts.nsamples) * window if job.sweeps else 0
    head = shape.vocabulary * shape.width * shape.computed if lazy and shape.stored < shape.computed else 0
    return max(evaluation, labels) + head


def _candidates(shape: _Shape, job: Job, lazy: bool) -> int:
    if not (job.searches or job.sweeps):
        return 0
    weights, part = sum(4 * spec.numel for spec in shape.specs), LAZY_SHARE if lazy else 1
    fits = 2 * min(ANCHORS_AT_ONCE // part, 4 * weights) if job.searches and job.search_tokens else 0
    return (0 if lazy else weights) + min(WEIGHTS_AT_ONCE // part, weights) + fits


def _training(shape: _Shape, job: Job) -> int:
    """What training holds: of every kept number five copies and its index, and a block's answers and inner states."""
    if not job.refines or job.matching is None:
        return 0
    weights = max(sum(spec.numel for spec in shape.specs if spec.block == block) for block in range(shape.blocks))
    inner = max(sum(spec.d_out + spec.d_in for spec in shape.specs if spec.block == b) for b in range(shape.blocks))
    found = TRAINED * weights * job.kept + 2 * 4 * weights
    found += shape.tokens * shape.width * shape.computed
    found += 3 * 4 * job.matching.windows * shape.texts.seqlen * inner
    if job.distillation is not None:
        total = sum(spec.numel for spec in shape.specs)
        rows = job.distillation.windows * shape.texts.seqlen
        teacher = shape.tokens * min(TOP, shape.vocabulary) * 8
        states = 3 * 4 * rows * (inner * shape.blocks + LABEL_COPIES * shape.vocabulary)
        found = max(found, TRAINED * total * job.kept + 2 * 4 * total + teacher + states)
    return int(found)


def _disk(shape: _Shape, job: Job) -> dict[str, int]:
    """Bytes by folder of the run, at most."""
    weights = sum(spec.numel for spec in shape.specs)
    outputs = sum(4 * spec.d_out**2 for spec in shape.specs)
    found: dict[str, int] = {}
    if job.sweeps or job.searches:
        found["grams"] = sum(4 * specs[0].d_in ** 2 for specs in shape.sites.values())
    if job.sweeps:
        found["labels"] = outputs
    if job.searches:
        # Robust PCA finds at most the rank at which it would turn to a full decomposition.
        factors = sum((spec.d_out + spec.d_in) * spec.max_rank // 4 for spec in shape.specs)
        found["spans"] = 4 * (weights + factors)
        if job.fits:
            found["anchors"] = sum(map(_anchor_bytes, shape.specs))
        if job.sweeps and job.solver.outputs is not Outputs.NONE:
            # Of the probe's labels beside those of the predictions.
            found["probe labels"] = outputs
    if job.refines:
        found["layers"] = int((1 + job.kept) * weights * shape.stored)
        if job.matching is not None:
            found["matched"] = (1 + (job.distillation is not None)) * found["layers"]
        found["model"] = shape.parameters * shape.stored
    return found


def _anchor_bytes(spec: LayerSpec) -> int:
    """Bytes of the anchor solutions of a layer: values and factors in float32, and a bit per entry of each."""
    anchors = [anchor for row in Options.of(spec, spec.max_rank).anchors for anchor in row]
    return sum(4 * anchor.params(spec) + spec.numel // 8 + 1 for anchor in anchors)


def _seconds(shape: _Shape, job: Job, rate: float, fit: float, device: torch.device) -> dict[str, float]:
    """Seconds by stage."""
    texts = shape.texts

    def forward(tokens: float) -> float:
        return 2 * tokens * shape.parameters / rate

    def fits(seconds: float, specs: Sequence[LayerSpec] = shape.specs) -> float:
        return sum(seconds * timing.size(spec) for spec in specs)

    tokens = shape.tokens
    grams = 2 * tokens * sum(specs[0].d_in ** 2 for specs in shape.sites.values()) / rate
    outputs = 2 * tokens * sum(spec.d_out**2 for spec in shape.specs) / rate
    # Asked about one layer, half of the blocks are run again on average.
    look = len(shape.specs) * forward(MEASURED_WINDOWS * texts.seqlen) / 2
    found: dict[str, float] = {}
    weighed = job.sweeps and job.solver.outputs is not Outputs.NONE
    quick = timing.fit_seconds(job.quick, job.kept, device) if weighed or job.fits else 0.0
    # Matching asks for those of the blocks, in a sweep of its own where the solver reads none.
    if weighed or (job.sweeps and job.matching is not None):
        found["labels"] = 4 * forward(tokens) + grams + outputs
    if weighed:
        found["metric"] = 2 * look + 2 * fits(quick)
    if job.searches:
        found["span"] = forward(tokens) + grams + fits(timing.span_seconds(device))
        if job.fits:
            found["gap"] = 8 * fits(quick + fit, sampled(shape.specs))
            found["anchors"] = ON_A_PATH * 8 * fits(quick)
            found["measure"] = 4 * look
        if job.sweeps:
            found["predict"] = 3 * forward(tokens) + outputs
        found["search"] = forward(job.search_tokens)
    if job.refines:
        found["refine"] = 2 * forward(tokens) + grams + fits(fit)
        if job.matching is not None:
            # Forward and backward, with a look at the held-out windows, and as much again for what is no product.
            found["match blocks"] = 2 * 3 * job.matching.epochs * forward(tokens)
        if job.distillation is not None:
            found["match model"] = 2 * 3 * job.distillation.epochs * forward(tokens)
        found["evaluate"] = 4 * forward(texts.eval_windows * texts.seqlen)
    return found
