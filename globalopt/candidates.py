"""Layers as a search sees them: a weight for any target, without a fit of its own.

A search asks about thousands of allocations; fitting each layer anew would cost more than the search. `span_weight`
cuts the layer from its span. `FittedLayer` mixes what a few real fits lost, scaled to what the surface predicts: the
residual of a solver that moves the weights it keeps is of another shape and size than what a span merely drops.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from globalopt.span import take
from globalopt.types import Decomposition, ErrorSurface, Mask, Span, Target

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
"""Rows are dealt out by the multiples of it, so that anchors get evenly spread ones and a small change moves few."""


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
    """

    surface: ErrorSurface
    anchors: tuple[tuple[Target, ...], ...]
    residuals: Tensor

    def weight(self, dense: Tensor, target: Target) -> Tensor:
        """(d_out, d_in) the layer at `target`, about as a fit would leave the weight `dense` (d_out, d_in)."""
        if target == Target.zero():
            return torch.zeros_like(dense)
        return dense - self.residual(target).to(dense.device)

    def residual(self, target: Target) -> Tensor:
        """(d_out, d_in) float32 what a fit at `target` would lose of the weight, about.

        Each row is that of one of the four anchors around the target, in the shares of linear interpolation in the kept
        fraction and the rank share; all of it is scaled by `sqrt(error(target) / sum of shares x error(anchor))`. The
        errors of rows add up, so that the candidate's own price is the surface's, at every target.
        """
        spec = self.surface.spec
        mix = self._shares(target)
        mean = math.fsum(share * self.surface.predict(self._flat[i]) for i, share in mix)
        scale = math.sqrt(self.surface.predict(target) / mean) if mean > 0 else 0.0
        rows = self._rows(mix, spec.d_out)
        return self.residuals[rows, torch.arange(spec.d_out)].float() * scale

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

    @staticmethod
    def _rows(mix: Sequence[tuple[int, float]], d_out: int) -> Tensor:
        """(d_out,) which anchor every row is from."""
        at = torch.arange(1, d_out + 1, dtype=torch.float64) * GOLDEN_RATIO % 1.0
        ends = torch.tensor([share for _, share in mix], dtype=torch.float64).cumsum(0)
        ends[-1] = 1.0
        return torch.tensor([anchor for anchor, _ in mix])[torch.searchsorted(ends, at, right=True)]


def _between(xs: Sequence[float], x: float) -> tuple[int, int, float]:
    """Neighbours of `x` among the ascending `xs`, and how far it is from the first to the second; ends are kept."""
    right = bisect.bisect_left(xs, x)
    if right == 0:
        return 0, 0, 0.0
    if right == len(xs):
        return right - 1, right - 1, 0.0
    return right - 1, right, (x - xs[right - 1]) / (xs[right] - xs[right - 1])
