"""Layers as a search sees them: a weight for any target, without a fit of its own.

A search asks about thousands of allocations; fitting each layer anew would cost more than the search. `span_weight`
cuts the layer from its span. `FittedLayer` mixes what a few real fits lost, scaled to what the surface predicts: the
residual of a solver that moves the weights it keeps is of another shape and size than what a span merely drops. Whole
residuals are mixed, for their rows belong together: errors of a fit in the output Gram cancel between rows, and rows of
several fits put together cost many times what each of the fits does.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from globalopt.kernels.projection import keep_weights
from globalopt.values.budget import Target
from globalopt.values.decomposition import Decomposition
from globalopt.values.problem import ErrorSurface
from globalopt.values.span import Mask, Span

VERSION = 1
"""Raised whenever the loss of a candidate changes."""


def take(span: Span, target: Target) -> Decomposition:
    """The span's candidate for `target`, without refinement.

    Keeps the first `target.rank` directions, and of what they leave the `target.nnz` largest entries in scaled
    coordinates (or the pattern's choice). Ranks above the span's are cut to it.
    """
    rank = min(target.rank, span.max_rank)
    U, V = span.low_rank(rank)
    residual = span.residual(rank)
    kept = keep_weights(residual.abs(), target.nnz, target.pattern)
    return Decomposition(span.unscaled(torch.where(kept, residual, 0.0)), U, V)


def span_weight(span: Span, kept: Target | Mask) -> Tensor:
    """(d_out, d_in) what the span keeps of the layer, without refinement."""
    if isinstance(kept, Target):
        return take(span, kept).dense()
    S = span.unscaled(torch.where(kept.entries, span.S, 0.0))
    return Decomposition(S, *span.directions(kept.directions)).dense()


@dataclass(frozen=True, eq=False)
class FittedLayer:
    """What fits at a few anchors lost of a layer, `residuals` (anchors, d_out, d_in), in any float dtype.

    Args:
        surface: of the layer; prices what a candidate loses.
        anchors: in rows of equal rank share, ascending in what they keep, as `Options.anchors`.
        overlap: (anchors, anchors) float64, cosines between the residuals in the norm that prices them.
    """

    surface: ErrorSurface
    anchors: tuple[tuple[Target, ...], ...]
    residuals: Tensor
    overlap: Tensor

    def weight(self, dense: Tensor, target: Target) -> Tensor:
        """(d_out, d_in) the layer at `target`, about as a fit would leave the weight `dense` (d_out, d_in)."""
        if target == Target.zero():
            return torch.zeros_like(dense)
        return dense - self.residual(target).to(dense.device)

    def residual(self, target: Target) -> Tensor:
        """(d_out, d_in) float32 what a fit at `target` would lose of the weight, about.

        `k sum of w_i R_i` over the anchors around the target, `w` the shares of linear interpolation in the kept
        fraction and the rank share. With `e_i` the surface at anchor i and `c_ij` the overlap,

            k = sqrt(error(target) / sum of w_i w_j c_ij sqrt(e_i e_j))

        so that the candidate's own price is the surface's, at every target.
        """
        mix = self._shares(target)
        shares = self.overlap.new_zeros(len(self.overlap))
        for i, share in mix:
            shares[i] += share
        norms = shares * self.overlap.new_tensor([self.surface.predict(anchor) for anchor in self._flat]).sqrt()
        price = float(norms @ self.overlap @ norms)
        scale = math.sqrt(self.surface.predict(target) / price) if price > 0 else 0.0
        used = sorted({i for i, _ in mix})
        return torch.einsum("k,kij->ij", (scale * shares[used]).float(), self.residuals[used].float())

    @property
    def _flat(self) -> list[Target]:
        return [target for row in self.anchors for target in row]

    def _shares(self, target: Target) -> list[tuple[int, float]]:
        """`(anchor, share)` of the anchors around `target`: within rows by the kept fraction, between them by rank."""
        spec = self.surface.spec
        kept = target.params(spec)
        start, per_row = 0, []
        for row in self.anchors:
            low, high, t = _between([anchor.params(spec) for anchor in row], kept)
            per_row.append(((start + low, 1 - t), (start + high, t)))
            start += len(row)
        shares = [max(anchor.rank_share(spec) for anchor in row) for row in self.anchors]
        low, high, t = _between(shares, target.rank_share(spec))
        mixed = [(anchor, part * share) for r, part in ((low, 1 - t), (high, t)) for anchor, share in per_row[r]]
        return [(anchor, share) for anchor, share in mixed if share]


def _between(xs: Sequence[float], x: float) -> tuple[int, int, float]:
    """Neighbours of `x` among the ascending `xs`, and how far it is from the first to the second; ends are kept."""
    right = bisect.bisect_left(xs, x)
    if right == 0:
        return 0, 0, 0.0
    if right == len(xs):
        return right - 1, right - 1, 0.0
    return right - 1, right, (x - xs[right - 1]) / (xs[right] - xs[right - 1])
