"""See the inputs of modules, or replace their forward passes, while a context is open."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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


@contextmanager
def input_hooks(modules: Mapping[str, nn.Module], record: Any) -> Iterator[None]:
    """Call `record(name, x)` with every input `x` of the named modules, while the context is open.

    >>> import torch
    >>> seen = []
    >>> layer = nn.Linear(3, 2)
    >>> with input_hooks({"layer": layer}, lambda name, x: seen.append((name, tuple(x.shape)))):
    ...     y = layer(torch.ones(5, 3))
    >>> seen
    [('layer', (5, 3))]
    """

    def hook(name: str) -> Any:
        """Make the hook of one module."""

        def forward_pre(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            record(name, args[0] if args else next(iter(kwargs.values())))

        return forward_pre

    with ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_pre_hook(hook(name), with_kwargs=True)
            stack.callback(handle.remove)
        yield
