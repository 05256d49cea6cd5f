"""Compute error surfaces: the predicted loss of every option of a layer, from its span and its anchor solutions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from globalopt.analysis.grid import AnchorValues, Options
from globalopt.kernels.projection import keep_nm
from globalopt.values.budget import Target
from globalopt.values.metric import Metric
from globalopt.values.span import Span
from globalopt.values.surface import ErrorSurface, interpolate


def span_errors(span: Span, options: Options, metric: Metric) -> list[float]:
    """Compute the errors of the options of a span, as if inputs and output gradients were uncorrelated.

        error(rank, nnz) = sum of a_i g_j D_ij² over the entries that are dropped

    with the diagonals `a` of A (ones without A) and `g` of G. Option (rank, nnz) keeps the first `rank` directions of
    the span and the `nnz` largest entries of their residual, in the span's scaled coordinates; `D` is the rest. Options
    of one rank are nested, so that they share one sort and one sum.

    Returns:
        errors in the order of `options.targets`.

    >>> from globalopt.analysis.spans import compute_span
    >>> from globalopt.values.layer import LayerSpec
    >>> from globalopt.values.metric import Gram
    >>> W, gram = torch.diag(torch.tensor([3.0, 2.0])), Gram(torch.eye(2), 64)
    >>> spec, span = LayerSpec("up", 0, "in", "up", 2, 2), compute_span(W, gram, "none")
    >>> options = Options.of(spec, max_rank=0)
    >>> [round(error, 3) for error in span_errors(span, options, Metric(gram))]  # of 0, 1, ... 4 nonzeros
    [13.0, 4.0, 0.0, 0.0, 0.0]
    """
    scales = metric.inputs.diagonal.to(span.S.device)
    if metric.outputs is not None:
        scales = metric.outputs.diagonal.to(span.S.device)[:, None] * scales
    dense = Target.dense(options.spec)
    errors: list[float] = []
    for rank, counts in options.rows:
        residual = span.residual(rank)
        each = span.unscaled(residual).square_().mul_(scales)
        if options.pattern is not None:
            errors.append(
                float(each.masked_fill_(keep_nm(residual.abs(), options.pattern), 0.0).sum(dtype=torch.float64))
            )
        elif options.factors:
            whole = float(each.sum(dtype=torch.float64))
            errors += [0.0 if Target(rank, count) == dense else whole for count in counts]
        else:
            order = residual.abs_().flatten().argsort(descending=True, stable=True)
            kept = each.flatten()[order].cumsum(0, dtype=torch.float64)
            whole = float(kept[-1])
            errors += [max(0.0, whole - float(kept[count - 1])) if count else whole for count in counts]
    return errors


def calibrated_surface(
    options: Options, span_error: Sequence[float], anchor_error: Sequence[float], zero_error: float
) -> ErrorSurface:
    """Compute the error surface of a layer: its shape from the errors of the span, its level from those of the anchors.

    Along a row of anchors, all of one rank share, the error at the kept fraction k is `error(k) = span(k) * exp(h(k))`,
    where `h = log(anchor / span)` at the anchors, linear in between and constant outside. A solver that moves the
    weights it keeps recovers much of the error of merely dropping the rest, and far more where inputs are correlated;
    without this correction the allocation would avoid losses that no solver has. What a share `s` of rank is worth does
    not come from the span, whose error depends on rank in another way (it would double that of gates of the bundled
    model at a share of a tenth), but from the second row, of share `s1`:

        log error(k, s) - log error(k, 0) = x (2 - x) worth(k),   x = s / s1

    with `worth` linear in the kept fraction between the anchors of that row. In 21 layers of the bundled model a share
    of .15 is worth .7 of what one of .3 is, and rank is worth the more the more is kept: `worth` is -.19 to .24 at .2
    kept, and -.66 to .43 at half.

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
    >>> anchor_error = [0.465, 0.39, 0.225]  # half of the span's, at 7, 22 and 55 nonzeros
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
    sparse, *ranked = AnchorValues.of(options, ratios).rows

    def without_rank(kept: float) -> float:
        """Predict the logarithm of the error with all of the kept fraction as nonzeros."""
        _, xs, ys = sparse
        return log(base.predict(options.sharing(kept, 0.0))) + interpolate(xs, ys, kept)

    if not ranked:
        _, xs, ys = sparse
        return lambda target: base.predict(target) * math.exp(interpolate(xs, ys, target.params(spec) / spec.numel))
    # What rank is worth: the logarithm of the error with a share of rank, less that without.
    ((share, xs, _),) = ranked
    row = options.anchors[-1]
    errors = dict(zip(anchors, anchor_error, strict=True))
    worth = [log(errors[anchor]) - without_rank(kept) for anchor, kept in zip(row, xs, strict=True)]

    def error(target: Target) -> float:
        kept = target.params(spec) / spec.numel
        part = target.rank_share(spec) / share
        return math.exp(without_rank(kept) + part * (2 - part) * interpolate(xs, worth, kept))

    return error
