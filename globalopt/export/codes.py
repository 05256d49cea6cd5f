"""Store the numbers of a part as codes of few bits, packed, with one scale per group (`globalopt.values.storage`).

Scales are bfloat16, stored as the 16-bit integers of the same bits: a cast of a model changes all of its floating-point
tensors, and in float16 small scales would be lost.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from globalopt.errors import ArtefactError
from globalopt.export.packing import unpacked_numbers
from globalopt.kernels.grid import SCALE, codes, levels, spread
from globalopt.values.bits import pack_numbers
from globalopt.values.storage import GROUP

SCALE_BITS = torch.int16
"""Type of the integers that hold the bits of scales."""


def grid_codes(numbers: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Find the codes (n,) uint8 of numbers (n,) that lie on their grids, but for rounding to their dtype.

    Args:
        scales: of the groups of the numbers.
    Raises:
        ArtefactError: the numbers lie elsewhere, or are more or fewer than the scales are for.

    >>> grid_codes(torch.tensor([-0.5, 1.5]), torch.tensor([1.0]), bits=4).tolist()
    [7, 9]
    >>> grid_codes(torch.tensor([-0.5, 1.4]), torch.tensor([1.0]), bits=4)
    Traceback (most recent call last):
    globalopt.errors.ArtefactError: Numbers of a layer are not on the grid of 4 bits that its scales describe. ...
    """
    n = len(numbers)
    if scales.shape != (-(-n // GROUP),):
        raise ArtefactError(f"{n} numbers of a layer have {len(scales)} scales. Run the command again in a new folder.")
    exact, grids = numbers.float(), spread(scales.float(), GROUP, n)
    found = codes(exact, grids, bits)
    type_of = torch.finfo(numbers.dtype)
    # What float16 rounds to zero is kept as its smallest number, which is half a step off.
    allowed = type_of.eps * exact.abs() + type_of.smallest_normal * type_of.eps
    if bool(((levels(found, grids, bits) - exact).abs() > allowed).any()):
        raise ArtefactError(
            f"Numbers of a layer are not on the grid of {bits} bits that its scales describe. Run the command again in "
            "a new folder."
        )
    return found


def encode(numbers: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Pack numbers (n,) into codes (ceil(n bits / 8),) uint8 and scales (ceil(n / 64),) int16.

    Raises:
        ArtefactError: the numbers do not lie on the grids of their scales.

    >>> packed, scales = encode(torch.tensor([-0.5, 1.5]), torch.tensor([1.0]), bits=4)
    >>> f"{int(packed):08b}", scales.view(torch.bfloat16).tolist()
    ('10010111', [1.0])
    """
    return pack_numbers(grid_codes(numbers, scales, bits), bits), scales.to(SCALE).view(SCALE_BITS)


def decode(packed: Tensor, scales: Tensor, bits: int, n: int, dtype: torch.dtype) -> Tensor:
    """Unpack the `n` numbers that were encoded, in `dtype`.

    Raises:
        ArtefactError: there are other numbers of codes or scales, or a scale is not finite.

    >>> decode(*encode(torch.tensor([-0.5, 1.5]), torch.tensor([1.0]), 4), 4, 2, torch.float32).tolist()
    [-0.5, 1.5]
    """
    return decode_codes(unpacked_numbers(packed, bits, n), scales, bits, dtype)


def decode_codes(numbers: Tensor, scales: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Compute the numbers (n,) in `dtype` that codes (n,) uint8 stand for; errors as of `decode`.

    >>> scales = torch.tensor([2.0], dtype=torch.bfloat16).view(torch.int16)
    >>> decode_codes(torch.tensor([7, 9], dtype=torch.uint8), scales, bits=4, dtype=torch.float32).tolist()
    [-1.0, 3.0]
    """
    n = len(numbers)
    if scales.shape != (-(-n // GROUP),):
        raise ArtefactError(f"{n} codes have scales of shape {tuple(scales.shape)}; expected one per {GROUP}.")
    grids = scales.view(SCALE)
    if not bool(torch.isfinite(grids).all()):
        raise ArtefactError("A scale of packed codes is not finite.")
    groups = pad(numbers, (0, -n % GROUP)).view(-1, GROUP)
    return levels(groups, grids.float()[:, None], bits).view(-1)[:n].to(dtype)
