"""Measure the loss of the model with one layer replaced at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from globalopt.analysis.fits import _Fits
from globalopt.models.walk import BlockRunner
from globalopt.objective.kl_to_dense import ModelObjective
from globalopt.protocols import Candidate, Solver
from globalopt.runs.folder import Run
from globalopt.values.budget import FREE, Limits, Target
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.metric import Metric
from globalopt.values.span import Mask

WEIGHED_KEPT = 0.2
"""Fraction kept at which a layer's metric is chosen; losses that grow faster than the square show there."""

MEASURED_WINDOWS = 4
"""Calibration windows on which single layers are measured."""


def weigh_layers(
    runner: BlockRunner,
    unweighed: Sequence[LayerSpec],
    run: Run,
    pattern: NM | None,
    solver: Solver,
    advance: Callable[[str], None] = lambda detail: None,
    limits: Limits = FREE,
) -> None:
    """Write whether the layers `unweighed` are better fitted with their output Grams, or in `tr(E G Eᵀ)` alone.

    `A` is the curvature at no loss: an output that the loss hardly feels may still matter much once it is far off, as
    where a gate feeds a channel that the model's norms depend on. So each layer is fitted both ways at `WEIGHED_KEPT`,
    and the model is asked: KL(dense || one layer replaced) in nats per token.

    Args:
        runner: on the windows to ask about.
        solver: fits, with as much of `A` as it is made to use.
    """
    fits: dict[str, tuple[Tensor, Tensor]] = {}

    def materialise(spec: LayerSpec, kept: Target | Mask) -> Tensor:
        assert isinstance(kept, Target), "a layer is asked about as a target"
        return fits[spec.name][kept.rank] if kept.nnz == 0 else objective.dense(spec.name)

    def asked_for(spec: LayerSpec) -> Target:
        if not limits.sparse:
            return Target(max(1, int(WEIGHED_KEPT * spec.numel / (spec.d_out + spec.d_in))), 0)
        return Target(0, pattern.nnz(spec) if pattern is not None else int(WEIGHED_KEPT * spec.numel), pattern)

    objective = ModelObjective(runner, materialise)
    everything: Candidate = {spec.name: Target.dense(spec) for spec in runner.layers.specs}
    try:
        for spec in unweighed:
            dense = objective.dense(spec.name)
            target = asked_for(spec)
            gram = run.read_gram(spec.site).to(dense.device)
            metrics = Metric(gram), Metric(gram, run.read_outputs(spec).to(dense.device))
            plain, weighted = (solver.solve(solver.prepare(dense, metric), target).value.dense() for metric in metrics)
            fits[spec.name] = plain, weighted
            # Two stand-ins for what a layer may be: the objective tells candidates apart by their targets.
            asked = [{**everything, spec.name: Target(which, 0)} for which in (0, 1)]
            losses = objective.losses(asked, range(objective.chunks)).mean(1).tolist()
            run.write_weighing(spec, losses[0], losses[1])
            del fits[spec.name]
            advance(spec.name)
    finally:
        objective.close()


def measure_layers(
    runner: BlockRunner,
    unmeasured: Sequence[LayerSpec],
    run: Run,
    advance: Callable[[str], None] = lambda detail: None,
) -> None:
    """Write what the layers `unmeasured` cost when one at a time is left at its lowest fits, or dropped.

    A second-order price knows nothing of a loss that grows faster than the square of what is lost, and a knapsack finds
    the layers where it does. So the anchors that keep at most `MEASURED_KEPT`, and the zero option, are asked of the
    model: KL(dense || one layer replaced) in nats per token.

    Args:
        runner: on the windows to ask about.
    """
    layers = runner.layers
    fits: dict[str, _Fits] = {}

    def materialise(spec: LayerSpec, kept: Target | Mask) -> Tensor:
        dense = objective.dense(spec.name)
        if kept == Target.dense(spec):
            return dense
        if kept == Target.zero():
            return torch.zeros_like(dense)
        return dense - fits[spec.name].residual(kept).to(dense.device)

    objective = ModelObjective(runner, materialise)
    everything: Candidate = {spec.name: Target.dense(spec) for spec in layers.specs}
    try:
        for spec in unmeasured:
            fits[spec.name] = _Fits.read(run, spec)
            asked = [*fits[spec.name].low, Target.zero()]
            losses = objective.losses([{**everything, spec.name: target} for target in asked], range(objective.chunks))
            run.write_measured(spec, list(zip(asked, losses.mean(1).tolist(), strict=True)))
            del fits[spec.name]
            advance(spec.name)
    finally:
        objective.close()
