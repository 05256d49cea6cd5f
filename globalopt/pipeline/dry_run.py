"""Estimate the parameters, coverage, memory, disk space and time of a run before it is started.

No weights are loaded and nothing is written: the estimate uses the model's config (its layers are found with zeros for
weights) and two timings on this machine, of a matrix product and of the solver on one small layer. The formulas are in
`globalopt.pipeline.estimates`: memory and disk are upper bounds, and the time is right within a factor of about three.
"""

from __future__ import annotations

from globalopt.errors import UsageError
from globalopt.models.device import resolve_device
from globalopt.pipeline import timing
from globalopt.pipeline.estimates.disk import block_bytes, disk_bytes, most_at_once
from globalopt.pipeline.estimates.job import Job, is_weighted
from globalopt.pipeline.estimates.memory import memory_bytes
from globalopt.pipeline.estimates.seconds import stage_seconds
from globalopt.pipeline.estimates.shape import Shape, Structure
from globalopt.pipeline.options import ModelOptions, TextOptions
from globalopt.pipeline.own_text import TOO_LARGE
from globalopt.values.dry_run import DryRun

DEQUANTISING = 1e-7
"""Seconds per parameter of reading a quantised model, and of writing it dequantised."""


def dry_run(structure: Structure, models: ModelOptions, texts: TextOptions, job: Job) -> DryRun:
    """Estimate the memory (bytes), disk space (bytes) and time (seconds) of a run by the formulas of `estimates`.

    Args:
        structure: of the model.
        models, texts: as the run would be given.
        job: the work of the run.

    >>> from globalopt.pipeline.estimates.job import search_job
    >>> from globalopt.pipeline.example import example_plan
    >>> job = search_job(example_plan(), refines=True)
    >>> found = dry_run(Structure.of(ModelOptions()), ModelOptions(), TextOptions(), job)
    >>> found.peak > 3 * 4 * found.parameters, found.seconds["refine"] > 0
    (True, True)
    """
    layers = structure.layers
    shape = Shape.of(structure, models, texts)
    memory, lazy, in_files = memory_bytes(shape, models, job)
    if lazy and shape.written:
        raise UsageError(TOO_LARGE)
    device = resolve_device(models.device)
    copy = {"dequantised": shape.parameters * shape.stored} if structure.quantised else {}
    written = disk_bytes(shape, job)
    at_once = sum(written.values()) if job.shared else most_at_once(written, block_bytes(shape))
    rate = timing.rate(device)
    fit_seconds = timing.fit_seconds(job.solver, job.kept, device, is_weighted(job))
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
        disk=copy | written,
        most_disk=sum(copy.values()) + at_once,
        seconds=({"dequantise": DEQUANTISING * shape.parameters} if structure.quantised else {})
        | stage_seconds(shape, job, rate, fit_seconds, device),
        rate=rate,
        fit_seconds=fit_seconds,
    )
