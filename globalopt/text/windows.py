"""Hold the windows of a split, and say where they are from; four splits hold no token twice.

The windows of a split lie inside one region of a text's tokens, and `Splits` refuses regions that overlap, so that
nothing can be fitted, chosen and measured on the same tokens.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from globalopt.errors import CalibrationError


@dataclass(frozen=True, eq=False)
class Split:
    """Hold the token windows of one purpose.

    Args:
        name: "calibration", "selection", "validation" or "test".
        windows: (n, seqlen) int64 token ids.
        starts: where what each window has of the text starts in its token sequence.
        region: the tokens `[first, end)` of the text that this split may use.
        source, text_sha256: the text's spec and hash.
        special_tokens: how many the tokenizer added to the whole text.
        seed: of random windows; None for consecutive ones.
        prefix: tokens, such as a BOS, with which every window begins, in front of `seqlen - len(prefix)` tokens of the
            text. They are given, never predicted.
        details: how the text itself was made, in JSON values, where the program made it.
        parts: weight and windows of every part of a mixture, of which `windows` are made; its text is then that of
            its windows, one after the other.
    Raises:
        CalibrationError: the windows are not (n, seqlen) int64 of at least two tokens, or one lies outside the region.

    >>> windows = torch.arange(8).view(2, 4)
    >>> split = Split("test", windows, (0, 4), region=(0, 9), source="a.txt", text_sha256="9f2c", special_tokens=0)
    >>> split.seqlen, split.overlapping
    (4, False)
    """

    name: str
    windows: Tensor
    starts: tuple[int, ...]
    region: tuple[int, int]
    source: str
    text_sha256: str
    special_tokens: int
    seed: int | None = None
    prefix: tuple[int, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[tuple[float, Split], ...] = ()

    def __post_init__(self) -> None:
        if self.windows.dim() != 2 or self.windows.dtype != torch.int64 or len(self.starts) != len(self.windows):
            raise CalibrationError(
                f"Split {self.name}: windows must be (n, seqlen) int64 with n starts; got {self.windows.dtype} "
                f"{tuple(self.windows.shape)} and {len(self.starts)} starts."
            )
        if min(self.windows.shape) < 1 or self.seqlen < 2 or self.body < 1:
            raise CalibrationError(f"Split {self.name}: {tuple(self.windows.shape)} windows predict no token.")
        first, end = self.region
        if min(self.starts) < first or max(self.starts) + self.body > end:
            raise CalibrationError(f"Split {self.name}: a window lies outside of its tokens {first} to {end}.")

    @property
    def seqlen(self) -> int:
        """Return the number of tokens of a window."""
        return self.windows.shape[1]

    @property
    def body(self) -> int:
        """Return the number of tokens of the text in a window."""
        return self.seqlen - len(self.prefix)

    @property
    def given(self) -> int:
        """Return the number of first tokens of a window that are not predicted: the prefix, or one token."""
        return max(1, len(self.prefix))

    @property
    def of_one_text(self) -> tuple[Split, ...]:
        """Return the windows of every text apart: of a mixture its parts, else the split itself."""
        return tuple(split for _, split in self.parts) or (self,)

    @property
    def overlapping(self) -> bool:
        """Tell whether two windows share a token."""
        if self.parts:
            return any(split.overlapping for _, split in self.parts)
        ordered = sorted(self.starts)
        return any(b - a < self.body for a, b in itertools.pairwise(ordered))

    @cached_property
    def sha256(self) -> str:
        """Hash the token ids, row after row, as little-endian 64-bit integers."""
        return hashlib.sha256(self.windows.contiguous().numpy().astype("<i8").tobytes()).hexdigest()

    def record(self) -> dict[str, Any]:
        """Describe how the split was made, in JSON values; the starts of consecutive windows follow from the region."""
        found = {
            "source": self.source,
            "text_sha256": self.text_sha256,
            "sha256": self.sha256,
            "windows": len(self.windows),
            "seqlen": self.seqlen,
            "region": list(self.region),
            "special_tokens": self.special_tokens,
            "prefix": list(self.prefix),
            "seed": self.seed,
            "starts": None if self.seed is None else list(self.starts),
            "overlapping": self.overlapping,
            **self.details,
        }
        if self.parts:
            # The windows of a mixture have their places in the texts of its parts alone.
            found["starts"] = None
            found["parts"] = [{"weight": weight, **split.record()} for weight, split in self.parts]
        return found


@dataclass(frozen=True)
class Splits:
    """Hold four disjoint splits: one to fit on, one to search on, one to compare variants on, and one only to report.

    Raises:
        CalibrationError: two splits share tokens of the same text.

    >>> def split(name, first):
    ...     windows, starts = torch.arange(8).view(2, 4), (first, first + 4)
    ...     return Split(name, windows, starts, (first, first + 8), "a.txt", "9f2c", special_tokens=0)
    >>> Splits(split("calibration", 0), split("selection", 8), split("validation", 16), split("test", 20))
    Traceback (most recent call last):
        ...
    globalopt.errors.CalibrationError: The validation and test splits share tokens of a.txt; give different texts.
    """

    calibration: Split
    selection: Split
    validation: Split
    test: Split

    def __post_init__(self) -> None:
        for first, second in itertools.combinations(self, 2):
            for one, other in itertools.product(first.of_one_text, second.of_one_text):
                shared = one.text_sha256 == other.text_sha256
                if shared and one.region[0] < other.region[1] and other.region[0] < one.region[1]:
                    raise CalibrationError(
                        f"The {first.name} and {second.name} splits share tokens of {one.source}; give different texts."
                    )

    def __iter__(self) -> Iterator[Split]:
        """Iterate over the four splits."""
        return iter((self.calibration, self.selection, self.validation, self.test))

    def record(self) -> dict[str, dict[str, Any]]:
        """Describe how every split was made, in JSON values by name."""
        return {split.name: split.record() for split in self}
