"""Keep the spectrum and the saliencies of a layer, thinned to what a picture shows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Curve:
    """Keep a few of many values in descending order, enough to draw their curve.

    Args:
        count: number of values in all.
        places: ranks of the kept `values`, ascending; 1 is the largest value, `count` the smallest.
        values: the kept values.

    >>> curve = Curve(count=1000, places=(1, 10, 1000), values=(8.0, 3.5, 0.1))
    >>> dict(zip(curve.places, curve.values))[10]  # the tenth largest
    3.5
    """

    count: int
    places: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class LayerCurves:
    """Keep the singular values and the saliencies of one layer, which show how much a rank or a nonzero is worth.

    Args:
        singular: singular values of `W D`, where `D = diag(d)` holds the root mean squares of the inputs.
        saliency: Wanda's scores `|W_ij| d_j` of all entries.

    >>> curves = LayerCurves(Curve(3, (1, 3), (5.0, 0.2)), Curve(6, (1, 6), (2.0, 0.0)))
    >>> curves.singular.values[0] / curves.singular.values[-1]  # condition number
    25.0
    """

    singular: Curve
    saliency: Curve
