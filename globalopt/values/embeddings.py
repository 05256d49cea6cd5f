"""Describe the embedding matrices of a model, in how many bits they are stored, and what they leave of a budget.

The token embedding and, unless it is the same matrix, the head are stored as they are (16 bits) or as codes of 8 or 6
bits. The numbers of a matrix (rows, width) are grouped in row-major order, as those of an `S` that keeps everything
(`globalopt.values.storage`), so that in a model whose width is a multiple of 64 no group spans two rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from globalopt.errors import BudgetError, UsageError
from globalopt.values.budget import BYTES_PER_VALUE, Budget, limit_of
from globalopt.values.layer import LayerSpec
from globalopt.values.storage import number_bytes

EMBEDDING_BITS = (16, 8, 6)
"""Bits in which embeddings can be stored, most first; 16 is the model's own type."""

AUTO = "auto"
"""The word for a choice among `EMBEDDING_BITS`, for each matrix by itself."""

WORDS = (*map(str, EMBEDDING_BITS), AUTO)
"""What the option `--embeddings` takes."""


@dataclass(frozen=True, slots=True)
class Embedding:
    """Describe one embedding matrix: the token embedding, or a head with a matrix of its own.

    Args:
        name: module path.
        rows: of the matrix, one per token. width: entries of a row.
        bits: of a stored number.
        loss: nats per token that the model loses with this matrix alone in these bits; None where it was not measured.
    Raises:
        UsageError: the bits are none of `EMBEDDING_BITS`.

    >>> head = Embedding("lm_head", rows=100, width=64, bits=8)
    >>> head.bytes, head.dense_bytes  # codes of a byte, and 100 scales
    (6600, 12800)
    """

    name: str
    rows: int
    width: int
    bits: int = 16
    loss: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits not in EMBEDDING_BITS:
            known = ", ".join(map(str, EMBEDDING_BITS))
            raise UsageError(f"Embeddings are stored in {known} bits; got {self.bits!r} for {self.name}.")

    @property
    def numel(self) -> int:
        """Count the numbers of the matrix."""
        return self.rows * self.width

    @property
    def bytes(self) -> int:
        """Count the bytes of the stored matrix: codes, scales of the groups, and the padding of both."""
        return number_bytes(self.numel, self.bits)

    @property
    def dense_bytes(self) -> int:
        """Count the bytes of the matrix in 16 bits."""
        return BYTES_PER_VALUE * self.numel

    def stored_in(self, bits: int, loss: float | None = None) -> Embedding:
        """Return the same matrix in other bits."""
        return replace(self, bits=bits, loss=loss)


@dataclass(frozen=True, eq=False)
class CodedMatrix:
    """Hold a matrix (rows, width) as codes of few bits.

    Args:
        codes: (ceil(rows width bits / 8),) uint8, packed (`globalopt.values.bits`).
        scales: (ceil(rows width / 64),) bfloat16.
        rows, width, bits: of the matrix.

    >>> import torch
    >>> codes, scales = torch.zeros(6, dtype=torch.uint8), torch.ones(1, dtype=torch.bfloat16)
    >>> CodedMatrix(codes, scales, rows=2, width=4, bits=6).nbytes
    8
    """

    codes: Tensor
    scales: Tensor
    rows: int
    width: int
    bits: int

    @property
    def nbytes(self) -> int:
        """Count the bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes


def stored_bytes(embeddings: Iterable[Embedding]) -> int:
    """Sum the bytes of embeddings as they are stored.

    >>> stored_bytes([Embedding("lm_head", 100, 64, bits=8)])
    6600
    """
    return sum(each.bytes for each in embeddings)


def dense_bytes(embeddings: Iterable[Embedding]) -> int:
    """Sum the bytes of embeddings in 16 bits.

    >>> dense_bytes([Embedding("lm_head", 100, 64, bits=8)])
    12800
    """
    return sum(each.dense_bytes for each in embeddings)


def measured(embeddings: Iterable[Embedding]) -> float:
    """Sum the measured losses of embeddings; one that was not measured counts nothing.

    >>> measured([Embedding("embed", 8, 8, 8, loss=0.25), Embedding("head", 8, 8, 6)])
    0.25
    """
    return math.fsum(each.loss or 0.0 for each in embeddings)


def budget_beside(kept: float, specs: Sequence[LayerSpec], embeddings: Sequence[Embedding], least: int = 1) -> Budget:
    """Make the budget of the layers that embeddings leave: `kept` of the bytes of both in 16 bits, less the embeddings.

    Args:
        kept: fraction kept of layers and embeddings together, in (0, 1].
        embeddings: as they are stored.
        least: bytes that the layers need.
    Raises:
        BudgetError: less than `least` is left for the layers.
        UsageError: `kept` is not in (0, 1].

    >>> specs = [LayerSpec("up", 0, "in", "up", d_out=64, d_in=64)]
    >>> budget_beside(0.6, specs, [Embedding("embed", 64, 64, bits=8)])
    Budget(limit=5606, total=8192, accounting='bytes')
    >>> budget_beside(0.2, specs, [Embedding("embed", 64, 64, bits=8)])
    Traceback (most recent call last):
    globalopt.errors.BudgetError: A budget of 0.2 is 3276 bytes, and the embeddings take 4224 of them in 8 bits: ...
    """
    whole = Budget.fraction(kept, specs, "bytes")
    total = whole.total + dense_bytes(embeddings)
    limit, spent = limit_of(kept, total), stored_bytes(embeddings)
    left = limit - spent
    if left < max(1, least):
        bits = "/".join(dict.fromkeys(str(each.bits) for each in embeddings))
        enough = math.ceil((spent + max(1, least)) / total * 1e4) / 1e4
        fewer = ", or store the embeddings in fewer bits" if any(each.bits > 6 for each in embeddings) else ""
        raise BudgetError(
            f"A budget of {kept:g} is {limit} bytes, and the embeddings take {spent} of them in {bits} bits: "
            f"{max(0, left)} are left for the layers, which need {max(1, least)}. Raise --budget to at least "
            f"{enough:g}{fewer}."
        )
    return Budget(min(left, whole.total), whole.total, "bytes")
