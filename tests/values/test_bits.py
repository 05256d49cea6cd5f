"""Numbers of few bits are packed as they are written down, and come back."""

from __future__ import annotations

import pytest
import torch

from globalopt.values.bits import MOST_BITS, pack_bits, pack_numbers, packed_size, unpack_bits, unpack_numbers


def numbers(n: int, width: int) -> torch.Tensor:
    return torch.randint(0, 2**width, (n,), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)


def written_down(values: list[int], width: int) -> list[int]:
    """The bytes, from the bits one by one."""
    bits = [value >> place & 1 for value in values for place in range(width)]
    return [sum(bit << place for place, bit in enumerate(bits[i : i + 8])) for i in range(0, len(bits), 8)]


@pytest.mark.parametrize("width", range(1, MOST_BITS + 1))
@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 63, 1000])
def test_numbers_are_packed_from_the_lowest_bit_up_and_come_back(n, width):
    found = pack_numbers(numbers(n, width), width)
    assert found.tolist() == written_down(numbers(n, width).tolist(), width)
    assert len(found) == packed_size(n, width)
    assert torch.equal(unpack_numbers(found, width, n), numbers(n, width))


@pytest.mark.parametrize("width", range(1, MOST_BITS + 1))
def test_another_length_and_bits_after_the_last_number_are_refused(width):
    packed = pack_numbers(numbers(13, width), width)
    for wrong in (packed[:-1], torch.cat([packed, packed[:1]])):
        with pytest.raises(ValueError, match="bytes are not 13 numbers"):
            unpack_numbers(wrong, width, 13)
    if width < MOST_BITS:
        broken = packed.clone()
        broken[-1] |= 128
        with pytest.raises(ValueError, match="after the last"):
            unpack_numbers(broken, width, 13)


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (8,), (9,), (3, 5), (4, 8)])
def test_bits_keep_their_shape(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    assert torch.equal(unpack_bits(pack_bits(mask), shape), mask)
