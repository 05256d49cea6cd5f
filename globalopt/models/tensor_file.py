"""Write a safetensors file tensor by tensor, so that no more than one of them is made at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

TYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types of tensors by their names in safetensors files, in the order in which safetensors writes them.

Those of 8-bit floats are left out, as they are no model's own.
"""

_NAMES = {dtype: name for name, dtype in TYPES.items()}
_PLACES = {dtype: place for place, dtype in enumerate(TYPES.values())}
_ALIGNED = 8
"""Bytes of which the length of a header is a multiple."""


@dataclass(frozen=True)
class Pending:
    """Describe a tensor that is made when it is written.

    Args:
        dtype, shape: of the tensor.
        make: makes it, on any device.

    >>> Pending(torch.bfloat16, (3, 2), lambda: torch.zeros(3, 2, dtype=torch.bfloat16)).nbytes
    12
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Return the size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(path: Path, tensors: Mapping[str, Pending], metadata: Mapping[str, str]) -> None:
    """Write the file that `safetensors.torch.save_file` writes: tensors in the order of `TYPES`, then of their names.

    Args:
        metadata: of the file.
    Raises:
        OSError: the disk is full, or the file cannot be written.
        AssertionError: a tensor is not as it was described.

    >>> from safetensors.torch import load_file
    >>> write_tensors(Path("two.safetensors"), {"x": Pending(torch.int64, (2,), lambda: torch.arange(2))}, {})
    >>> load_file("two.safetensors")
    {'x': tensor([0, 1])}
    """
    order = sorted(tensors, key=lambda name: (_PLACES[tensors[name].dtype], name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        one = tensors[name]
        header[name] = {"dtype": _NAMES[one.dtype], "shape": list(one.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNED)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            # In a function of its own: the tensor is freed before the next one is made.
            file.write(_body(name, tensors[name]))


def _body(name: str, tensor: Pending) -> memoryview:
    """Make a tensor, and return its bytes."""
    made = tensor.make().detach().cpu()
    assert (made.dtype, tuple(made.shape)) == (tensor.dtype, tensor.shape), name
    return made.contiguous().reshape(-1).view(torch.uint8).numpy().data
