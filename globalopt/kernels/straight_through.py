"""Round numbers to their grids with gradients, so that codes and scales can be trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from globalopt.kernels.grid import SCALE, spread


def straight_levels(numbers: Tensor, log_scales: Tensor, bits: int, group: int) -> Tensor:
    """Round numbers to the levels of their grids, differentiable in the numbers and in the logarithms of the scales.

        level = (c + 1/2) s,   c = clamp(floor(x / s)),   s = bfloat16(exp(log scale))

    The gradient of a level passes to its number unchanged where the grid reaches it, and is zero beyond the last level
    (straight through, Bengio et al., arXiv:1308.3432). With respect to the scale it is `c + 1/2`, what it is exactly
    for fixed codes; LSQ (arXiv:1902.08153, eq. 3) subtracts `x / s` from it, as if the codes followed the scale.

    Args:
        numbers: (n,). log_scales: (ceil(n / group),), logarithms of the scales; -inf is a group of zeros.
        bits: of the codes. group: consecutive numbers that share a scale.
    Returns:
        (n,) levels.

    >>> x, log_scales = torch.tensor([0.1, -0.9, 7.0], requires_grad=True), torch.zeros(1, requires_grad=True)
    >>> with torch.enable_grad():
    ...     found = straight_levels(x, log_scales, bits=2, group=3)
    ...     found.sum().backward()
    >>> found.tolist(), x.grad.tolist(), log_scales.grad.tolist()
    ([0.5, -0.5, 1.5], [1.0, 1.0, 0.0], [1.5])
    """
    return _Levels.apply(numbers, log_scales, bits, group)


def scales_of(log_scales: Tensor) -> Tensor:
    """Compute scales as they are stored from their logarithms, in float32.

    >>> scales_of(torch.tensor([0.0, -torch.inf])).tolist()
    [1.0, 0.0]
    """
    return log_scales.exp().to(SCALE).float()


class _Levels(torch.autograd.Function):
    """Compute levels, and keep of them what the gradient needs."""

    @staticmethod
    def forward(ctx: Any, numbers: Tensor, log_scales: Tensor, bits: int, group: int) -> Tensor:
        half = 2 ** (bits - 1)
        scales = spread(scales_of(log_scales), group, len(numbers))
        steps = (numbers / scales.clamp_min(torch.finfo(numbers.dtype).tiny)).floor_()
        inside = (steps >= -half) & (steps < half)
        found = steps.clamp_(-half, half - 1).add_(0.5).mul_(scales)
        ctx.save_for_backward(inside, found)
        ctx.group = group
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient,) = gradients
        inside, found = ctx.saved_tensors
        # A level is proportional to its scale: its derivative by the logarithm is itself.
        shares = pad(gradient * found, (0, -len(found) % ctx.group)).view(-1, ctx.group)
        return gradient * inside, shares.sum(1), None, None
