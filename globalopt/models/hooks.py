"""Replace the forward passes of modules while a context is open."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def stand_ins(
    blocks: Sequence[nn.Module] | nn.ModuleList, stand_in: Callable[[int], Callable[..., Any]]
) -> Iterator[None]:
    """Replace `forward` of `blocks[k]` by `stand_in(k)` while the context is open; other attributes stay readable.

    >>> import torch
    >>> block = nn.Linear(2, 2)
    >>> with stand_ins([block], lambda index: lambda x: x + 1):
    ...     block(torch.zeros(2))
    tensor([1., 1.])
    """
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for index, block in enumerate(blocks):
            block.forward = stand_in(index)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = forward
