"""What there is to keep in a layer, read off before anything is: its singular values and its saliencies, sorted."""

from __future__ import annotations

import torch
from torch import Tensor

from globalopt.values.metric import Gram
from globalopt.values.results import Curve, LayerCurves

VERSION = 1
"""Raised whenever curves change."""


POINTS = 64
"""Most places at which a curve is kept."""

ROUNDING = 1e-7
"""Singular values below this share of the largest are zeros that were rounded."""


def layer_curves(weight: Tensor, gram: Gram) -> LayerCurves:
    """Singular values of `W D` and its sorted `|W_ij| d_j`, with `D = diag(d)` the root mean squares of the inputs.

    Both are root mean squares of what a direction, or an entry, adds to the output if inputs are uncorrelated: the
    scale in which robust PCA splits the layer.

    Args:
        weight: (d_out, d_in), any float dtype, finite.
    """
    scaled = weight.float() * gram.norms.to(weight.device)
    smaller = scaled.double() if scaled.shape[0] <= scaled.shape[1] else scaled.double().mT
    # Only the values are wanted: of the smaller second moment they cost a fraction of those of the matrix.
    singular = torch.linalg.eigvalsh(smaller @ smaller.mT).clamp_min(0).sqrt().flip(0)
    singular = singular.where(singular > ROUNDING * singular[0], 0.0)
    return LayerCurves(_curve(singular), _curve(scaled.abs().flatten().sort(descending=True).values))


def _curve(values: Tensor) -> Curve:
    """`values` (n,), descending, at up to `POINTS` places whose logarithms are evenly spaced."""
    count = len(values)
    spaced = torch.logspace(0, 1, POINTS, base=count, dtype=torch.float64).round().long().clamp(1, count)
    places = spaced.unique()
    return Curve(count, tuple(places.tolist()), tuple(values[places.to(values.device) - 1].float().tolist()))
