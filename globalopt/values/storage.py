"""Say in how many bits the numbers of a compressed layer are stored, and count their bytes.

The values of `S` and the entries of `U` and `V` are stored in 16 bits, or as codes of few bits. Codes come in groups of
64 consecutive numbers, which lie on one of two grids. Where the scale of a group is positive, they are half-integer
multiples of it (mid-rise), and where it is negative, integer ones (mid-tread):

    x = +-(n + 1/2) scale   or   x = +-n |scale|,   n = 0, ..., 2^(bits-1) - 1,

where `n = 0` on the second grid stands for 2^-10, so that no number is zero: what is not kept costs an index, not a
code, and a kept value is never lost. A scale takes 16 bits (bfloat16). The numbers of `S` are grouped in row-major
order of its nonzeros, those of `U` by its columns, those of `V` by its rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from globalopt.errors import UsageError

BITS = (16, 8, 6, 5, 4, 3)
"""Bits in which numbers can be stored; 16 is the model's own type."""

GROUP = 64
"""Numbers that share a scale."""

SCALE_BYTES = 2


@dataclass(frozen=True, slots=True, order=True)
class Storage:
    """Give the bits of the values of `S` and of the entries of the factors `U` and `V`.

    Args:
        values: bits of a value of `S`.
        factors: bits of an entry of `U` or `V`.
    Raises:
        UsageError: the bits are none of `BITS`.

    >>> Storage.parse("4/8"), str(Storage(8, 8))
    (Storage(values=4, factors=8), '8')
    >>> Storage(4, 8).value_bytes(1000)  # codes of half a byte, and 16 scales
    532
    >>> Storage().value_bytes(1000), Storage(8, 8).factor_bytes(2, d_out=64, d_in=128)
    (2000, 396)
    """

    values: int = 16
    factors: int = 16

    def __post_init__(self) -> None:
        for bits in (self.values, self.factors):
            if isinstance(bits, bool) or bits not in BITS:
                raise UsageError(f"Numbers are stored in {', '.join(map(str, BITS))} bits; got {bits!r}.")

    @classmethod
    def parse(cls, text: str) -> Storage:
        """Parse "8", or "4/8" for values and factors; `UsageError` if it is something else."""
        words = text.split("/")
        if len(words) > 2 or not all(word.isdecimal() for word in words):
            raise UsageError(f'A storage is written as "8", or as "4/8" for values and factors; got {text!r}.')
        return cls(int(words[0]), int(words[-1]))

    def __str__(self) -> str:
        return str(self.values) if self.values == self.factors else f"{self.values}/{self.factors}"

    @property
    def plain(self) -> bool:
        """Tell whether all numbers are stored in 16 bits, so that nothing is rounded to a grid."""
        return self == PLAIN

    def value_bytes(self, nnz: Any) -> Any:
        """Count the bytes of `nnz` values of `S`, without their index; an integer or an array of integers."""
        return number_bytes(nnz, self.values)

    def factor_bytes(self, rank: Any, d_out: Any, d_in: Any) -> Any:
        """Count the bytes of `U` (d_out, rank) and `V` (rank, d_in), with groups of their own; integers or arrays."""
        return number_bytes(rank * d_out, self.factors) + number_bytes(rank * d_in, self.factors)


def code_bytes(count: Any, bits: Any) -> Any:
    """Count the bytes of the codes of `count` numbers of `bits` each, or of the numbers themselves in 16 bits.

    Args:
        count, bits: integers, or arrays of integers; the bits are of `BITS`.

    >>> code_bytes(65, 3), code_bytes(65, 16)  # 195 bits are 25 bytes
    (25, 130)
    """
    return -(-count * bits // 8)


def scale_bytes(count: Any, bits: Any) -> Any:
    """Count the bytes of the scales of `count` numbers, one for every group; none in 16 bits.

    Args:
        count, bits: integers, or arrays of integers; the bits are of `BITS`.

    >>> scale_bytes(65, 3), scale_bytes(65, 16)
    (4, 0)
    """
    return (bits < 16) * SCALE_BYTES * -(-count // GROUP)


def number_bytes(count: Any, bits: Any) -> Any:
    """Count the bytes of `count` numbers of `bits` each, with the scales of their groups.

    Args:
        count, bits: integers, or arrays of integers; the bits are of `BITS`.

    >>> number_bytes(65, 3), number_bytes(65, 16)
    (29, 130)
    """
    return code_bytes(count, bits) + scale_bytes(count, bits)


PLAIN = Storage()
"""16 bits for every number."""


@dataclass(frozen=True, eq=False)
class Scales:
    """Hold the scales of the grids on which the numbers of a decomposition lie; None for parts in 16 bits.

    Args:
        storage: of the decomposition.
        S: (groups,) of the nonzeros of `S`. U: of the entries of `Uᵀ`. V: of those of `V`.

    >>> scales = Scales(Storage(8, 16), torch.ones(2), None, None)
    >>> scales.to(torch.device("cpu")).storage.values
    8
    """

    storage: Storage
    S: Tensor | None
    U: Tensor | None
    V: Tensor | None

    def to(self, device: torch.device) -> Scales:
        """Copy the scales to `device`."""
        return Scales(self.storage, *(None if x is None else x.to(device) for x in (self.S, self.U, self.V)))
