"""Describe packed layers: which tensors they consist of, in which types and sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from globalopt.errors import ArtefactError
from globalopt.export.codes import SCALE_BITS
from globalopt.export.packing import EMPTY, Layout, layout
from globalopt.values.bits import packed_size
from globalopt.values.decomposition import Decomposition
from globalopt.values.layer import NM
from globalopt.values.storage import GROUP, PLAIN, Storage

SCALES = "_scales"
"""End of the name of the scales of a part."""


@dataclass(frozen=True)
class Shape:
    """Describe a packed layer beside its tensors, as it stands in the config of a checkpoint.

    Args:
        sparse: how `S` is packed.
        rank: of `L`.
        signs: whether `L` is multiplied by a plane of signs.
        storage: bits of the values of `S` and of the factors; below 16 they are codes with scales.
    Raises:
        ArtefactError: there is no such layer.

    >>> shape = Shape(Layout(d_out=8, d_in=16, form="2:4", values=64), rank=2, signs=False)
    >>> shape.tensors()
    {'weight': (64,), 'support': (16,), 'U': (8, 2), 'V': (2, 16)}
    >>> shape.bytes(per_value=2)
    240
    >>> Shape(shape.sparse, rank=2, signs=False, storage=Storage(4, 16)).tensors()
    {'weight': (32,), 'weight_scales': (1,), 'support': (16,), 'U': (8, 2), 'V': (2, 16)}
    """

    sparse: Layout
    rank: int
    signs: bool
    storage: Storage = PLAIN

    def __post_init__(self) -> None:
        whole = isinstance(self.rank, int) and not isinstance(self.rank, bool)
        if not whole or not 0 <= self.rank <= min(self.sparse.d_out, self.sparse.d_in):
            raise ArtefactError(f"Rank {self.rank} is none of a {self.sparse.d_out} x {self.sparse.d_in} matrix.")
        if not isinstance(self.signs, bool) or (self.signs and not (self.rank and self.storage.plain)):
            raise ArtefactError(f"Signs {self.signs} do not go with rank {self.rank} in {self.storage} bits.")
        if self.sparse.form == EMPTY and self.sparse.values and self.coded("weight"):
            raise ArtefactError(f"An empty matrix has no values to store in {self.storage.values} bits.")

    def record(self) -> dict[str, Any]:
        """Return the description as JSON values; a storage of 16 bits is not named."""
        how = self.sparse
        shape = {"d_out": how.d_out, "d_in": how.d_in, "form": how.form, "values": how.values}
        stored = {} if self.storage.plain else {"storage": str(self.storage)}
        return {**shape, "rank": self.rank, "signs": self.signs, **stored}

    @classmethod
    def parse(cls, record: Any) -> Shape:
        """Parse what `record` returns; `ArtefactError` if it is something else."""
        try:
            how = Layout(record["d_out"], record["d_in"], record["form"], record["values"])
            storage = Storage.parse(record["storage"]) if "storage" in record else PLAIN
            return cls(how, record["rank"], record["signs"], storage)
        except (KeyError, TypeError, IndexError, AttributeError, ValueError):
            raise ArtefactError(f"{str(record)[:120]} does not describe a packed layer.") from None

    @property
    def version(self) -> int:
        """The first version of the format that has such layers."""
        return 1 if self.storage.plain and self.sparse.values else 2

    def coded(self, part: str) -> int | None:
        """Return the bits of the codes of a part ("weight", "U" or "V"); None where it is not stored as codes."""
        bits = {"weight": self.storage.values, "U": self.storage.factors, "V": self.storage.factors}.get(part, 16)
        return bits if bits < 16 else None

    def count(self, part: str) -> int:
        """Count the numbers of a part: "weight", "U" or "V"."""
        how = self.sparse
        return {"weight": how.values, "U": how.d_out * self.rank, "V": self.rank * how.d_in}[part]

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the layer's tensors by name, without the bias."""
        how = self.sparse
        found = self._part("weight", (how.values,))
        if how.support_bytes:
            found["support"] = (how.support_bytes,)
        if self.rank:
            found |= self._part("U", (how.d_out, self.rank)) | self._part("V", (self.rank, how.d_in))
        if self.signs:
            found["signs"] = (packed_size(how.numel, 1),)
        return found

    def _part(self, part: str, size: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors of a part that has numbers of the shape `size`."""
        bits, n = self.coded(part), self.count(part)
        if bits is None:
            return {part: size}
        return {part: (packed_size(n, bits),), part + SCALES: (-(-n // GROUP),)}

    def dtype(self, name: str) -> torch.dtype | None:
        """Return the type of the tensor `name`, where it is no floating-point type of the model's choice."""
        if name.endswith(SCALES):
            return SCALE_BITS
        return torch.uint8 if name in ("support", "signs") or self.coded(name) else None

    def bytes(self, per_value: int) -> int:
        """Count the bytes of the layer's tensors, with `per_value` bytes for a floating-point number."""
        types = {name: self.dtype(name) for name in self.tensors()}
        widths = {name: per_value if found is None else found.itemsize for name, found in types.items()}
        return sum(widths[name] * math.prod(size) for name, size in self.tensors().items())


def shape_of(value: Decomposition, pattern: NM | None = None) -> Shape:
    """Choose the smallest packed shape of a decomposition.

    >>> S = torch.eye(8)
    >>> shape_of(Decomposition(S, S[:, :0], S[:0])).sparse.form
    'bitmask'
    """
    sparse = layout(value.S, pattern, coded=value.storage.values < 16)
    return Shape(sparse, value.rank, value.signs is not None, value.storage)
