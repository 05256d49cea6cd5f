"""The options of a layer and what each is predicted to cost: spans and a few fits in, error surfaces out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from globalopt.analysis.grid import AnchorValues, Options
from globalopt.kernels.projection import keep_nm
from globalopt.kernels.sketch import DenseSketch, PrefixSketch
from globalopt.values.budget import Target
from globalopt.values.layer import NM
from globalopt.values.metric import Metric
from globalopt.values.problem import ErrorSurface, interpolate
from globalopt.values.span import Span


def sketches(span: Span, options: Options) -> list[PrefixSketch | DenseSketch]:
    """What each option drops of the layer, prepared for inner products with gradients.

    Option (rank, nnz) keeps the first `rank` directions of the span and the `nnz` largest entries of what they
    leave, in the span's scaled coordinates; the rest is dropped. The projections of the returned sketches,
    concatenated, are in the order of `options.targets`.
    """
    if options.pattern is not None:
        dropped = [_dropped_by_pattern(span, rank, options.pattern) for rank, _ in options.rows]
        return [DenseSketch(torch.stack(dropped))]
    if options.factors:
        left = [span.unscaled(span.residual(target.rank)) for target in options.targets]
        dense = Target.dense(options.spec)
        parts = zip(options.targets, left, strict=True)
        return [DenseSketch(torch.stack([torch.zeros_like(X) if target == dense else X for target, X in parts]))]
    made: list[PrefixSketch | DenseSketch] = []
    for rank, counts in options.rows:
        residual = span.residual(rank)
        made.append(PrefixSketch.make(residual.abs(), span.unscaled(residual), options.bucket, counts))
    return made


def _dropped_by_pattern(span: Span, rank: int, pattern: NM) -> Tensor:
    residual = span.residual(rank)
    return span.unscaled(residual.masked_fill(keep_nm(residual.abs(), pattern), 0.0))


def project(made: Sequence[PrefixSketch | DenseSketch], gradients: Tensor) -> Tensor:
    """(b, d_out, d_in) gradients -> (b, options) inner products with what every option drops."""
    return torch.cat([sketch.project(gradients) for sketch in made], dim=1)


def gram_errors(span: Span, options: Options, metric: Metric) -> tuple[Options, list[float]]:
    """`metric.error` of what the options of a span drop: the price where no backward pass is possible.

    Every option costs a product with G, so only every fourth count is kept; the thinned options are returned too.
    """
    rows = tuple((rank, tuple(sorted({*counts[::4], counts[-1]}))) for rank, counts in options.rows)
    coarse = Options(options.spec, options.pattern, rows, options.bucket)
    errors: list[float] = []
    for rank, counts in coarse.rows:
        if coarse.pattern is not None:
            errors.append(metric.error(_dropped_by_pattern(span, rank, coarse.pattern)))
            continue
        residual = span.residual(rank)
        order = residual.abs().flatten().argsort(descending=True, stable=True)
        dropped = span.unscaled(residual).flatten()
        start = 0
        for nnz in counts:
            dropped[order[start:nnz]] = 0.0
            start = nnz
            errors.append(metric.error(dropped.view_as(residual)))
    return coarse, errors


def calibrated_surface(
    options: Options, span_error: Sequence[float], anchor_error: Sequence[float], zero_error: float
) -> ErrorSurface:
    """The surface of a layer: the span's errors for the shape, the anchors' for the level.

    Along a row of anchors, all of one rank share, the kept fraction k sets `error(k) = span(k) * exp(h(k))`, where
    `h = log(anchor / span)` at the anchors, linear in between and constant outside. A solver that moves the weights it
    keeps recovers much of what a span merely drops, far more where inputs are correlated than where they are not;
    without this the allocation pays for losses that no solver leaves. Between rows the logarithm of the error is
    linear in the rank share: how a span's loss depends on its rank says nothing of a fit's (gates of the bundled model
    would cost twice too much at a share of a tenth), while that of fits is nearly this line.

    Along a row the span's errors are made monotone first: dropping more of nested parts cannot cost less, though a
    second-order price may say so (scaling a query up or down is free to first order, dropping it is not). For the
    same reason the zero option costs at least `zero_error`.

    Args:
        span_error: one per option of `options.targets`.
        anchor_error: one per anchor, row by row, in the same unit; empty leaves the span's errors as they are.
        zero_error: a second estimate for the layer dropped whole, in the same unit.
    """
    base = ErrorSurface(options.spec, options.targets, tuple(_monotone(options, span_error)))
    between = _fitted_errors(options, base, anchor_error) if anchor_error else base.predict
    errors = [
        max(error, zero_error) if target == Target.zero() else between(target) if error > 0 else 0.0
        for target, error in zip(base.targets, base.error, strict=True)
    ]
    return ErrorSurface(options.spec, base.targets, tuple(errors))


def _monotone(options: Options, error: Sequence[float]) -> list[float]:
    made: list[float] = []
    start = 0
    for _, counts in options.rows:
        row = list(error[start : start + len(counts)])
        start += len(counts)
        for i in reversed(range(len(row) - 1)):
            row[i] = max(row[i], row[i + 1])
        made += row
    return made


def _fitted_errors(options: Options, base: ErrorSurface, anchor_error: Sequence[float]) -> Callable[[Target], float]:
    """The error of any target; see `calibrated_surface`."""
    spec = options.spec
    # Below this a logarithm compares rounding errors.
    floor = 1e-9 * max(*base.error, *anchor_error, 1e-30)

    def log(error: float) -> float:
        return math.log(max(error, floor))

    anchors = [anchor for row in options.anchors for anchor in row]
    ratios = {
        anchor: log(error) - log(base.predict(anchor)) for anchor, error in zip(anchors, anchor_error, strict=True)
    }
    values = AnchorValues.of(options, ratios)
    if len(values.rows) == 1:
        return lambda target: base.predict(target) * math.exp(values.at(target, spec))

    def error(target: Target) -> float:
        kept = target.params(spec) / spec.numel
        logs = [
            log(base.predict(options.sharing(kept, share))) + interpolate(xs, ys, kept) for share, xs, ys in values.rows
        ]
        return math.exp(interpolate([share for share, _, _ in values.rows], logs, target.rank_share(spec)))

    return error
