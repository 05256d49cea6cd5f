"""Round numbers to grids of few bits, one per group of consecutive numbers (see `globalopt.values.storage`)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

SHRINKS = (1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55)
"""Scales that are tried, as multiples of the one whose largest level is the largest number of the group."""

SCALE = torch.bfloat16
"""Type in which scales are stored; its range is that of float32, so that no scale becomes zero or infinite."""


def fit_scales(numbers: Tensor, bits: int, group: int, weights: Tensor | None = None) -> Tensor:
    """Choose the scale of every group: of `SHRINKS`, the one with the least weighted squared error of rounding.

    Large scales reach the largest numbers of a group, small ones are finer for all others.

    Args:
        numbers: (n,). group: consecutive numbers that share a scale.
        weights: (n,) >= 0, of the squared errors; None weighs all alike.
    Returns:
        (ceil(n / group),) float32, each exactly a bfloat16; 0 where all numbers of a group are.

    >>> fit_scales(torch.tensor([-1.5, 0.5, 0.5, 3.0]), bits=2, group=2).tolist()
    [1.0, 1.8984375]
    """
    magnitudes = _grouped(numbers.abs(), group)
    weights = None if weights is None else _grouped(weights, group)
    half = 2 ** (bits - 1)
    most = magnitudes.amax(1)
    least = torch.full_like(most, torch.inf)
    scales = torch.zeros_like(most)
    for shrink in SHRINKS:
        tried = (shrink * most / (half - 0.5)).to(SCALE).to(numbers.dtype)
        errors = (_level(magnitudes, tried[:, None], half) - magnitudes).square_()
        error = (errors if weights is None else errors.mul_(weights)).sum(1)
        better = error < least
        least, scales = torch.where(better, error, least), torch.where(better, tried, scales)
    return scales


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

    The largest level of a group is its largest number: less exact than `fit_scales`, which tries eleven scales.

    >>> grid_noise(torch.tensor([[1.0, 0.4, -0.2]]), bits=2, group=3).mul(1000).round().tolist()
    [[2.0, -66.0, -134.0]]
    """
    half = 2 ** (bits - 1)
    magnitudes = _grouped(W.abs().flatten(), group)
    scales = (magnitudes.amax(1, keepdim=True) / (half - 0.5)).to(SCALE).to(W.dtype)
    levels = _level(magnitudes, scales, half).flatten()[: W.numel()].view_as(W)
    return torch.copysign(levels, W).sub_(W)


def codes(numbers: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Find the codes `c + 2^(bits-1)` of the levels nearest to numbers, 0 to 2^bits - 1.

    Levels that were rounded to bfloat16 are found again, as their error is less than half a scale.

    >>> codes(torch.tensor([0.5, -0.5, 1.5]), torch.tensor(1.0), bits=2).tolist()
    [2, 1, 3]
    """
    half = 2 ** (bits - 1)
    steps = torch.where(scales > 0, numbers / scales, numbers.new_zeros(()))
    return (steps.floor().clamp(-half, half - 1) + half).to(torch.uint8)


def levels(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Compute the numbers that codes stand for, in the dtype of the scales.

    >>> levels(torch.tensor([2, 1, 3], dtype=torch.uint8), torch.tensor(1.0), bits=2).tolist()
    [0.5, -0.5, 1.5]
    """
    return (codes.to(scales.dtype) - (2 ** (bits - 1) - 0.5)) * scales


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
    steps = magnitudes / scales.clamp_min(torch.finfo(magnitudes.dtype).tiny)
    return steps.floor_().clamp_max_(half - 1).add_(0.5).mul_(scales)


def _grouped(numbers: Tensor, group: int) -> Tensor:
    """Arrange numbers (n,) in groups, (ceil(n / group), group), the last one filled up with zeros."""
    return pad(numbers, (0, -len(numbers) % group)).view(-1, group)
