"""Predict the loss of every option of every layer from its span, its anchor solutions and its second moments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from globalopt.analysis.anchor_curves import AnchorCurves, CurvesOverDepth
from globalopt.analysis.grid import Options
from globalopt.analysis.layer_analysis import LayerAnalysis, read_gap
from globalopt.analysis.solver_gap import SolverGap
from globalopt.analysis.surfaces import calibrated_surface, compute_curves, span_errors
from globalopt.kernels.precision import rough_product, rough_products
from globalopt.machine import ranks
from globalopt.runs.records import Prediction
from globalopt.values.budget import Target
from globalopt.values.layer import LayerSpec
from globalopt.values.metric import Metric

VERSION = 4
"""Raised whenever predicted losses change."""


def predict(analysis: LayerAnalysis, specs: Sequence[LayerSpec]) -> Iterator[tuple[LayerSpec, Prediction]]:
    """Predict the losses of all options of the layers `specs`.

    With output Grams, in nats per token: half of `tr(A E G Eᵀ)` estimates the loss of a layer that changes by `E`
    (block-diagonal Fisher, Kronecker-factored). Without them, output errors `tr(E G Eᵀ)`. The shape of a surface comes
    from the errors of the span, its level from those of the anchor solutions where there are any: of a layer that was
    solved at one anchor alone, with the curves of its kind over depth. Of a layer whose measured loss contradicts its
    prediction, the higher one counts.

    Args:
        analysis: with Grams, spans and, where they were computed, output Grams, anchor solutions and gaps.
        specs: those of this process, where others predict the others at the same time.

    >>> from pathlib import Path
    >>> from globalopt.analysis.collect import write_grams, write_spans
    >>> from globalopt.models.batch import Batch
    >>> from globalopt.models.block_runner import BlockRunner
    >>> from globalopt.models.finding import find_layers
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
    measured: dict[str, AnchorCurves] = {}
    lacking: list[LayerSpec] = []
    for spec in specs:
        if analysis.lacks_anchors(spec):
            lacking.append(spec)
            continue
        found = _measure(analysis, spec, gap)
        if found.errors:
            measured[spec.name] = found.curves()
        yield spec, _prediction(analysis, spec, found)
    if any(ranks.gathered(bool(lacking))):
        # Layers with one solution take the curves between anchors from the others, so these came first.
        everywhere = _over_depth(analysis, gap, measured)
        for spec in lacking:
            found = _measure(analysis, spec, gap)
            rows = (tuple(anchor.params(spec) / spec.numel for anchor in row) for row in found.options.anchors)
            curves = everywhere.at(spec.kind, spec.block, *rows)
            yield spec, _prediction(analysis, spec, found, curves)


def _prediction(
    analysis: LayerAnalysis, spec: LayerSpec, found: _Measured, curves: AnchorCurves | None = None
) -> Prediction:
    """Predict the losses of one layer.

    Args:
        curves: between anchors, for a layer that was solved at one.
    """
    checked = analysis.checked_losses(spec)
    errors = [max(error, checked.get(anchor, 0.0)) for anchor, error in zip(found.anchors, found.errors, strict=True)]
    return Prediction(calibrated_surface(found.options, found.shape, errors, found.whole, curves), found.overlap)


def _over_depth(analysis: LayerAnalysis, gap: SolverGap, measured: Mapping[str, AnchorCurves]) -> CurvesOverDepth:
    """Collect the curves of all layers that were solved at all anchors, some of them in an earlier call.

    Args:
        measured: of the layers that this process has measured.
    """
    every = [
        spec for spec in analysis.layers.specs if analysis.solved_anchors(spec) and not analysis.lacks_anchors(spec)
    ]
    known = ranks.merged(measured)
    earlier = ranks.share([spec for spec in every if spec.name not in known], LayerSpec.solve_cost)
    known |= ranks.merged({spec.name: _measure(analysis, spec, gap).curves() for spec in earlier})
    return CurvesOverDepth.of([(spec, known[spec.name]) for spec in every])


@dataclass(frozen=True, eq=False)
class _Measured:
    """Hold what is measured of one layer, in the unit of its predicted loss.

    Args:
        shape: errors of its span, of all options or of those of the first rank.
        anchors, errors: its anchors and the errors of their solutions; empty where none were solved.
        overlap: of the residuals of these, or None.
        whole: error of the layer dropped whole.
    """

    options: Options
    shape: list[float]
    anchors: tuple[Target, ...]
    errors: list[float]
    overlap: Tensor | None
    whole: float

    def curves(self) -> AnchorCurves:
        """Compute how the error changes from anchor to anchor, of a layer that was solved at all of them."""
        return compute_curves(self.options, self.shape, self.errors)


def _measure(analysis: LayerAnalysis, spec: LayerSpec, gap: SolverGap) -> _Measured:
    """Measure the errors of a layer's span and of its anchor solutions."""
    weight, options, metric = analysis.layers.weight(spec.name), analysis.options(spec), analysis.loss_metric(spec)
    # Half of the squared norm is the loss.
    scale = 1.0 if metric.outputs is None else 0.5
    anchors, errors, overlap = (), [], None
    if analysis.solved_anchors(spec):
        residuals = analysis.residuals(spec, weight, gap)
        products = _products(residuals.tensor, metric)
        anchors, overlap = residuals.anchors, _cosines(products)
        errors = [scale * error for error in products.diagonal().clamp_min(0.0).tolist()]
    solved = bool(errors)
    shape = [scale * error for error in span_errors(analysis.span(spec, solved), options.of_span(solved), metric)]
    return _Measured(options, shape, anchors, errors, overlap, scale * metric.error(weight))


def _products(residuals: Tensor, metric: Metric) -> Tensor:
    """Compute the inner products (k, k) float64 of residuals (k, d_out, d_in) in a metric.

    One residual is multiplied by the Grams at a time: of a large layer, no more than a few copies are held.
    """
    count = len(residuals)
    # Sums over a whole layer, of residuals that are in bfloat16 themselves.
    times = rough_product if rough_products(metric.inputs.matrix) else torch.matmul
    found = torch.zeros(count, count, dtype=torch.float64)
    for i in range(count):
        product = times(residuals[i].float(), metric.inputs.matrix)
        if metric.outputs is not None:
            product = times(metric.outputs.matrix, product)
        for j in range(i + 1):
            found[i, j] = found[j, i] = float((product * residuals[j]).sum(dtype=torch.float64))
    return found


def _cosines(products: Tensor) -> Tensor:
    """Divide inner products (k, k) by both norms; a residual of zero is at right angles to all others."""
    norms = products.diagonal().clamp_min(0.0).sqrt()
    norms = norms.clamp_min(torch.finfo(norms.dtype).tiny)
    found = products / norms / norms[:, None]
    return found.fill_diagonal_(1.0)
