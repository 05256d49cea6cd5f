"""Compute error surfaces: the predicted loss of every option of a layer, from its span and its anchor solutions."""

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
    """Prepare the part of the weight that each option drops for inner products with gradients.

    Option (rank, nnz) keeps the first `rank` directions of the span and the `nnz` largest entries of their residual,
    in the span's scaled coordinates; the rest is dropped. The projections of the returned sketches, concatenated, are
    in the order of `options.targets`.

    >>> from globalopt.analysis.spans import compute_span
    >>> from globalopt.values.layer import LayerSpec
    >>> from globalopt.values.metric import Gram
    >>> W = torch.diag(torch.tensor([3.0, 2.0]))
    >>> spec, span = LayerSpec("up", 0, "in", "up", 2, 2), compute_span(W, Gram(torch.eye(2), 64), "direct")
    >>> options = Options.of(spec, max_rank=0)
    >>> [target.nnz for target in options.targets]
    [0, 1, 2, 3, 4]
    >>> project(sketches(span, options), torch.ones(1, 2, 2)).round(decimals=4)
    tensor([[5., 2., 0., 0., 0.]], dtype=torch.float64)
    """
    if options.pattern is not None:
        dropped = [_dropped_by_pattern(span, rank, options.pattern) for rank, _ in options.rows]
        return [DenseSketch(torch.stack(dropped))]
    if options.factors:
        residuals = [span.unscaled(span.residual(target.rank)) for target in options.targets]
        dense = Target.dense(options.spec)
        parts = zip(options.targets, residuals, strict=True)
        return [DenseSketch(torch.stack([torch.zeros_like(X) if target == dense else X for target, X in parts]))]
    made: list[PrefixSketch | DenseSketch] = []
    for rank, counts in options.rows:
        residual = span.residual(rank)
        made.append(PrefixSketch.make(residual.abs(), span.unscaled(residual), options.bucket, counts))
    return made


def _dropped_by_pattern(span: Span, rank: int, pattern: NM) -> Tensor:
    """Compute the entries (d_out, d_in) of a rank's residual that an N:M pattern drops."""
    residual = span.residual(rank)
    return span.unscaled(residual.masked_fill(keep_nm(residual.abs(), pattern), 0.0))


def project(made: Sequence[PrefixSketch | DenseSketch], gradients: Tensor) -> Tensor:
    """Compute inner products (b, options) of gradients (b, d_out, d_in) with the part that every option drops.

    >>> project([DenseSketch(torch.eye(2)[None]), DenseSketch(torch.ones(1, 2, 2))], torch.ones(1, 2, 2))
    tensor([[2., 4.]], dtype=torch.float64)
    """
    return torch.cat([sketch.project(gradients) for sketch in made], dim=1)


def gram_errors(span: Span, options: Options, metric: Metric) -> tuple[Options, list[float]]:
    """Compute the output errors `tr(E G Eᵀ)` of the options of a span, where there is no backward pass.

    Every option takes a product with G, so only every fourth nonzero count is kept.

    Returns:
        The remaining options, and their errors.

    >>> from globalopt.analysis.spans import compute_span
    >>> from globalopt.values.layer import LayerSpec
    >>> from globalopt.values.metric import Gram
    >>> W, gram = torch.diag(torch.tensor([3.0, 2.0, 1.0])), Gram(torch.eye(3), 64)
    >>> spec, span = LayerSpec("up", 0, "in", "up", 3, 3), compute_span(W, gram, "none")
    >>> options, errors = gram_errors(span, Options.of(spec, max_rank=0), Metric(gram))
    >>> [(target.nnz, round(error, 3)) for target, error in zip(options.targets, errors)]
    [(0, 14.0), (4, 0.0), (8, 0.0), (9, 0.0)]
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
    """Compute the error surface of a layer: its shape from the errors of the span, its level from those of the anchors.

    Along a row of anchors, all of one rank share, the error at the kept fraction k is `error(k) = span(k) * exp(h(k))`,
    where `h = log(anchor / span)` at the anchors, linear in between and constant outside. A solver that moves the
    weights it keeps recovers much of the error of merely dropping the rest, and far more where inputs are correlated;
    without this correction the allocation would avoid losses that no solver has. Between rows the logarithm of the
    error is linear in the rank share: the dependence of a span's error on rank does not carry over to solutions (it
    would double the error of gates of the bundled model at a share of a tenth), and that of solutions is nearly linear.

    Along a row the errors of the span are made monotone first: of nested parts, dropping more cannot cost less, though
    a second-order prediction may say so (scaling a query up or down is free to first order, dropping it is not). For
    the same reason the error of the zero option is at least `zero_error`.

    Args:
        span_error: one per option of `options.targets`.
        anchor_error: one per anchor, row by row, in the same unit; if empty, the errors of the span are not changed.
        zero_error: a second estimate for the layer dropped whole, in the same unit.

    >>> from globalopt.values.layer import LayerSpec
    >>> spec = LayerSpec("up", 0, "in", "up", 10, 10)
    >>> options = Options.of(spec, max_rank=0)
    >>> span_error = [1 - target.nnz / 100 for target in options.targets]
    >>> anchor_error = [0.46, 0.4, 0.3, 0.15]  # half of the span's, at 8, 20, 40 and 70 nonzeros
    >>> surface = calibrated_surface(options, span_error, anchor_error, zero_error=2.0)
    >>> round(surface.predict(Target(0, 50)), 2), surface.predict(Target.zero())
    (0.25, 2.0)
    """
    base = ErrorSurface(options.spec, options.targets, tuple(_monotone(options, span_error)))
    between = _fitted_errors(options, base, anchor_error) if anchor_error else base.predict
    errors = [
        max(error, zero_error) if target == Target.zero() else between(target) if error > 0 else 0.0
        for target, error in zip(base.targets, base.error, strict=True)
    ]
    return ErrorSurface(options.spec, base.targets, tuple(errors))


def _monotone(options: Options, error: Sequence[float]) -> list[float]:
    """Raise errors along each row to those of options that keep more."""
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
    """Return the function that predicts the error of any target; see `calibrated_surface`."""
    spec = options.spec
    # Below this floor errors are rounding, whose logarithms mean nothing.
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
