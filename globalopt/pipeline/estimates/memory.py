"""Bound the bytes of memory that a run takes at its peak.

With T calibration tokens, L blocks, hidden size h, b bytes per value in the type computed in, and P parameters of which
P_out lie outside the blocks:

    peak    = this process + hidden states + weights and the stage's own, of the stage where they are most
    weights = b P, and 2 b P in evaluation (the original, the saved one) and where predictions are matched, if the model
              fits in memory; else b times the parameters of the largest block, and P_out in the type that they are
              stored in
    states  = b T h (L + 1) if a backward sweep needs those of all blocks, else 2 b T h; 0 if they are kept in files
    stages  : the file of a model that is read, where it is stored in another type;
              a block's Grams of 4 d_in² bytes each and one more, and the solver's own tensors (`WORKING`);
              logits of two models in evaluation, `LABEL_COPIES` times those of a window where labels are sampled;
              dense weights and candidate weights that a search keeps
"""

from __future__ import annotations

from globalopt.analysis.solver_gap import TOGETHER, sampled
from globalopt.evaluation.perplexity import LAZY_LOGITS_AT_ONCE, LOGITS_AT_ONCE, SOFTMAX_AT_ONCE
from globalopt.kernels.top_kl import TOP
from globalopt.machine.memory import WHOLE_COPIES, available, resident
from globalopt.models.device import resolve_device
from globalopt.objective.kl_to_dense import LAZY_SHARE, WEIGHTS_AT_ONCE
from globalopt.objective.of_run import ANCHORS_AT_ONCE
from globalopt.pipeline.estimates.job import Job, anchor_count, is_weighted
from globalopt.pipeline.estimates.shape import Shape
from globalopt.pipeline.options import ModelOptions
from globalopt.pipeline.session import WORKING_BLOCKS
from globalopt.protocols import Needs

WORKING = {Needs.NOTHING: (6, 0), Needs.DIAGONAL: (6, 1), Needs.GRAM: (12, 5)}
"""Copies of a site's weights and of its Gram, in float32, that a solver holds at once, by what it needs."""

LIBRARIES = 200 * 2**20
"""Bytes of libraries that are loaded later in a run, and of what is freed and not given back."""

TARGETS_AT_ONCE = 2
"""Times as many copies that a solver holds per weight where it solves a layer at several targets at once."""

LABEL_COPIES = 5
"""Tensors of the size of the logits of a window, in float32, while labels are sampled and their gradients taken."""

TRAINED = 5 * 4 + 8
"""Bytes per trained number: its value, its gradient, Adam's two moments, its best value so far, and its index."""


def memory_bytes(shape: Shape, models: ModelOptions, job: Job) -> tuple[dict[str, int], bool, bool]:
    """Estimate bytes by purpose, whether blocks are loaded one at a time, and whether hidden states go to files.

    >>> from globalopt.pipeline.estimates.job import search_job
    >>> from globalopt.pipeline.estimates.shape import Structure
    >>> from globalopt.pipeline.example import example_plan
    >>> from globalopt.pipeline.options import TextOptions
    >>> models, job = ModelOptions(), search_job(example_plan(), refines=True)
    >>> shape = Shape.of(Structure.of(models), models, TextOptions())
    >>> memory, lazy, in_files = memory_bytes(shape, models, job)
    >>> memory["weights"] == 2 * 4 * shape.parameters, lazy, in_files
    (True, False, False)
    """
    here = resident()
    room = available(resolve_device(models.device)) if models.limit is None else models.limit - here
    whole = WHOLE_COPIES * shape.parameters * shape.computed
    row = shape.tokens * shape.width * shape.computed
    every = row * (shape.blocks + 1)
    lazy = whole + every > room
    in_files = lazy and every + WORKING_BLOCKS * shape.block * shape.computed > room
    narrow = min(shape.stored, shape.computed)
    evaluates = job.refines and shape.texts.evaluate
    copies = {"logits": 1 + evaluates, "reading": 1 + evaluates, "matching": 1 + (job.distillation is not None)}
    stages = {
        "reading": 0 if lazy or shape.stored == shape.computed else shape.parameters * shape.stored,
        "Grams and solver": max(_largest_fit(shape, job), _comparison(shape, job)),
        "logits": _logits(shape, job, lazy),
        "candidates": _candidates(shape, job, lazy),
        "matching": _training(shape, job),
        "writing": _writing(shape),
    }

    def weights(stage: str) -> int:
        if lazy:
            return shape.outside * narrow + shape.block * shape.computed
        return copies.get(stage, 1) * shape.parameters * shape.computed

    largest = max(stages, key=lambda name: weights(name) + stages[name])
    states = every if job.sweeps else 2 * row
    memory = {"this process": here + LIBRARIES, "weights": weights(largest), "hidden states": 0 if in_files else states}
    return {**memory, largest: stages[largest]}, lazy, in_files


