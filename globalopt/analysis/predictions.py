"""Predict the loss of every option of every layer, from gradients or from input Grams alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from globalopt.analysis.layer_analysis import LayerAnalysis, Residuals, read_gap
from globalopt.analysis.sensitivity import LayerSensitivity, Sketches, backward_sweep
from globalopt.analysis.solver_gap import SolverGap
from globalopt.analysis.surfaces import calibrated_surface, gram_errors, sketches
from globalopt.kernels.sketch import DenseSketch
from globalopt.models.walk import BlockRunner
from globalopt.runs.artefacts import GRAM, SINGLE_LAYER_LOSSES, SPAN
from globalopt.runs.records import Prediction
from globalopt.values.budget import Target
from globalopt.values.layer import LayerSpec
from globalopt.values.metric import Gram, Metric

VERSION = 2
"""Raised whenever predicted losses change."""


def predict_by_fisher(
    analysis: LayerAnalysis,
    runner: BlockRunner,
    inputs: Sequence[Sequence[Tensor]],
    specs: Sequence[LayerSpec],
    seed: int,
    device: torch.device | None = None,
    behind: Callable[[int, Gram], None] = lambda block, output_gram: None,
) -> Iterator[tuple[LayerSpec, Prediction, Gram]]:
    """Predict losses in nats per token by the block-diagonal Fisher, and compute output Grams, last block first.

    The level of the predictions comes from single-layer losses where these were computed, else from the predicted
    losses of anchor solutions where there are any, else from the errors of the span.

    Args:
        analysis: with Grams, spans and, where they were computed, anchor solutions, gaps and single-layer losses.
        runner: of the dense model, on the calibration text.
        inputs: hidden states, as `span_layers` returns them.
        specs: the layers to predict.
        seed: of the labels. Output Grams of the anchor solutions' metric should be of other labels: a solution that
            minimises an error in the gradients of some labels looks too good when the same labels predict its loss.
        device: where a block is moved for its turn; None leaves it.
        behind: called per block with the output Gram of the hidden states that leave it.
    Yields:
        A layer, its prediction, and its output Gram.

    >>> from pathlib import Path
    >>> from globalopt.analysis.collect import span_layers
    >>> from globalopt.models.layers import find_layers
    >>> from globalopt.models.walk import Batch
    >>> from globalopt.reference.tiny import tiny_llama
    >>> from globalopt.runs.workspace import Workspace
    >>> layers = find_layers(tiny_llama(), allow_low_coverage=True)
    >>> analysis = LayerAnalysis(layers, Workspace(Path("work")))
    >>> runner = BlockRunner(layers, [Batch(torch.arange(64).view(4, 16))])
    >>> inputs = span_layers(runner, analysis.work, "activation", keep_inputs=True)
    >>> ((spec, found, output_gram),) = predict_by_fisher(analysis, runner, inputs, layers.specs[:1], seed=0)
    >>> loss = found.surface.predict
    >>> loss(Target.dense(spec)) < loss(Target(0, 128)) < loss(Target.zero())
    True
    """
    gap = read_gap(analysis)

    def sketches_of(spec: LayerSpec) -> Sketches:
        span = analysis.work.get(SPAN, spec).to(analysis.layers.device_of(spec.block))
        made = sketches(span, analysis.options(spec))
        if not analysis.solved_anchors(spec):
            return Sketches(made)
        residuals = analysis.residuals(spec, analysis.layers.weight(spec.name), gap)
        return Sketches(made, DenseSketch(residuals.tensor.float()))

    for found in backward_sweep(runner, inputs, specs, sketches_of, seed, device, behind):
        yield found.spec, _predicted(analysis, found), found.output_gram


def _predicted(analysis: LayerAnalysis, found: LayerSensitivity) -> Prediction:
    """Predict one layer from its sensitivity; single-layer losses replace predicted ones where they were computed.

    A single-layer loss of zero does not count: no token of the few windows that it is measured on reached the layer.
    """
    spec, options = found.spec, analysis.options(found.spec)
    weight = analysis.layers.weight(spec.name)
    gram = analysis.work.get(GRAM, spec.site).to(weight.device)
    metric = Metric(gram, found.output_gram.to(weight.device))
    if not found.output_gram.tokens:
        # As if it had the inputs and the gradients of its siblings.
        return _predicted_by_grams(analysis, spec, metric, read_gap(analysis))
    dropped = metric.error(weight) / 2
    measured = analysis.work.find(SINGLE_LAYER_LOSSES, spec) or {}
    anchors = [anchor for row in options.anchors for anchor in row] if found.anchor_error else []
    losses = [measured.get(anchor) or error for anchor, error in zip(anchors, found.anchor_error, strict=True)]
    zero = max(dropped, measured.get(Target.zero(), 0.0))
    overlap = None if found.products is None else _cosines(found.products)
    return Prediction(calibrated_surface(options, found.error, losses, zero), overlap)


def predict_by_grams(
    analysis: LayerAnalysis, specs: Sequence[LayerSpec]
) -> Iterator[tuple[LayerSpec, Prediction, None]]:
    """Predict output errors `tr(E G Eᵀ)`, without a backward pass.

    Args:
        analysis: with Grams, spans and, where they were computed, anchor solutions and gaps.
        specs: the layers to predict.
    Yields:
        A layer, its prediction, and None in place of an output Gram.

    >>> from pathlib import Path
    >>> from globalopt.analysis.collect import span_layers
    >>> from globalopt.models.layers import find_layers
    >>> from globalopt.models.walk import Batch
    >>> from globalopt.reference.tiny import tiny_llama
    >>> from globalopt.runs.workspace import Workspace
    >>> layers = find_layers(tiny_llama(), allow_low_coverage=True)
    >>> analysis = LayerAnalysis(layers, Workspace(Path("grams")))
    >>> runner = BlockRunner(layers, [Batch(torch.arange(64).view(4, 16))])
    >>> _ = span_layers(runner, analysis.work, "activation", keep_inputs=False)
    >>> ((spec, found, _),) = predict_by_grams(analysis, layers.specs[:1])
    >>> error = found.surface.predict
    >>> error(Target.dense(spec)) < error(Target(0, 128)) < error(Target.zero())
    True
    """
    gap = read_gap(analysis)
    for spec in specs:
        metric = Metric(analysis.work.get(GRAM, spec.site).to(analysis.layers.device_of(spec.block)))
        yield spec, _predicted_by_grams(analysis, spec, metric, gap), None


def _predicted_by_grams(analysis: LayerAnalysis, spec: LayerSpec, metric: Metric, gap: SolverGap) -> Prediction:
    """Predict one layer from its Grams: its output error, or with an output Gram half of that, in nats per token."""
    weight = analysis.layers.weight(spec.name)
    unit = 1.0 if metric.outputs is None else 0.5
    span = analysis.work.get(SPAN, spec).to(weight.device)
    options, errors = gram_errors(span, analysis.options(spec), metric)
    residuals = analysis.residuals(spec, weight, gap) if analysis.solved_anchors(spec) else None
    anchor_errors, overlap = ([], None) if residuals is None else _in_metric(residuals, metric)
    errors, anchor_errors = ([unit * error for error in some] for some in (errors, anchor_errors))
    return Prediction(calibrated_surface(options, errors, anchor_errors, unit * metric.error(weight)), overlap)


def _in_metric(residuals: Residuals, metric: Metric) -> tuple[list[float], Tensor]:
    """Compute the errors of residuals, and their cosines, in a metric."""
    E = residuals.tensor.float()
    AE = E if metric.outputs is None else metric.outputs.matrix @ E
    products = ((E @ metric.inputs.matrix).flatten(1) @ AE.flatten(1).mT).cpu().double()
    return [metric.error(residual) for residual in E], _cosines(products)


def _cosines(products: Tensor) -> Tensor:
    """Divide inner products (k, k) by both norms; a residual of zero is at right angles to all others."""
    norms = products.diagonal().clamp_min(0.0).sqrt()
    norms = norms.clamp_min(torch.finfo(norms.dtype).tiny)
    found = products / norms / norms[:, None]
    return found.fill_diagonal_(1.0)
