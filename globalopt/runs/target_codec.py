"""Encode a target as a list of JSON words, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from globalopt.values.budget import Target
from globalopt.values.layer import NM
from globalopt.values.storage import Storage


def encode_target(target: Target) -> list[Any]:
    """Encode a target as a JSON list; a sign plane is a fourth entry, or a storage in few bits.

    >>> encode_target(Target(2, 10, NM(2, 4)))
    [2, 10, '2:4']
    """
    words: list[Any] = [target.rank, target.nnz, str(target.pattern) if target.pattern else None]
    if not target.storage.plain:
        return [*words, str(target.storage)]
    return [*words, True] if target.signs else words


def decode_target(words: Sequence[Any]) -> Target:
    """Decode what `encode_target` made.

    >>> decode_target([2, 10, None])
    Target(rank=2, nnz=10)
    >>> decode_target([2, 10, None, "4/8"])
    Target(rank=2, nnz=10, storage=4/8)
    """
    rank, nnz, pattern, *more = words
    made = Target(int(rank), int(nnz), NM.parse(pattern) if pattern else None)
    if not more:
        return made
    if isinstance(more[0], str):
        return replace(made, storage=Storage.parse(more[0]))
    return replace(made, signs=bool(more[0]))
