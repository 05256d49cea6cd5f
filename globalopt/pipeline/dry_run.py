"""Estimate the parameters, coverage, memory, disk space and time of a run before it is started.

No weights are loaded and nothing is written: the estimate uses the model's config (its layers are found with zeros for
weights) and two timings on this machine, of a matrix product and of the solver on one small layer. With T calibration
tokens, L blocks, hidden size h, b bytes per value in the type computed in, and P parameters of which P_out lie outside
the blocks:

    peak    = this process + weights + hidden states + the largest of the stages
    weights = 3 b P if the model fits in memory (the changed model, the original, the saved one); else b times the
              parameters of the largest block, and P_out in the type that they are stored in
    states  = b T h (L + 1) if a backward sweep needs those of all blocks, else 2 b T h; 0 if they are kept in files
    stages  : a block's Grams of 4 d_in² bytes each and one more, and the solver's own tensors (`WORKING`);
              logits of two models in evaluation, `LABEL_COPIES` times those of a window where labels are sampled;
              candidate weights that a search keeps

Time is that of matrix products, 2 T P operations per forward pass, and of solving layers, which grows as
d_out d_in (d_out + d_in); reading and writing files are left out. The estimate of time is right within a factor of
about three; those of memory and disk are upper bounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from globalopt.analysis.collect import LABELLED
from globalopt.analysis.corrections import WINDOWS as CORRECTION_WINDOWS
from globalopt.analysis.grid import ANCHORS, Options
from globalopt.analysis.metric_choices import KEPT as METRIC_KEPT
from globalopt.analysis.metric_choices import WINDOWS as CHECKED_WINDOWS
from globalopt.analysis.solver_gap import TOGETHER, sampled
from globalopt.errors import UsageError
from globalopt.evaluation.logits import in_parts
from globalopt.evaluation.perplexity import LAZY_LOGITS_AT_ONCE, LOGITS_AT_ONCE, SOFTMAX_AT_ONCE
from globalopt.evaluation.samples import NEW_TOKENS, PROMPT_TOKENS
from globalopt.kernels.top_kl import TOP
from globalopt.machine.memory import WHOLE_COPIES, available, resident
from globalopt.matching.training import Training
from globalopt.models.layers import ModelLayers, find_layers, token_embedding
from globalopt.models.loading import load_structure, reference_folder, resolve_device
from globalopt.models.quantised import find_quantised
from globalopt.models.streaming import dtype_of
from globalopt.objective.kl_to_dense import LAZY_SHARE, WEIGHTS_AT_ONCE
from globalopt.objective.of_run import ANCHORS_AT_ONCE
from globalopt.pipeline import timing
from globalopt.pipeline.options import ModelOptions, TextOptions
from globalopt.pipeline.own_text import TOO_LARGE, at_once
from globalopt.pipeline.plan import RefinementPlan, SearchPlan, probe_solver
from globalopt.pipeline.session import WORKING_BLOCKS
from globalopt.protocols import Needs, Outputs, Reads, Solver
from globalopt.text.mixtures import share_out
from globalopt.text.splits import CUT, NAMES
from globalopt.values.layer import LayerSpec
from globalopt.values.results import DryRun

WORKING = {Needs.NOTHING: (6, 0), Needs.DIAGONAL: (6, 1), Needs.GRAM: (12, 5)}
"""Copies of a site's weights and of its Gram, in float32, that a solver holds at once, by what it needs."""

LIBRARIES = 100 * 2**20
"""Bytes of libraries that are loaded later in a run, and of what is freed and not given back."""

LABEL_COPIES = 5
"""Tensors of the size of the logits of a window, in float32, while labels are sampled and their gradients taken."""

HEADER = 400
"""Bytes of the header of a file per packed decomposition in it: names, types and shapes of its tensors."""

ON_A_PATH = 0.9
"""Time of the probe solver per target on a path of targets, as a fraction of its time for one target alone."""

DEQUANTISING = 1e-7
"""Seconds per parameter of reading a quantised model, and of writing it dequantised."""

TRAINED = 5 * 4 + 8
"""Bytes per trained number: its value, its gradient, Adam's two moments, its best value so far, and its index."""


STEP = 1e-3
"""Seconds that a block takes to read one token, apart from the products with its weights."""


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
        rounds: most rounds in which predicted losses are corrected.
        search_tokens: tokens of forward passes on which the allocator evaluates the objective.
        matching, distillation: how blocks, and the whole model, are trained after refinement, or None.

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
    rounds: int = 0
    search_tokens: int = 0
    matching: Training | None = None
    distillation: Training | None = None


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
        rounds=plan.rounds if predicts else 0,
        search_tokens=plan.search_tokens if Reads.OBJECTIVE in plan.reads else 0,
        matching=plan.refinement.matching,
        distillation=plan.refinement.distillation,
    )


