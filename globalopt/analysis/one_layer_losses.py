"""Single-layer losses: the KL divergence from the dense model when one layer at a time is replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from globalopt.analysis.layer_analysis import PROBE_OUTPUT_GRAM, LayerAnalysis, read_gap
from globalopt.models.walk import BlockRunner
from globalopt.objective.kl_to_dense import ModelObjective, Weight
from globalopt.protocols import Solver
from globalopt.runs.artefacts import GRAM, METRIC_CHOICE, SINGLE_LAYER_LOSSES
from globalopt.runs.records import MetricChoice
from globalopt.values.budget import NO_LIMITS, Limits, Target
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.metric import Gram, Metric

METRIC_KEPT = 0.2
"""Fraction kept at which a layer's error metric is chosen; losses that grow faster than the square show there."""

MEASURED_WINDOWS = 4
"""Calibration windows on which single-layer losses are computed."""


METRICS_VERSION = 1
"""Raised whenever choices of metrics change."""

LOSSES_VERSION = 1
"""Raised whenever single-layer losses change."""

MEASURED_KEPT = 0.25
"""Anchors that keep at most this fraction are measured on the model."""


def choose_metrics(
    runner: BlockRunner,
    grams: Iterable[tuple[LayerSpec, Gram, Gram]],
    solver: Solver,
    pattern: NM | None = None,
    limits: Limits = NO_LIMITS,
) -> Iterator[tuple[LayerSpec, MetricChoice]]:
    """Compute the single-layer losses of solutions with and without the output Gram, layer by layer.

    The output Gram `A` is the curvature at no loss: an output to which the loss is almost insensitive may still matter
    much once it is far off, as where a gate feeds a channel that the model's norms depend on. So each layer is solved
    in both metrics at `METRIC_KEPT`, and the loss of the model with this layer alone replaced decides. The model is
    dense whenever a layer is taken from `grams` or a choice is yielded.

    Args:
        runner: of the dense model, on the windows of the losses.
        grams: layers with their input Gram `G` and their output Gram `A`; moved to the layer's device.
        solver: solves the layers, with as much of `A` as its options say.
        pattern, limits: of the targets.

    >>> from globalopt.models.layers import find_layers
    >>> from globalopt.models.walk import Batch
    >>> from globalopt.reference.tiny import tiny_llama
    >>> from solvers import get_solver
    >>> layers = find_layers(tiny_llama(), allow_low_coverage=True)
    >>> runner = BlockRunner(layers, [Batch(torch.arange(48).reshape(3, 16))])
    >>> spec = layers.specs[0]
    >>> grams = [(spec, Gram(torch.eye(16), 48), Gram(torch.eye(16), 48))]
    >>> ((of, choice),) = choose_metrics(runner, grams, get_solver("3basil", {"steps": "5"}))
    >>> of == spec, choice.plain > 0, choice.weighted > 0
    (True, True, True)
    """
    model = ModelObjective(runner)
    for spec, inputs, outputs in grams:
        dense = model.dense(spec.name)
        gram = inputs.to(dense.device)
        metrics = Metric(gram), Metric(gram, outputs.to(dense.device))
        target = _probed_target(spec, pattern, limits)
        solved = [solver.solve(solver.prepare(dense, metric), target).value.dense() for metric in metrics]
        plain, weighted = _losses(model, spec, solved)
        yield spec, MetricChoice(plain, weighted)


def single_layer_losses(
    runner: BlockRunner, residuals: Iterable[tuple[LayerSpec, Mapping[Target, Tensor]]]
) -> Iterator[tuple[LayerSpec, dict[Target, float]]]:
    """Compute the losses of solutions of single layers, and of the model without the layer.

    The second-order prediction knows nothing of a loss that grows faster than the square of the error, and a knapsack
    finds the layers where it does. So the solutions that keep least, and the zero target, are evaluated on the model:
    KL(dense || one layer replaced). The model is dense whenever a layer is taken from `residuals` or one is yielded.

    Args:
        runner: of the dense model, on the windows of the losses.
        residuals: layers, with the residual `E` (d_out, d_in) of a solution at each target, in any float dtype; the
            layer is replaced by `W - E`.
    Yields:
        every layer with its losses in nats per token, by target; `Target.zero()` last.

    >>> from globalopt.models.layers import find_layers
    >>> from globalopt.models.walk import Batch
    >>> from globalopt.reference.tiny import tiny_llama
    >>> layers = find_layers(tiny_llama(), allow_low_coverage=True)
    >>> runner = BlockRunner(layers, [Batch(torch.arange(48).reshape(3, 16))])
    >>> spec = layers.specs[0]
    >>> tenth = {Target(0, 128): 0.1 * layers.weight(spec.name)}  # a solution that shrinks the weight by a tenth
    >>> ((of, losses),) = single_layer_losses(runner, [(spec, tenth)])
    >>> of == spec, losses[Target(0, 128)] < losses[Target.zero()]
    (True, True)
    """
    model = ModelObjective(runner)
    for spec, by_target in residuals:
        dense = model.dense(spec.name)
        weights: dict[Target, Weight] = {
            target: lambda E=E, W=dense: W - E.float().to(W.device) for target, E in by_target.items()
        }
        weights[Target.zero()] = torch.zeros_like(dense)
        losses = _losses(model, spec, list(weights.values()))
        yield spec, dict(zip(weights, losses, strict=True))


