"""Compute the sorted singular values and saliencies of a dense layer, as curves for reports."""

from __future__ import annotations

import torch
from torch import Tensor

from globalopt.values.curves import Curve, LayerCurves
from globalopt.values.metric import Gram

VERSION = 1
"""Raised whenever curves change."""


POINTS = 64
"""Largest number of points of a curve."""

ROUNDING = 1e-7
"""Singular values below this share of the largest are zeros that were rounded."""


def layer_curves(weight: Tensor, gram: Gram) -> LayerCurves:
    """Compute the singular values of `W D` and its sorted `|W_ij| d_j`, `D = diag(d)` the root mean squares of inputs.

    If inputs are uncorrelated, each is the root mean square of the contribution of a direction, or an entry, to the
    output. Robust PCA splits the layer in the same scale.

    Args:
        weight: (d_out, d_in), any float dtype, finite.
        gram: of the inputs.

    >>> curves = layer_curves(torch.diag(torch.tensor([3.0, 1.0])), Gram(torch.diag(torch.tensor([1.0, 4.0])), 64))
    >>> [round(value, 3) for value in curves.singular.values]
    [3.0, 2.0]
    >>> [round(value, 3) for value in curves.saliency.values]
    [3.0, 2.0, 0.0, 0.0]
    """
    scaled = weight.float() * gram.norms.to(weight.device)
    smaller = scaled.double() if scaled.shape[0] <= scaled.shape[1] else scaled.double().mT
    # The eigenvalues of the smaller second moment cost a fraction of a singular value decomposition.
    singular = torch.linalg.eigvalsh(smaller @ smaller.mT).clamp_min(0).sqrt().flip(0)
    singular = singular.where(singular > ROUNDING * singular[0], 0.0)
    return LayerCurves(_curve(singular), _curve(scaled.abs().flatten().sort(descending=True).values))


def _curve(values: Tensor) -> Curve:
    """Sample `values` (n,), descending, at up to `POINTS` places whose logarithms are evenly spaced."""
    count = len(values)
    spaced = torch.logspace(0, 1, POINTS, base=count, dtype=torch.float64).round().long().clamp(1, count)
    places = spaced.unique()
    return Curve(count, tuple(places.tolist()), tuple(values[places.to(values.device) - 1].float().tolist()))