def compress_job(plan: RefinementPlan, kept: float) -> Job:
    """Describe the work of a refinement to a budget that keeps a fraction `kept`.

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
        matching=plan.matching,
        distillation=plan.distillation,
    )


@dataclass(frozen=True, eq=False)
class Structure:
    """Hold the layers of a model without its weights.

    Args:
        layers: of the model built from its config.
        stored: the floating-point type that the checkpoint's weights are stored in.
        quantised: whether the model is dequantised into the cache first.

    >>> structure = Structure.of(ModelOptions())  # the bundled model
    >>> len(structure.layers.specs), structure.stored
    (56, torch.bfloat16)
    """

    layers: ModelLayers
    stored: torch.dtype
    quantised: bool = False

    @classmethod
    def of(cls, models: ModelOptions) -> Structure:
        """Read the structure of the model that the options name; raises what `load_model` and `find_layers` raise."""
        source = models.model or str(reference_folder())
        found = find_quantised(source, models.gguf_file, models.trust_remote_code)
        if found is None:
            model, stored = load_structure(source, models.dtype, models.trust_remote_code)
        else:
            model, stored = found.structure(models.dtype)
        return cls(find_layers(model, models.allow_low_coverage), stored, quantised=found is not None)


def dry_run(structure: Structure, models: ModelOptions, texts: TextOptions, job: Job) -> DryRun:
    """Estimate the memory (bytes), disk space (bytes) and time (seconds) of a run by the formulas of this module.

    Args:
        structure: of the model.
        models, texts: as the run would be given.
        job: the work of the run.

    >>> from globalopt.pipeline.example import example_plan
    >>> job = search_job(example_plan(), refines=True)
    >>> found = dry_run(Structure.of(ModelOptions()), ModelOptions(), TextOptions(), job)
    >>> found.peak > 3 * 4 * found.parameters, found.seconds["refine"] > 0
    (True, True)
    """
    layers = structure.layers
    shape = _Shape.of(structure, models, texts)
    memory, lazy, in_files = _memory(shape, models, job)
    if lazy and shape.written:
        raise UsageError(TOO_LARGE)
    device = resolve_device(models.device)
    rate = timing.rate(device)
    fit_seconds = timing.fit_seconds(job.solver, job.kept, device, _weighted(job))
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
        disk=({"dequantised": shape.parameters * shape.stored} if structure.quantised else {}) | _disk(shape, job),
        seconds=({"dequantise": DEQUANTISING * shape.parameters} if structure.quantised else {})
        | _seconds(shape, job, rate, fit_seconds, device),
        rate=rate,
        fit_seconds=fit_seconds,
    )


@dataclass(frozen=True)
class _Shape:
    """Hold the sizes of a model and its text, in parameters, layers and bytes per value."""

    specs: tuple[LayerSpec, ...]
    parameters: int
    outside: int
    block: int
    blocks: int
    width: int
    vocabulary: int
    computed: int
    stored: int
    parts: bool
    texts: TextOptions

    @classmethod
    def of(cls, structure: Structure, models: ModelOptions, texts: TextOptions) -> _Shape:
        """Count the sizes of a model."""
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
            parts=in_parts(model),
            texts=texts,
        )

    @property
    def tokens(self) -> int:
        """Count the calibration tokens."""
        return self.texts.nsamples * self.texts.seqlen

    @property
    def written(self) -> int:
        """Count the windows that the model writes itself."""
        parts, names = self.texts.parts, NAMES if self.texts.eval_text is None else CUT
        most = {name: self.texts.nsamples if name == NAMES[0] else self.texts.eval_windows for name in names}
        counts = [share_out(name, count, parts) for name, count in most.items()]
        return sum(count for row in counts for part, count in zip(parts, row, strict=True) if part.own)

    @property
    def written_at_once(self) -> int:
        """Count the windows that the model writes together."""
        return min(self.written, at_once(self.texts.batch_size, self.texts.seqlen))

    @property
    def sites(self) -> dict[str, list[LayerSpec]]:
        """Group the layers by input site."""
        found: dict[str, list[LayerSpec]] = {}
        for spec in self.specs:
            found.setdefault(spec.site, []).append(spec)
        return found


def _memory(shape: _Shape, models: ModelOptions, job: Job) -> tuple[dict[str, int], bool, bool]:
    """Estimate bytes by purpose, whether blocks are loaded one at a time, and whether hidden states go to files."""
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
        "Grams and solver": max(_largest_fit(shape, job), _comparison(shape, job)),
        "logits": _logits(shape, job, lazy),
        "candidates": _candidates(shape, job, lazy),
        "matching": _training(shape, job),
        "writing": _writing(shape),
    }
    largest = max(stages, key=lambda name: stages[name])
    states = every if job.sweeps else 2 * row
    memory = {"this process": here + LIBRARIES, "weights": weights, "hidden states": 0 if in_files else states}
    return {**memory, largest: stages[largest]}, lazy, in_files


def _largest_fit(shape: _Shape, job: Job) -> int:
    """Estimate the most bytes that a block's Grams and the solver hold at one site."""
    weights, grams = WORKING[job.solver.needs]
    held = dict.fromkeys(range(shape.blocks), 0)
    most = 0
    for specs in shape.sites.values():
        gram = 4 * specs[0].d_in ** 2
        held[specs[0].block] += gram
        outputs = max(4 * spec.d_out**2 for spec in specs) if job.sweeps else 0
        most = max(most, weights * 4 * sum(spec.numel for spec in specs) + grams * gram + 2 * outputs, 2 * gram)
    return max(held.values()) + most


