"""Compute error surfaces: the predicted loss of every option of a layer, from its span and its anchor solutions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from globalopt.analysis.anchor_curves import AnchorCurves, Curve, middle
from globalopt.analysis.grid import AnchorValues, Options
from globalopt.kernels.projection import keep_nm
from globalopt.values.budget import Target
from globalopt.values.metric import Metric
from globalopt.values.span import Span
from globalopt.values.surface import ErrorSurface


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
    options: Options,
    span_error: Sequence[float],
    anchor_error: Sequence[float],
    zero_error: float,
    curves: AnchorCurves | None = None,
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
        span_error: one per option of `options.targets`; where a second row of anchors says what rank is worth, those of
            the first rank, zero, are enough.
        anchor_error: one per anchor, row by row, in the same unit, or with `curves` the one at the middle of the first
            row alone; if empty, the errors of the span are not changed.
        zero_error: a second estimate for the layer dropped whole, in the same unit; that costs no less than any anchor.
        curves: how the error changes from there to the other anchors.

    >>> from globalopt.values.layer import LayerSpec
    >>> spec = LayerSpec("up", 0, "in", "up", 10, 10)
    >>> options = Options.of(spec, max_rank=0)
    >>> span_error = [1 - target.nnz / 100 for target in options.targets]
    >>> anchor_error = [0.465, 0.39, 0.225]  # half of the span's, at 7, 22 and 55 nonzeros
    >>> surface = calibrated_surface(options, span_error, anchor_error, zero_error=2.0)
    >>> round(surface.predict(Target(0, 50)), 2), surface.predict(Target.zero())
    (0.25, 2.0)
    """
    base = _base(options, span_error)
    between, least = base.predict, zero_error
    if anchor_error:
        levels = _Levels.of(options, base, anchor_error, curves)
        between, least = levels.error, max(zero_error, *anchor_error, *map(levels.error, options.anchors[0]))
    known = dict(zip(base.targets, base.error, strict=True))
    errors = [
        max(known[target], least)
        if target == Target.zero()
        else between(target)
        if target not in known or known[target] > 0
        else 0.0
        for target in options.targets
    ]
    return ErrorSurface(options.spec, options.targets, tuple(errors))


def compute_curves(options: Options, span_error: Sequence[float], anchor_error: Sequence[float]) -> AnchorCurves:
    """Compute how the error changes from anchor to anchor, from the errors at all of them.

    Args:
        span_error, anchor_error: as in `calibrated_surface`.

    >>> from globalopt.values.layer import LayerSpec
    >>> options = Options.of(LayerSpec("up", 0, "in", "up", 64, 64), max_rank=8)
    >>> span_error = [1 - target.nnz / 4096 for target in Options.of(options.spec, max_rank=0).targets]
    >>> found = compute_curves(options, span_error, [0.93, 0.78, 0.45, 0.75, 0.25])  # with rank, half of it at .5 kept
    >>> [round(abs(log), 2) for log in found.worth.logs]
    [0.0, 0.69]
    """
    levels = _Levels.of(options, _base(options, span_error), anchor_error)
    at_middle = middle(levels.ratios.logs)
    level = Curve(levels.ratios.kept, tuple(log - at_middle for log in levels.ratios.logs))
    return AnchorCurves(level, levels.worth)


def _base(options: Options, span_error: Sequence[float]) -> ErrorSurface:
    return ErrorSurface(options.spec, options.targets[: len(span_error)], tuple(_monotone(options, span_error)))


def _monotone(options: Options, error: Sequence[float]) -> list[float]:
    """Raise errors along each row to those of options that keep more."""
    made: list[float] = []
    start = 0
    for _, counts in options.rows:
        if start == len(error):
            break
        row = list(error[start : start + len(counts)])
        start += len(counts)
        for i in reversed(range(len(row) - 1)):
            row[i] = max(row[i], row[i + 1])
        made += row
    return made


@dataclass(frozen=True)
class _Levels:
    """Hold the level of a layer's errors along its row of anchors without rank, and what rank is worth.

    Args:
        floor: errors below are rounding, whose logarithms mean nothing.
        ratios: logarithms of anchor over span at the anchors of the first row.
        worth: of rank; None without a second row.
    """

    options: Options
    base: ErrorSurface
    floor: float
    ratios: Curve
    worth: Curve | None

    @classmethod
    def of(
        cls,
        options: Options,
        base: ErrorSurface,
        anchor_error: Sequence[float],
        curves: AnchorCurves | None = None,
    ) -> _Levels:
        """Make it from the errors at all anchors, or from that at the middle of the first row and the curves."""
        spec, (sparse, *further) = options.spec, options.anchors
        floor = 1e-9 * max(*base.error, *anchor_error, 1e-30)
        if curves is not None:
            known = middle(sparse)
            ratio = _log(anchor_error[0], floor) - _log(base.predict(known), floor)
            row = Curve(curves.level.kept, tuple(ratio + log for log in curves.level.logs))
            return cls(options, base, floor, row, curves.worth)
        first = dict(zip(sparse, anchor_error[: len(sparse)], strict=True))
        ratios = {anchor: _log(error, floor) - _log(base.predict(anchor), floor) for anchor, error in first.items()}
        ((_, kept, logs),) = AnchorValues.of(options, ratios).rows
        found = cls(options, base, floor, Curve(kept, logs), None)
        if not further:
            return found
        (row,) = further
        shares = tuple(anchor.params(spec) / spec.numel for anchor in row)
        errors = zip(shares, anchor_error[len(sparse) :], strict=True)
        logs = tuple(_log(error, floor) - found._without_rank(share) for share, error in errors)
        return replace(found, worth=Curve(shares, logs))

    def error(self, target: Target) -> float:
        """Predict the error of any target; see `calibrated_surface`."""
        spec = self.options.spec
        kept = target.params(spec) / spec.numel
        if self.worth is None:
            return self.base.predict(target) * math.exp(self.ratios.at(kept))
        part = target.rank_share(spec) / max(anchor.rank_share(spec) for anchor in self.options.anchors[-1])
        return math.exp(self._without_rank(kept) + part * (2 - part) * self.worth.at(kept))

    def _without_rank(self, kept: float) -> float:
        """Predict the logarithm of the error with all of the kept fraction as nonzeros."""
        plain = self.base.predict(self.options.sharing(kept, 0.0))
        return _log(plain, self.floor) + self.ratios.at(kept)


def _log(error: float, floor: float) -> float:
    return math.log(max(error, floor))
