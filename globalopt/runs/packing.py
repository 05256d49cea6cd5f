"""Pack decompositions and symmetric matrices into fewer bytes, and unpack them to the same bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import overload

import torch
from torch import Tensor

from globalopt.values.bits import pack_bits, unpack_bits
from globalopt.values.decomposition import Decomposition
from globalopt.values.storage import Scales, Storage


def pack_upper(matrix: Tensor) -> Tensor:
    """Pack what is above the diagonal of a symmetric matrix (n, n), row after row.

    >>> pack_upper(torch.tensor([[1, 2], [2, 3]]))
    tensor([2])
    """
    return torch.cat([row[i + 1 :] for i, row in enumerate(matrix)])


def unpack_upper(packed: Tensor, n: int) -> Tensor:
    """Unpack what `pack_upper` made of a symmetric matrix (n, n); its diagonal is zero.

    >>> unpack_upper(torch.tensor([2]), 2)
    tensor([[0, 2],
            [2, 0]])
    """
    if n * (n - 1) // 2 != len(packed):
        raise ValueError(f"{len(packed)} entries are not the upper triangle of a matrix of side {n}.")
    matrix = packed.new_zeros(n, n)
    for i, row in enumerate(packed.split(list(range(n - 1, -1, -1)))):
        matrix[i, i + 1 :] = row
    return matrix + matrix.mT


def pack(value: Decomposition) -> dict[str, Tensor]:
    """Pack a decomposition: of `S` its nonzeros and one bit per entry, of a sign plane one bit per entry.

    An `S` without zeros, or of zeros alone, needs no bits. `plus` is what a set bit of the signs stands for, in the
    dtype of their plane. `unpack` gives back the same bits, for which a negative zero of `S` counts as a nonzero.

    >>> pack(Decomposition(torch.eye(2), torch.ones(2, 0), torch.ones(0, 2)))["kept"]
    tensor([9], dtype=torch.uint8)
    """
    kept = (value.S != 0) | value.S.signbit()
    parts = {"values": value.S[kept], "U": value.U, "V": value.V}
    if 0 < len(parts["values"]) < kept.numel():
        parts["kept"] = pack_bits(kept)
    if value.signs is not None:
        parts |= {"signs": pack_bits(value.signs > 0), "plus": value.signs.new_ones(1)}
    if value.scales is not None:
        storage, *scales = value.scales.storage, value.scales.S, value.scales.U, value.scales.V
        parts["bits"] = torch.tensor([storage.values, storage.factors], dtype=torch.uint8)
        parts |= {f"scales_{part}": x for part, x in zip("SUV", scales, strict=True) if x is not None}
    return parts


def unpack(tensors: Mapping[str, Tensor], end: str = "") -> Decomposition:
    """Unpack what `pack` made.

    Args:
        end: of the name in `tensors` of every part.
    Raises:
        KeyError: a part is missing, with its name.
        ValueError: the parts disagree.

    >>> unpack(pack(Decomposition(torch.eye(2), torch.zeros(2, 0), torch.zeros(0, 2)))).S
    tensor([[1., 0.],
            [0., 1.]])
    """
    values, U, V = (tensors[part + end] for part in ("values", "U", "V"))
    shape = (len(U), V.shape[1])
    if f"kept{end}" in tensors or 0 < len(values) < len(U) * V.shape[1]:
        kept = unpack_bits(tensors[f"kept{end}"], shape)
    else:
        kept = torch.full(shape, len(values) > 0)
    if int(kept.sum()) != len(values):
        raise ValueError(f"There are {len(values)} values for {int(kept.sum())} entries.")
    # An assignment through the mask takes 70 times as long.
    S = values.new_zeros(shape).masked_scatter_(kept, values)
    scales = None
    if f"bits{end}" in tensors:
        storage = Storage(*tensors[f"bits{end}"].tolist())
        scales = Scales(storage, *(tensors.get(f"scales_{part}{end}") for part in "SUV"))
    if f"signs{end}" not in tensors:
        return Decomposition(S, U, V, scales=scales)
    plus = tensors[f"plus{end}"]
    return Decomposition(S, U, V, torch.where(unpack_bits(tensors[f"signs{end}"], shape), plus, -plus))


class PackedSolutions(Sequence[Decomposition]):
    """Unpack a decomposition when it is asked for: most readers of a layer's anchor solutions want one of five.

    Args:
        tensors: what `pack` made of each, its parts under `part.number`.
        count: how many there are.
    Raises:
        KeyError: a part is missing, with its name.
        ValueError: the bits of a support are not those of its entries.

    >>> parts = pack(Decomposition(torch.eye(2), torch.zeros(2, 0), torch.zeros(0, 2)))
    >>> PackedSolutions({f"{part}.0": tensor for part, tensor in parts.items()}, 1)[0].nnz
    2
    """

    def __init__(self, tensors: Mapping[str, Tensor], count: int) -> None:
        for i in range(count):
            values, U, V = (tensors[f"{part}.{i}"] for part in ("values", "U", "V"))
            entries = len(U) * V.shape[1]
            if 0 < len(values) < entries and len(tensors[f"kept.{i}"]) != -(-entries // 8):
                raise ValueError(f"There are {len(tensors[f'kept.{i}'])} bytes of bits for {entries} entries.")
        self._tensors = tensors
        self._count = count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Decomposition: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Decomposition, ...]: ...
    def __getitem__(self, index: int | slice) -> Decomposition | tuple[Decomposition, ...]:
        numbers = range(self._count)[index]
        if isinstance(numbers, range):
            return tuple(unpack(self._tensors, f".{i}") for i in numbers)
        return unpack(self._tensors, f".{numbers}")
