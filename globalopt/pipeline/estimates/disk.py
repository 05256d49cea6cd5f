"""Bound the bytes that a run writes, by folder."""

from __future__ import annotations

from collections.abc import Mapping

from globalopt.analysis.anchor_curves import fully_solved, middle
from globalopt.analysis.grid import Options, largest_rank
from globalopt.analysis.metric_choices import KEPT as METRIC_KEPT
from globalopt.pipeline.estimates.job import Job, is_weighted
from globalopt.pipeline.estimates.shape import Shape
from globalopt.protocols import Reads
from globalopt.values.layer import LayerSpec

ANALYSED = ("grams", "labels", "spans", "anchors", "metrics")
"""Folders of the analysis."""

HEADER = 400
"""Bytes of the header of a file per packed decomposition in it: names, types and shapes of its tensors."""


def disk_bytes(shape: Shape, job: Job) -> dict[str, int]:
    """Bound the bytes on disk, by folder of the run.

    >>> from globalopt.pipeline.example import example_plan
    >>> from globalopt.pipeline.estimates.job import search_job
    >>> from globalopt.pipeline.estimates.shape import Structure
    >>> from globalopt.pipeline.options import ModelOptions, TextOptions
    >>> models, job = ModelOptions(), search_job(example_plan(), refines=True)
    >>> shape = Shape.of(Structure.of(models), models, TextOptions())
    >>> list(disk_bytes(shape, job))
    ['layers', 'model']
    """
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
        found["spans"] = sum(_span_bytes(spec, job) for spec in shape.specs)
    if job.anchors:
        some = fully_solved(shape.specs)
        found["anchors"] = sum(_anchor_bytes(spec, spec.name in some) for spec in shape.specs)
    elif is_weighted(job):
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


def most_at_once(written: Mapping[str, int], block: int) -> int:
    """Bound the bytes on disk at one time, of a run that deletes what it reads no more (`Workspace.discard`).

    The analysis is gone when the layers are solved, but for the output Grams, which go with their blocks, as do solved
    layers where blocks are matched; the model is saved after them.

    Args:
        written: by folder, as `disk_bytes`.
        block: bytes that the layers of a block take at most.

    >>> most_at_once({"grams": 5, "labels": 10, "spans": 6, "anchors": 8, "layers": 7, "matched": 7, "model": 13}, 2)
    29
    >>> most_at_once({"layers": 7, "model": 13}, 2)
    20
    """
    if "matched" in written:
        written = {**written, "layers": min(block, written["layers"])}
    stages = (ANALYSED, ("labels", "layers", "matched"), ("layers", "matched", "model"))
    return written.get("self-text", 0) + max(sum(written.get(name, 0) for name in stage) for stage in stages)


def block_bytes(shape: Shape) -> int:
    """Bound the bytes of the solved layers of a block: all weights, and a bit each for the support and the signs.

    >>> from globalopt.pipeline.estimates.shape import Structure
    >>> from globalopt.pipeline.options import ModelOptions, TextOptions
    >>> shape = Shape.of(Structure.of(ModelOptions()), ModelOptions(), TextOptions())
    >>> block_bytes(shape) / shape.block
    2.25
    """
    return shape.block * shape.stored + shape.block // 4


def _gram_bytes(side: int) -> int:
    """Count the bytes of a Gram: a triangle of correlations in float16, and the diagonal in float32."""
    return side * (side - 1) + 4 * side + HEADER


def _span_bytes(spec: LayerSpec, job: Job) -> int:
    """Count the bytes of a span: scalings in float32 and, where they are read, directions in bfloat16."""
    rank = largest_rank(spec, job.pattern, job.limits)
    scalings = 4 * (spec.d_out + spec.d_in) + HEADER
    offered = Options.of(spec, rank if job.solver.low_rank else 0, job.pattern, job.limits).of_span(job.anchors)
    if Reads.SPANS not in job.reads and not offered.ranked:
        return scalings
    return 2 * scalings + 2 * (spec.d_out + spec.d_in) * rank + 4 * rank


def _anchor_bytes(spec: LayerSpec, whole: bool) -> int:
    """Count the bytes of a layer's anchor solutions: values and factors in bfloat16, and one bit per entry.

    Args:
        whole: whether it is solved at all anchors, and not at one alone.
    """
    rows = Options.of(spec, spec.max_rank).anchors
    anchors = [anchor for row in rows for anchor in row] if whole else [middle(rows[0])]
    return sum(2 * anchor.params(spec) + spec.numel // 8 + HEADER for anchor in anchors)