def _losses(model: ModelObjective, spec: LayerSpec, weights: Sequence[Weight]) -> list[float]:
    """Mean losses on all windows with the layer replaced by each of `weights`; the model is dense after it."""
    try:
        return model.losses_of([{spec.name: weight} for weight in weights], range(model.chunks)).mean(1).tolist()
    finally:
        model.close()


def _probed_target(spec: LayerSpec, pattern: NM | None, limits: Limits) -> Target:
    """Return the target at which a metric is chosen: sparse, or of low rank where sparse parts are not allowed."""
    if not limits.sparse:
        return Target(max(1, int(METRIC_KEPT * spec.numel / (spec.d_out + spec.d_in))), 0)
    return Target(0, pattern.nnz(spec) if pattern is not None else int(METRIC_KEPT * spec.numel), pattern)


def write_metric_choices(
    analysis: LayerAnalysis,
    runner: BlockRunner,
    specs: Sequence[LayerSpec],
    probe: Solver,
    advance: Callable[[str], None] = lambda detail: None,
) -> None:
    """Choose the metric of the layers `specs` by `choose_metrics`, and write the choices.

    Args:
        analysis: with the Grams and the output Grams of the layers.

    >>> from pathlib import Path
    >>> from globalopt.analysis.collect import write_output_grams
    >>> from globalopt.models.layers import find_layers
    >>> from globalopt.models.walk import Batch
    >>> from globalopt.reference.tiny import tiny_llama
    >>> from globalopt.runs.artefacts import Stage
    >>> from globalopt.runs.workspace import Workspace
    >>> from solvers import get_solver
    >>> layers, work = find_layers(tiny_llama(), allow_low_coverage=True), Workspace(Path("work"))
    >>> runner = BlockRunner(layers, [Batch(torch.arange(48).reshape(3, 16))])
    >>> write_output_grams(runner, work, Stage.PROBE_LABELS, layers.specs[:1], seed=0)
    >>> probe = get_solver("3basil", {"steps": "5"})
    >>> write_metric_choices(LayerAnalysis(layers, work), runner, layers.specs[:1], probe)
    >>> work.missing(METRIC_CHOICE, layers.specs[:1])
    []
    """
    work = analysis.work
    grams = ((spec, work.get(GRAM, spec.site), work.get(PROBE_OUTPUT_GRAM, spec)) for spec in specs)
    for spec, choice in choose_metrics(runner, grams, probe, analysis.pattern, analysis.limits):
        work.put(METRIC_CHOICE, spec, choice)
        advance(spec.name)


def write_single_layer_losses(
    analysis: LayerAnalysis,
    runner: BlockRunner,
    specs: Sequence[LayerSpec],
    advance: Callable[[str], None] = lambda detail: None,
) -> None:
    """Measure the layers `specs` at those of their anchors that keep at most `MEASURED_KEPT`, and write the losses.

    Args:
        analysis: with the anchor solutions of the layers, scaled by the solver gap.

    >>> from pathlib import Path
    >>> from globalopt.models.layers import find_layers
    >>> from globalopt.models.walk import Batch
    >>> from globalopt.reference.tiny import tiny_llama
    >>> from globalopt.runs.workspace import Workspace
    >>> layers, work = find_layers(tiny_llama(), allow_low_coverage=True), Workspace(Path("work"))
    >>> runner = BlockRunner(layers, [Batch(torch.arange(48).reshape(3, 16))])
    >>> write_single_layer_losses(LayerAnalysis(layers, work), runner, [])  # no layer is left to measure
    """
    gap = read_gap(analysis)

    def low(spec: LayerSpec) -> dict[Target, Tensor]:
        residuals = analysis.residuals(spec, analysis.layers.weight(spec.name), gap)
        kept = MEASURED_KEPT * spec.numel
        return {anchor: residuals.at(anchor) for anchor in residuals.anchors if anchor.params(spec) <= kept}

    for spec, losses in single_layer_losses(runner, ((spec, low(spec)) for spec in specs)):
        analysis.work.put(SINGLE_LAYER_LOSSES, spec, losses)
        advance(spec.name)
