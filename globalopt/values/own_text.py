"""Hold the text that a dense model wrote for its own calibration, as token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

NAME = "self"
"""Name of this text among those that `--calibration` takes."""


@dataclass(frozen=True, eq=False)
class OwnText:
    """Hold sequences that a model wrote, each a window of one split.

    Args:
        windows: (n, seqlen) int64 token ids, those of the first split first.
        counts: number of sequences of every split by its name, in order; they add up to n.
        prefix: tokens with which every sequence begins.
        seed: of the sampling.
        begin: tokens that the model read before a sequence and that are not kept in it.
        prompts: name, hash and number of the prompts that were gone on with, in JSON values; None without prompts.
    Raises:
        ValueError: the counts do not add up to the sequences.

    >>> import torch
    >>> text = OwnText(torch.arange(12).view(4, 3), {"calibration": 3, "test": 1}, prefix=(), seed=0)
    >>> text.seqlen, text.record()["written"]["sequences"]
    (3, 4)
    """

    windows: Tensor
    counts: Mapping[str, int]
    prefix: tuple[int, ...]
    seed: int
    begin: tuple[int, ...] = ()
    prompts: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.windows.dim() != 2 or sum(self.counts.values()) != len(self.windows):
            raise ValueError(f"{tuple(self.windows.shape)} sequences for counts {dict(self.counts)}")

    @property
    def seqlen(self) -> int:
        """Return the number of tokens of a sequence."""
        return self.windows.shape[1]

    @cached_property
    def sha256(self) -> str:
        """Hash the token ids, row after row, as little-endian 64-bit integers."""
        return hashlib.sha256(self.windows.contiguous().numpy().astype("<i8").tobytes()).hexdigest()

    def record(self) -> dict[str, Any]:
        """Describe how the text was written, in JSON values."""
        prompts = None if self.prompts is None else dict(self.prompts)
        written = {"seed": self.seed, "sequences": len(self.windows), "begin": list(self.begin), "prompts": prompts}
        return {"written": written}