def _comparison(shape: _Shape, job: Job) -> int:
    """Estimate the bytes that the solver holds while it is compared with the probe, at several targets at once."""
    if not job.compared:
        return 0
    weights, grams = WORKING[job.solver.needs]
    found = 0
    for spec in sampled(shape.specs):
        together = max(1, min(_anchor_count(), TOGETHER // spec.numel))
        found = max(found, 4 * (weights * together * spec.numel + grams * (spec.d_in**2 + spec.d_out**2)))
    return found


def _anchor_count() -> int:
    """Count the anchors of a layer."""
    return sum(len(kept) for _, kept in ANCHORS)


def _logits(shape: _Shape, job: Job, lazy: bool) -> int:
    """Estimate the bytes of logits in evaluation, or where labels are sampled if these are more."""
    window = shape.texts.seqlen * shape.vocabulary
    at_once = LAZY_LOGITS_AT_ONCE if lazy else LOGITS_AT_ONCE
    rows = max(1, min(shape.texts.batch_size, at_once // window))
    # Log probabilities of both models, their exponentials, differences and products.
    held = min(SOFTMAX_AT_ONCE, shape.texts.batch_size * window) if shape.parts and not lazy else rows * window
    evaluation = 2 * held * shape.computed + 6 * 4 * min(SOFTMAX_AT_ONCE, window)
    labels = LABEL_COPIES * 4 * window if job.sweeps else 0
    head = shape.vocabulary * shape.width * shape.computed if lazy and shape.stored < shape.computed else 0
    return max(evaluation, labels) + head


def _candidates(shape: _Shape, job: Job, lazy: bool) -> int:
    """Estimate the bytes of dense weights, candidate weights and anchor residuals that a search holds."""
    # The dense weights beside the model's, while metrics are chosen, losses are corrected or candidates are evaluated.
    if not (_weighted(job) or job.rounds or job.search_tokens):
        return 0
    weights, part = sum(4 * spec.numel for spec in shape.specs), LAZY_SHARE if lazy else 1
    # Residuals in bfloat16, and the spans.
    anchors = _anchor_count()
    fits = 2 * min(ANCHORS_AT_ONCE // part, anchors * weights // 2) if job.rounds or job.search_tokens else 0
    return (0 if lazy else weights) + min(WEIGHTS_AT_ONCE // part, weights) + fits


def _writing(shape: _Shape) -> int:
    """Estimate the bytes of keys and values, at most `2 h` per block and token, and of predictions, in writing."""
    # One block's are held twice, while those of a token are added.
    values = 2 * shape.width * (shape.blocks + 1) * shape.texts.seqlen * shape.computed
    # Probabilities and their sums, of the next token.
    return shape.written_at_once * (values + 3 * 4 * shape.vocabulary)


def _training(shape: _Shape, job: Job) -> int:
    """Estimate the bytes of training: `TRAINED` per kept number, the target outputs, and a block's inner states."""
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
    """Bound the bytes on disk, by folder of the run."""
    weights = sum(spec.numel for spec in shape.specs)
    outputs = sum(_gram_bytes(spec.d_out) for spec in shape.specs)
    found: dict[str, int] = {}
    if shape.written:
        # In the cache, and in the run.
        found["self-text"] = 2 * 8 * shape.written * shape.texts.seqlen
    predicts = Reads.SURFACES in job.reads
    if job.sweeps or predicts or Reads.PROFILES in job.reads:
        found["grams"] = sum(_gram_bytes(specs[0].d_in) for specs in shape.sites.values())
    if job.sweeps:
        found["labels"] = outputs + shape.blocks * _gram_bytes(shape.width)
    if predicts:
        # Directions in bfloat16; singular values and scalings in float32.
        found["spans"] = sum(
            2 * (spec.d_out + spec.d_in) * (spec.max_rank + 2) + 4 * spec.max_rank + HEADER for spec in shape.specs
        )
    if job.anchors:
        found["anchors"] = sum(map(_anchor_bytes, shape.specs))
    elif _weighted(job):
        target = 4 * METRIC_KEPT + 1 / 8
        found["metrics"] = int(target * weights) + HEADER * len(shape.specs)
    if job.refines:
        # Packed: the parameters that are kept, and one bit per entry for the support, and one for signs.
        bits = (1 + job.solver.signs) * weights // 8
        found["layers"] = int(job.kept * weights * shape.stored) + bits + HEADER * len(shape.specs)
        if job.matching is not None:
            found["matched"] = (1 + (job.distillation is not None)) * found["layers"]
        found["model"] = shape.parameters * shape.stored
    return found


def _gram_bytes(side: int) -> int:
    """Count the bytes of a Gram: a triangle of correlations in float16, and the diagonal in float32."""
    return side * (side - 1) + 4 * side + HEADER


def _anchor_bytes(spec: LayerSpec) -> int:
    """Count the bytes of a layer's anchor solutions: values and factors in bfloat16, and one bit per entry."""
    anchors = [anchor for row in Options.of(spec, spec.max_rank).anchors for anchor in row]
    return sum(2 * anchor.params(spec) + spec.numel // 8 + HEADER for anchor in anchors)


def _seconds(shape: _Shape, job: Job, rate: float, fit: float, device: torch.device) -> dict[str, float]:
    """Estimate the seconds of every stage."""
    texts = shape.texts

    def forward(tokens: float) -> float:
        return 2 * tokens * shape.parameters / rate

    def fits(seconds: float, specs: Sequence[LayerSpec] = shape.specs) -> float:
        return sum(seconds * timing.size(spec) for spec in specs)

    tokens, window = shape.tokens, texts.seqlen
    grams = 2 * tokens * sum(specs[0].d_in ** 2 for specs in shape.sites.values()) / rate
    outputs = 2 * tokens * sum(spec.d_out**2 for spec in shape.specs) / rate
    predicts, weighted = Reads.SURFACES in job.reads, _weighted(job)
    found: dict[str, float] = {}
    if shape.written:
        # Every step multiplies the weights with few tokens, so that reading them takes longest.
        rows = shape.written_at_once
        steps = math.ceil(shape.written / rows) * texts.seqlen
        found["self-text"] = steps * (2 * rows * shape.parameters / timing.rate(device, rows) + STEP * shape.blocks)
    probed = timing.fit_seconds(job.probe, job.kept, device, weighted) if weighted or job.anchors else 0.0
    anchors = _anchor_count()
    if job.sweeps:
        # A forward pass; on some of the batches another one, a backward pass, and the output Grams.
        found["labels"] = forward(tokens) + grams + (3 * forward(tokens) + outputs) / LABELLED
    elif predicts or Reads.PROFILES in job.reads:
        found["grams"] = forward(tokens) + grams
    if Reads.PROFILES in job.reads:
        found["profile"] = 2 * sum(2 * spec.numel * min(spec.d_out, spec.d_in) for spec in shape.specs) / rate
    if predicts:
        found["span"] = fits(timing.span_seconds(device))
    if job.anchors:
        found["anchors"] = ON_A_PATH * anchors * fits(probed)
    elif weighted:
        found["probe"] = fits(probed)
    if weighted:
        # The dense model, the model with all layers replaced, forward and backward, and a few layers alone.
        found["metric"] = (5 + len(shape.specs) / 20) * forward(CHECKED_WINDOWS * window)
    if job.compared:
        found["gap"] = anchors * fits(fit, sampled(shape.specs))
    if predicts:
        products = sum(2 * spec.numel * (spec.d_out + spec.d_in) for spec in shape.specs)
        found["predict"] = (anchors if job.anchors else 1) * products / rate
    if job.rounds:
        found["correct"] = 4 * job.rounds * forward(CORRECTION_WINDOWS * window)
    if job.search_tokens:
        found["search"] = forward(job.search_tokens)
    if job.refines:
        found["refine"] = 2 * forward(tokens) + grams + fits(fit)
        if job.matching is not None:
            # Forward and backward passes with the loss of held-out windows, and as much again for other operations.
            found["match blocks"] = 2 * 3 * job.matching.epochs * forward(tokens)
        if job.distillation is not None:
            found["match model"] = 2 * 3 * job.distillation.epochs * forward(tokens)
        found["evaluate"] = 4 * forward(texts.eval_windows * texts.seqlen)
        if texts.samples:
            found["samples"] = 2 * forward(texts.samples * (PROMPT_TOKENS + NEW_TOKENS))
    return found


def _weighted(job: Job) -> bool:
    """Tell whether the error metric of layers is chosen."""
    return job.sweeps and job.solver.outputs is not Outputs.NONE
