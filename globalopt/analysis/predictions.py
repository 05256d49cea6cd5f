"""Predict the loss of every option of every layer from its span, its anchor solutions and its second moments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from globalopt.analysis.layer_analysis import LayerAnalysis, read_gap
from globalopt.analysis.surfaces import calibrated_surface, span_errors
from globalopt.runs.records import Prediction
from globalopt.values.layer import LayerSpec
from globalopt.values.metric import Metric

VERSION = 2
"""Raised whenever predicted losses change."""


def predict(analysis: LayerAnalysis, specs: Sequence[LayerSpec]) -> Iterator[tuple[LayerSpec, Prediction]]:
    """Predict the losses of all options of the layers `specs`.

    With output Grams, in nats per token: half of `tr(A E G Eᵀ)` estimates the loss of a layer that changes by `E`
    (block-diagonal Fisher, Kronecker-factored). Without them, output errors `tr(E G Eᵀ)`. The shape of a surface comes
    from the errors of the span, its level from those of the anchor solutions where there are any; of a layer whose
    measured loss contradicts its prediction, the higher one counts.

    Args:
        analysis: with Grams, spans and, where they were computed, output Grams, anchor solutions and gaps.

    >>> from pathlib import Path
    >>> from globalopt.analysis.collect import write_grams, write_spans
    >>> from globalopt.models.layers import find_layers
    >>> from globalopt.models.walk import Batch, BlockRunner
    >>> from globalopt.reference.tiny import tiny_llama
    >>> from globalopt.runs.workspace import Workspace
    >>> from globalopt.values.budget import Target
    >>> layers = find_layers(tiny_llama(), allow_low_coverage=True)
    >>> analysis = LayerAnalysis(layers, Workspace(Path("work")))
    >>> write_grams(BlockRunner(layers, [Batch(torch.arange(64).view(4, 16))]), analysis.work)
    >>> write_spans(layers, analysis.work, layers.specs, "activation")
    >>> ((spec, found),) = predict(analysis, layers.specs[:1])
    >>> loss = found.surface.predict
    >>> loss(Target.dense(spec)) < loss(Target(0, 128)) < loss(Target.zero())
    True
    """
    gap = read_gap(analysis)
    for spec in specs:
        weight, options, metric = analysis.layers.weight(spec.name), analysis.options(spec), analysis.loss_metric(spec)
        span = analysis.span(spec)
        # Half of the squared norm is the loss.
        scale = 1.0 if metric.outputs is None else 0.5
        errors, overlap = [], None
        if analysis.solved_anchors(spec):
            residuals = analysis.residuals(spec, weight, gap)
            products = _products(residuals.tensor, metric)
            checked = analysis.checked_losses(spec)
            errors = [
                max(scale * error, checked.get(anchor, 0.0))
                for anchor, error in zip(residuals.anchors, products.diagonal().clamp_min(0.0).tolist(), strict=True)
            ]
            overlap = _cosines(products)
        shape = [scale * error for error in span_errors(span, options, metric)]
        zero = max(scale * metric.error(weight), *errors, 0.0)
        yield spec, Prediction(calibrated_surface(options, shape, errors, zero), overlap)


def _products(residuals: Tensor, metric: Metric) -> Tensor:
    """Compute the inner products (k, k) float64 of residuals (k, d_out, d_in) in a metric.

    One residual is multiplied by the Grams at a time: of a large layer, no more than a few copies are held.
    """
    count = len(residuals)
    found = torch.zeros(count, count, dtype=torch.float64)
    for i in range(count):
        product = residuals[i].float() @ metric.inputs.matrix
        if metric.outputs is not None:
            product = metric.outputs.matrix @ product
        for j in range(i + 1):
            found[i, j] = found[j, i] = float((product * residuals[j]).sum(dtype=torch.float64))
    return found


def _cosines(products: Tensor) -> Tensor:
    """Divide inner products (k, k) by both norms; a residual of zero is at right angles to all others."""
    norms = products.diagonal().clamp_min(0.0).sqrt()
    norms = norms.clamp_min(torch.finfo(norms.dtype).tiny)
    found = products / norms / norms[:, None]
    return found.fill_diagonal_(1.0)
