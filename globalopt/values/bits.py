"""Pack numbers of few bits into bytes: number `i` of `width` bits takes bits `i width` to `(i + 1) width - 1`.

Bits fill a byte from the lowest up. Eight numbers take exactly `width` bytes, so that eight of them are one word of at
most 64 bits, and packing is eight shifts over all words at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

MOST_BITS = 8
"""Bits of the widest numbers."""


def pack_numbers(numbers: Tensor, width: int) -> Tensor:
    """Pack numbers (n,), each 0 to `2^width - 1`, into (ceil(n width / 8),) uint8.

    Args:
        numbers: integers of any type, or bool. width: 1 to 8.

    >>> [f"{byte:08b}" for byte in pack_numbers(torch.tensor([1, 2, 7]), width=3).tolist()]
    ['11010001', '00000001']
    """
    if width == MOST_BITS:
        return numbers.to(torch.uint8)
    eights = pad(numbers.to(torch.uint8), (0, -len(numbers) % 8)).view(-1, 8)
    words = torch.zeros(len(eights), dtype=_word(width), device=numbers.device)
    for i in range(8):
        words |= eights[:, i].to(words.dtype) << (i * width)
    if width == 1:
        return words
    packed = torch.stack([((words >> (8 * i)) & 255).to(torch.uint8) for i in range(width)], dim=1)
    return packed.flatten()[: packed_size(len(numbers), width)]


def unpack_numbers(packed: Tensor, width: int, n: int) -> Tensor:
    """Unpack `n` numbers of `width` bits, (n,) uint8.

    Raises:
        ValueError: `packed` has another length, or a bit is set after the last number.

    >>> unpack_numbers(torch.tensor([209, 1], dtype=torch.uint8), width=3, n=3).tolist()
    [1, 2, 7]
    """
    if packed.shape != (packed_size(n, width),):
        raise ValueError(f"{len(packed)} bytes are not {n} numbers of {width} bits.")
    if width == MOST_BITS:
        return packed.clone()
    rows = pad(packed, (0, -len(packed) % width)).view(-1, width)
    words = rows[:, 0].to(_word(width))
    for i in range(1, width):
        words |= rows[:, i].to(words.dtype) << (8 * i)
    numbers = torch.empty(len(words), 8, dtype=torch.uint8, device=packed.device)
    for i in range(8):
        numbers[:, i] = (words >> (i * width)) & (2**width - 1)
    found = numbers.view(-1)
    if bool(found[n:].any()):
        raise ValueError(f"Bits after the last of {n} numbers are set.")
    return found[:n]


def packed_size(n: int, width: int) -> int:
    """Count the bytes of `n` packed numbers of `width` bits.

    >>> packed_size(3, 3)
    2
    """
    return -(-n * width // 8)


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a boolean tensor of any shape into bytes, eight entries each, the first in the lowest bit.

    >>> pack_bits(torch.tensor([True, False, True]))
    tensor([5], dtype=torch.uint8)
    """
    return pack_numbers(mask.flatten(), 1)


def unpack_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Unpack what `pack_bits` made of a tensor of this `shape`; `ValueError` where it is not as long.

    >>> unpack_bits(torch.tensor([5], dtype=torch.uint8), (3,))
    tensor([ True, False,  True])
    """
    return unpack_numbers(packed, 1, torch.Size(shape).numel()).bool().view(*shape)


def _word(width: int) -> torch.dtype:
    """Choose the type that holds eight numbers of `width` bits; a sign bit among them does no harm."""
    return torch.uint8 if width == 1 else torch.int64
