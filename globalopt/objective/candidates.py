"""Candidates for the weight of a layer at any target, made without a solver.

A search evaluates thousands of allocations; solving each layer anew would cost more than the search. `span_weight` cuts
the layer from its span. `AnchoredLayer` mixes the residuals of a few anchor solutions, scaled to the predicted loss:
the residual of a solver that moves the weights it keeps is of another shape and size than the part that a span drops.
Whole residuals are mixed, because their rows belong together: errors of a solution cancel between rows in the output
Gram, and rows taken from several solutions cost many times what each of the solutions does.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from globalopt.kernels.grid import grid_noise
from globalopt.kernels.projection import keep_weights
from globalopt.values.budget import Target
from globalopt.values.decomposition import Decomposition
from globalopt.values.rounding_losses import RoundingLosses
from globalopt.values.span import Mask, Span
from globalopt.values.storage import GROUP, PLAIN
from globalopt.values.surface import ErrorSurface

VERSION = 1
"""Raised whenever the loss of a candidate changes."""


def take(span: Span, target: Target) -> Decomposition:
    """Cut the decomposition at `target` from a span.

    It keeps the first `target.rank` directions, and of the remainder the `target.nnz` largest entries in scaled
    coordinates (or those that the pattern allows). A rank above the span's is lowered to it.

    >>> span = Span(torch.eye(4)[:, :1], torch.ones(1), torch.eye(4)[:1], torch.diag(torch.arange(4.0)),
    ...             torch.ones(4), torch.ones(4, 1))
    >>> found = take(span, Target(rank=1, nnz=2))
    >>> found.dense().diagonal()
    tensor([1., 0., 2., 3.])
    """
    rank = min(target.rank, span.max_rank)
    U, V = span.low_rank(rank)
    residual = span.residual(rank)
    kept = keep_weights(residual.abs(), target.nnz, target.pattern)
    return Decomposition(span.unscaled(torch.where(kept, residual, 0.0)), U, V)


def span_weight(span: Span, kept: Target | Mask) -> Tensor:
    """Compute the weight (d_out, d_in) that a span has at a target, or with the components of a mask.

    >>> span = Span(torch.eye(4)[:, :1], torch.ones(1), torch.eye(4)[:1], torch.diag(torch.arange(4.0)),
    ...             torch.ones(4), torch.ones(4, 1))
    >>> span_weight(span, Mask(torch.tensor([False]), span.S > 2)).diagonal()
    tensor([0., 0., 0., 3.])
    """
    if isinstance(kept, Target):
        return take(span, kept).dense()
    S = span.unscaled(torch.where(kept.entries, span.S, 0.0))
    return Decomposition(S, *span.directions(kept.directions)).dense()


@dataclass(frozen=True, eq=False)
class AnchoredLayer:
    """Describe the anchor solutions of a layer, from whose residuals candidates at any target are mixed.

    Args:
        surface: the error surface of the layer, to which the size of the mixed residual is scaled.
        anchors: the targets of the solutions, in rows of equal rank share, ascending in the parameters they keep, as
            `Options.anchors`.
        residuals: (anchors, d_out, d_in) in any float dtype, the weight less each solution.
        overlap: (anchors, anchors) float64, cosines between the residuals in the norm of the predicted loss.
        rounding: losses of few bits; None where all targets are in 16.

    >>> from globalopt.values.layer import LayerSpec
    >>> spec = LayerSpec("layer", 0, "layer", "q_proj", 4, 4)
    >>> anchors = (Target(0, 4), Target(0, 12))
    >>> surface = ErrorSurface(spec, (Target.zero(), *anchors, Target(0, 16)), (4.0, 1.0, 0.25, 0.0))
    >>> residuals = torch.stack([torch.full((4, 4), 0.25), torch.full((4, 4), 0.125)])
    >>> layer = AnchoredLayer(surface, (anchors,), residuals, torch.ones(2, 2, dtype=torch.float64))
    >>> W = torch.ones(4, 4)
    >>> float(layer.weight(W, Target(0, 4))[0, 0]), float(layer.weight(W, Target.zero())[0, 0])
    (0.75, 0.0)
    >>> between = layer.residual(Target(0, 8))[0, 0]  # surface.predict(Target(0, 8)) is 0.625
    >>> round(float(between / residuals[0, 0, 0]) ** 2, 3)
    0.625
    """

    surface: ErrorSurface
    anchors: tuple[tuple[Target, ...], ...]
    residuals: Tensor
    overlap: Tensor
    rounding: RoundingLosses | None = None

    def weight(self, dense: Tensor, target: Target) -> Tensor:
        """Compute the candidate (d_out, d_in) at `target` for the dense weight `dense` (d_out, d_in).

        In few bits it has the residual of 16 bits, and on top of it the error of rounding the dense weight, scaled to
        the loss that rounding is predicted to add.
        """
        if not target.rank and not target.nnz:
            return torch.zeros_like(dense)
        made = dense - self.residual(replace(target, storage=PLAIN)).to(dense.device)
        if target.storage.plain or self.rounding is None:
            return made
        bits = target.storage.values if target.nnz and target.storage.values < 16 else target.storage.factors
        whole = self.rounding.noise.get(bits, 0.0)
        if not whole:
            return made
        share = math.sqrt(self.rounding.added(target, self.surface.spec) / whole)
        return made.add_(grid_noise(dense, bits, GROUP), alpha=share)

    def residual(self, target: Target) -> Tensor:
        """Compute an estimate (d_out, d_in) float32 of the residual that a solver would have at `target`.

        It is `k sum of w_i R_i` over the anchors around the target, with `w` the shares of linear interpolation in the
        kept fraction and the rank share. With `e_i` the surface at anchor i and `c_ij` the overlap,

            k = sqrt(error(target) / sum of w_i w_j c_ij sqrt(e_i e_j))

        so that the predicted loss of the candidate is the surface's, at every target.
        """
        mix = self._shares(target)
        shares = self.overlap.new_zeros(len(self.overlap))
        for i, share in mix:
            shares[i] += share
        norms = shares * self.overlap.new_tensor([self.surface.predict(anchor) for anchor in self._flat]).sqrt()
        mixed = float(norms @ self.overlap @ norms)
        scale = math.sqrt(self.surface.predict(target) / mixed) if mixed > 0 else 0.0
        used = sorted({i for i, _ in mix})
        return torch.einsum("k,kij->ij", (scale * shares[used]).float(), self.residuals[used].float())

    @property
    def _flat(self) -> list[Target]:
        return [target for row in self.anchors for target in row]

    def _shares(self, target: Target) -> list[tuple[int, float]]:
        """`(anchor, share)` of the anchors around `target`: in a row by the kept fraction, between rows by rank."""
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
    """Find the neighbours of `x` among the ascending `xs`, and the share of the second in `x`; constant outside."""
    right = bisect.bisect_left(xs, x)
    if right == 0:
        return 0, 0, 0.0
    if right == len(xs):
        return right - 1, right - 1, 0.0
    return right - 1, right, (x - xs[right - 1]) / (xs[right] - xs[right - 1])
