"""Round numbers to grids of few bits, one per group of consecutive numbers (see `globalopt.values.storage`).

The sign of a scale says which of two grids it is of: positive of a mid-rise one, whose levels are `+-(n + 1/2) scale`,
and negative of a mid-tread one, with `+-n |scale|`, in which `n = 0` is nearly zero.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

SHRINKS = (1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55)
"""Mid-rise scales that are tried, as multiples of the one whose largest level is the largest number of the group."""

TREAD_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6)
"""Mid-tread scales that are tried, as multiples of the one that reaches half a step beyond its largest level."""

GROUPS_AT_ONCE = 512
"""Groups whose scales are chosen together: what is computed of them for all that are tried stays in the cache."""

NEAR_ZERO = 2.0**-10
"""The level nearest to zero of a mid-tread grid, as a multiple of its scale: what is kept is never zero."""

SCALE = torch.bfloat16
"""Type in which scales are stored; its range is that of float32, so that no scale becomes zero or infinite."""


def fit_scales(numbers: Tensor, bits: int, group: int, weights: Tensor | None = None, mid_tread: bool = True) -> Tensor:
    """Choose the grid of every group: of both kinds with several scales, the one of least weighted squared error.

    Large scales reach the largest numbers of a group, small ones are finer for all others. A mid-tread grid is better
    where small numbers weigh most, a mid-rise one where no number is near zero, as in what pruning left.

    Args:
        numbers: (n,). group: consecutive numbers that share a scale.
        weights: (n,) >= 0, of the squared errors; None weighs all alike.
        mid_tread: whether a grid may be mid-tread.
    Returns:
        (ceil(n / group),) float32, each exactly a bfloat16, negative for mid-tread grids; 0 where all numbers of a
        group are.

    >>> fit_scales(torch.tensor([-1.5, 0.5, 0.5, 3.0]), bits=2, group=2).tolist()
    [1.0, 1.8984375]
    >>> bool(fit_scales(torch.tensor([0.01, 1.0]), bits=3, group=2, weights=torch.tensor([1e4, 1.0])) < 0)
    True
    """
    if weights is None and len(numbers) % group:
        # What fills up the last group weighs nothing.
        weights = torch.ones_like(numbers)
    magnitudes = _grouped(numbers.abs(), group).split(GROUPS_AT_ONCE)
    weighed = [None] * len(magnitudes) if weights is None else _grouped(weights, group).split(GROUPS_AT_ONCE)
    some = [_best_scales(x, w, 2 ** (bits - 1), mid_tread) for x, w in zip(magnitudes, weighed, strict=True)]
    return torch.cat(some)


def _best_scales(magnitudes: Tensor, weights: Tensor | None, half: int, mid_tread: bool) -> Tensor:
    """Choose the grids of some groups, (groups, numbers) -> (groups,)."""
    shrinks = magnitudes.new_tensor((*SHRINKS, *(-shrink for shrink in TREAD_SHRINKS if mid_tread)))
    tried = (shrinks[:, None] * magnitudes.amax(1) / (half - 0.5)).to(SCALE).to(magnitudes.dtype)
    errors = _level(magnitudes, tried[:, :, None], half).sub_(magnitudes).square_()
    best = (errors if weights is None else errors.mul_(weights)).sum(2).min(0).indices
    return tried.gather(0, best[None])[0]


def largest_scales(numbers: Tensor, bits: int, group: int) -> Tensor:
    """Compute the mid-tread scale of every group that just reaches its largest number, as is usual without any data.

    Its levels are `-(2^(bits-1) - 1)` to `2^(bits-1) - 1` times the scale, and the largest number lies half a step
    beyond the last.

    Args, returns:
        as of `fit_scales`.

    >>> largest_scales(torch.tensor([0.5, -3.5]), bits=3, group=2).tolist()
    [-1.0]
    """
    most = _grouped(numbers.abs(), group).amax(1)
    return (-most / (2 ** (bits - 1) - 0.5)).to(SCALE).to(numbers.dtype)


def spread(scales: Tensor, group: int, n: int) -> Tensor:
    """Repeat the scale of every group for its numbers, (groups,) -> (n,).

    >>> spread(torch.tensor([1.0, 2.0]), group=2, n=3).tolist()
    [1.0, 1.0, 2.0]
    """
    return scales.repeat_interleave(group)[:n]


def snap(numbers: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Round numbers to the nearest level of their grids; where a scale is 0 they become 0.

    Args:
        numbers, scales: of one shape, or of shapes that broadcast.

    >>> snap(torch.tensor([0.1, -0.9, 7.0]), torch.tensor(1.0), bits=2).tolist()
    [0.5, -0.5, 1.5]
    """
    return torch.copysign(_level(numbers.abs(), scales, 2 ** (bits - 1)), numbers)


