"""Sum second moments `x xᵀ`: symmetric, so that little more than half of the products are computed."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from globalopt.kernels.precision import rough_products

STRIP = 256
"""Fewest rows of the moment that are computed together, so that products stay large enough to be fast."""


def add_second_moment(total: Tensor, x: Tensor, rough: bool = False) -> None:
    """Add the sum of `x xᵀ` over rows `x` to `total`, on and above the diagonal; below it nothing is of use.

    Args:
        total: (d, d) float32, modified.
        x: (tokens, d) float32.
        rough: whether a CPU that is faster at it may multiply in bfloat16, with sums in float32 that are rounded to
            bfloat16; see `mirror`.

    >>> import torch
    >>> total = torch.zeros(2, 2)
    >>> add_second_moment(total, torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    >>> mirror(total).tolist()
    [[10.0, 2.0], [2.0, 4.0]]
    """
    rounded = x.bfloat16() if rough and rough_products(total) else None
    for start, end in _strips(len(total)):
        if rounded is None:
            total[start:end, start:].addmm_(x[:, start:end].mT, x[:, start:])
        else:
            total[start:end, start:] += rounded[:, start:end].mT @ rounded[:, start:]


def mirror(total: Tensor) -> Tensor:
    """Make what `add_second_moment` summed exactly symmetric, in place, and return it.

    Sums of products in bfloat16 are a second moment up to 2^-9 of each entry: positive semidefinite after damping, but
    not without.

    >>> import torch
    >>> mirror(torch.tensor([[1.0, 2.0], [2.0, 3.0]])).tolist()
    [[1.0, 2.0], [2.0, 3.0]]
    """
    for start, end in _strips(len(total)):
        square = total[start:end, start:end]
        square.copy_((square + square.mT) / 2)
        total[end:, start:end] = total[start:end, end:].mT
    return total


def _strips(d: int) -> Iterator[tuple[int, int]]:
    """Yield the first row, and the row after the last, of strips of at least `STRIP` rows, or of one of all `d`."""
    count = max(1, d // STRIP)
    for i in range(count):
        yield d * i // count, d * (i + 1) // count
