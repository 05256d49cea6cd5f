"""What a search needs to know of a model: Grams and spans by a forward walk, prices of all options after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from globalopt.analysis.fits import _Fits
from globalopt.analysis.grid import Options
from globalopt.analysis.sensitivity import backward_sweep
from globalopt.analysis.surfaces import gram_errors, priced, sketches
from globalopt.kernels.sketch import DenseSketch, PrefixSketch
from globalopt.models.layers import ModelLayers
from globalopt.models.walk import BlockRunner
from globalopt.runs.folder import Run
from globalopt.values.budget import FREE, Limits, Target
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.metric import Gram, Metric
from globalopt.values.problem import ErrorSurface


@dataclass(frozen=True, eq=False)
class Priced:
    """What pricing found of a layer.

    Args:
        outputs: its output Gram, where one was collected.
        overlap: (anchors, anchors) float64, cosines between what its fits lost, in the norm of the prices; None
            without fits.
    """

    surface: ErrorSurface
    outputs: Gram | None
    overlap: Tensor | None


def price_by_gradients(
    runner: BlockRunner,
    inputs: Sequence[Sequence[Tensor]],
    unpriced: Sequence[LayerSpec],
    run: Run,
    pattern: NM | None,
    seed: int,
    device: torch.device | None = None,
    limits: Limits = FREE,
) -> Iterator[Priced]:
    """Surfaces in nats per token with the output Grams of the layers `unpriced`, last block first.

    Fits that are there set the level, where they were measured by what was measured; otherwise the spans' errors stay
    as they are.

    Args:
        seed: of the labels. Fits in output Grams should be of others: what was fitted to gradients looks too good when
            the same ones price it.
    """
    layers = runner.layers
    grid: dict[str, Options] = {}

    def sketches_of(spec: LayerSpec) -> list[PrefixSketch | DenseSketch]:
        span = run.read_span(spec).to(layers.device_of(spec.block))
        grid[spec.name] = Options.of(spec, span.max_rank, pattern, limits)
        made = sketches(span, grid[spec.name])
        if run.fits_path(spec).exists():
            made.append(DenseSketch(_Fits.read(run, spec).residuals.to(span.S.device).float()))
        return made

    for found in backward_sweep(runner, inputs, unpriced, sketches_of, seed, device):
        spec, options = found.spec, grid.pop(found.spec.name)
        count = len(options.targets)
        weight = layers.weight(spec.name)
        gram = run.read_gram(spec.site).to(weight.device)
        whole = Metric(gram, found.outputs.to(weight.device)).error(weight) / 2
        measured = run.read_measured(spec) if run.measured_path(spec).exists() else {}
        anchors = [anchor for row in options.anchors for anchor in row] if len(found.error) > count else []
        lost = [measured.get(a, error) for a, error in zip(anchors, found.error[count:], strict=True)]
        zero = max(whole, measured.get(Target.zero(), 0.0))
        overlap = _cosines(found.products) if anchors and found.products is not None else None
        yield Priced(priced(options, found.error[:count], lost, zero), found.outputs, overlap)


def price_by_grams(
    layers: ModelLayers, unpriced: Sequence[LayerSpec], run: Run, pattern: NM | None, limits: Limits = FREE
) -> Iterator[Priced]:
    """Surfaces in output error `tr(E G Eᵀ)` of the layers `unpriced`, without a backward pass."""
    for spec in unpriced:
        weight = layers.weight(spec.name)
        metric = Metric(run.read_gram(spec.site).to(weight.device))
        span = run.read_span(spec).to(weight.device)
        options, errors = gram_errors(span, Options.of(spec, span.max_rank, pattern, limits), metric)
        anchor_errors, overlap = [], None
        if run.fits_path(spec).exists():
            lost = _Fits.read(run, spec).residuals.to(weight.device).float()
            products = ((lost @ metric.inputs.matrix).flatten(1) @ lost.flatten(1).mT).cpu().double()
            anchor_errors, overlap = [metric.error(E) for E in lost], _cosines(products)
        yield Priced(priced(options, errors, anchor_errors, metric.error(weight)), None, overlap)


def _cosines(products: Tensor) -> Tensor:
    """Inner products (k, k) over both norms; what is zero is at right angles to all else."""
    norms = products.diagonal().clamp_min(0.0).sqrt()
    norms = norms.clamp_min(torch.finfo(norms.dtype).tiny)
    found = products / norms / norms[:, None]
    return found.fill_diagonal_(1.0)