def grid_noise(W: Tensor, bits: int, group: int) -> Tensor:
    """Compute the error of rounding all entries of `W` to their nearest levels, by groups along its rows.

    The grids are those of `largest_scales`, which takes less time than `fit_scales`.

    >>> grid_noise(torch.tensor([[1.0, 0.4, -0.2]]), bits=3, group=3).mul(1000).round().tolist()
    [[-144.0, -115.0, -85.0]]
    """
    numbers = W.flatten()
    grids = spread(largest_scales(numbers, bits, group), group, len(numbers))
    return snap(numbers, grids, bits).sub_(numbers).view_as(W)


def codes(numbers: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Find the codes of the levels nearest to numbers, 0 to 2^bits - 1: `2^(bits-1) + n`, or `- n - 1` below zero.

    Levels that were rounded to bfloat16 are found again, as their error is less than half a scale.

    >>> codes(torch.tensor([0.5, -0.5, 1.5]), torch.tensor(1.0), bits=2).tolist()
    [2, 1, 3]
    >>> codes(torch.tensor([0.001, -0.001, 1.0]), torch.tensor(-1.0), bits=2).tolist()
    [2, 1, 3]
    """
    half = 2 ** (bits - 1)
    steps = _steps(numbers.abs(), scales, half)
    steps = torch.where(scales == 0, 0.0, torch.where(numbers < 0, -1 - steps, steps))
    return (steps + half).to(torch.uint8)


def levels(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Compute the numbers that codes stand for, in the dtype of the scales.

    >>> levels(torch.tensor([2, 1, 3], dtype=torch.uint8), torch.tensor(1.0), bits=2).tolist()
    [0.5, -0.5, 1.5]
    >>> levels(torch.tensor([2, 1, 3], dtype=torch.uint8), torch.tensor(-1.0), bits=2).tolist()
    [0.0009765625, -0.0009765625, 1.0009765625]
    """
    steps, lowest = codes.to(scales.dtype) - 2 ** (bits - 1), offsets(scales)
    return (steps + torch.where(steps < 0, 1 - lowest, lowest)) * scales.abs()


def offsets(scales: Tensor) -> Tensor:
    """Return the least positive level of the grids of scales, as a multiple of these.

    >>> offsets(torch.tensor([2.0, -2.0])).tolist()
    [0.5, 0.0009765625]
    """
    return torch.where(scales < 0, NEAR_ZERO, 0.5)


def roundings(scales: Tensor) -> Tensor:
    """Return what is added to a magnitude, in steps, before it is rounded down to the number `n` of its level.

    >>> roundings(torch.tensor([2.0, -2.0])).tolist()
    [0.0, 0.5]
    """
    return torch.where(scales < 0, 0.5, 0.0)


def never_zero(rounded: Tensor, exact: Tensor) -> Tensor:
    """Replace values that float16 rounds to zero by its smallest number: groups of codes are counted in nonzeros.

    Args:
        rounded: what `exact`, of the same shape, was rounded to.

    >>> x = torch.tensor([0.0, -1e-9])
    >>> never_zero(x.half(), x).tolist()
    [0.0, -5.960464477539063e-08]
    """
    least = torch.finfo(rounded.dtype).smallest_normal * torch.finfo(rounded.dtype).eps
    lost = (rounded == 0) & (exact != 0)
    return torch.where(lost, torch.copysign(rounded.new_tensor(least), exact.to(rounded.dtype)), rounded)


def _level(magnitudes: Tensor, scales: Tensor, half: int) -> Tensor:
    """Round magnitudes to the nearest positive level; 0 where the scale is 0."""
    return _steps(magnitudes, scales, half).add_(offsets(scales)).mul_(scales.abs())


def _steps(magnitudes: Tensor, scales: Tensor, half: int) -> Tensor:
    """Find the numbers `n` of the positive levels that are nearest to magnitudes, 0 to half - 1."""
    steps = magnitudes / scales.abs().clamp_min(torch.finfo(magnitudes.dtype).tiny)
    return steps.add_(roundings(scales)).floor_().clamp_max_(half - 1)


def _grouped(numbers: Tensor, group: int) -> Tensor:
    """Arrange numbers (n,) in groups, (ceil(n / group), group), the last one filled up with zeros."""
    return pad(numbers, (0, -len(numbers) % group)).view(-1, group)
