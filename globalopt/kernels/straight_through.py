"""Round numbers to their grids with gradients, so that codes and scales can be trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from globalopt.kernels.grid import SCALE, offsets, snap, spread


def straight_levels(
    numbers: Tensor, log_scales: Tensor, bits: int, group: int, mid_tread: Tensor | None = None
) -> Tensor:
    """Round numbers to the levels of their grids, differentiable in the numbers and in the logarithms of the scales.

        level = sign(x) (n + 1/2) s,   n = min(floor(|x| / s), 2^(bits-1) - 1),   s = bfloat16(exp(log scale))

    on mid-rise grids, and with `n` to the nearest and hardly an offset on mid-tread ones (`kernels.grid`).

    The gradient of a level passes to its number unchanged where the grid reaches it, and is zero beyond the last level
    (straight through, Bengio et al., arXiv:1308.3432). With respect to the scale it is `level / s`, what it is exactly
    for fixed codes; LSQ (arXiv:1902.08153, eq. 3) subtracts `x / s` from it, as if the codes followed the scale.

    Args:
        numbers: (n,). log_scales: (ceil(n / group),), logarithms of the scales; -inf is a group of zeros.
        bits: of the codes. group: consecutive numbers that share a scale.
        mid_tread: which groups have a mid-tread grid; none by default.
    Returns:
        (n,) levels.

    >>> x, log_scales = torch.tensor([0.1, -0.9, 7.0], requires_grad=True), torch.zeros(1, requires_grad=True)
    >>> with torch.enable_grad():
    ...     found = straight_levels(x, log_scales, bits=2, group=3)
    ...     found.sum().backward()
    >>> found.tolist(), x.grad.tolist(), log_scales.grad.tolist()
    ([0.5, -0.5, 1.5], [1.0, 1.0, 0.0], [1.5])
    """
    return _Levels.apply(numbers, log_scales, bits, group, mid_tread)


def scales_of(log_scales: Tensor) -> Tensor:
    """Compute scales as they are stored from their logarithms, in float32.

    >>> scales_of(torch.tensor([0.0, -torch.inf])).tolist()
    [1.0, 0.0]
    """
    return log_scales.exp().to(SCALE).float()


class _Levels(torch.autograd.Function):
    """Compute levels, and keep of them what the gradient needs."""

    @staticmethod
    def forward(
        ctx: Any, numbers: Tensor, log_scales: Tensor, bits: int, group: int, mid_tread: Tensor | None
    ) -> Tensor:
        half, sizes = 2 ** (bits - 1), scales_of(log_scales)
        scales = spread(sizes if mid_tread is None else torch.where(mid_tread, -sizes, sizes), group, len(numbers))
        found = snap(numbers, scales, bits)
        # Half a step beyond the last level is nearest to it, and all further.
        reach = (half - 1 + offsets(scales) + 0.5) * scales.abs()
        inside = numbers.abs() <= reach
        ctx.save_for_backward(inside, found)
        ctx.group = group
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (gradient,) = gradients
        inside, found = ctx.saved_tensors
        # A level is proportional to its scale: its derivative by the logarithm is itself.
        shares = pad(gradient * found, (0, -len(found) % ctx.group)).view(-1, ctx.group)
        return gradient * inside, shares.sum(1), None, None, None