def _largest_fit(shape: Shape, job: Job) -> int:
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


def _comparison(shape: Shape, job: Job) -> int:
    """Estimate the bytes that the solver holds while it is compared with the probe, at several targets at once."""
    if not job.compared:
        return 0
    weights, grams = WORKING[job.solver.needs]
    found = 0
    for spec in sampled(shape.specs):
        together = max(1, min(anchor_count(), TOGETHER // spec.numel))
        copies = weights * (TARGETS_AT_ONCE if together > 1 else 1)
        found = max(found, 4 * (copies * together * spec.numel + grams * (spec.d_in**2 + spec.d_out**2)))
    return found


def _logits(shape: Shape, job: Job, lazy: bool) -> int:
    """Estimate the bytes of logits in evaluation, or where labels are sampled if these are more."""
    window = shape.texts.seqlen * shape.vocabulary
    at_once = LAZY_LOGITS_AT_ONCE if lazy else LOGITS_AT_ONCE
    rows = max(1, min(shape.texts.batch_size, at_once // window))
    # Log probabilities of both models, their exponentials, differences and products.
    held = min(SOFTMAX_AT_ONCE, shape.texts.batch_size * window) if shape.parts and not lazy else rows * window
    evaluation = 2 * held * shape.computed + 6 * 4 * min(SOFTMAX_AT_ONCE, window) if shape.texts.evaluate else 0
    labels = LABEL_COPIES * 4 * window if job.sweeps else 0
    head = shape.vocabulary * shape.width * shape.computed if lazy and shape.stored < shape.computed else 0
    return max(evaluation, labels) + head


def _candidates(shape: Shape, job: Job, lazy: bool) -> int:
    """Estimate the bytes of dense weights, candidate weights and anchor residuals that a search holds."""
    # The dense weights beside the model's, while metrics are chosen, losses are corrected or candidates are evaluated.
    if not (is_weighted(job) or job.rounds or job.search_tokens):
        return 0
    weights, part = sum(4 * spec.numel for spec in shape.specs), LAZY_SHARE if lazy else 1
    # Residuals in bfloat16, and the spans.
    anchors = anchor_count()
    fits = 2 * min(ANCHORS_AT_ONCE // part, anchors * weights // 2) if job.rounds or job.search_tokens else 0
    return (0 if lazy else weights) + min(WEIGHTS_AT_ONCE // part, weights) + fits


def _writing(shape: Shape) -> int:
    """Estimate the bytes of keys and values, at most `2 h` per block and token, and of predictions, in writing."""
    # One block's are held twice, while those of a token are added.
    values = 2 * shape.width * (shape.blocks + 1) * shape.texts.seqlen * shape.computed
    # Probabilities and their sums, of the next token.
    return shape.written_at_once * (values + 3 * 4 * shape.vocabulary)


def _training(shape: Shape, job: Job) -> int:
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
