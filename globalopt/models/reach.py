"""Find the linear layers of the decoder blocks that the loss does not reach through their output.

The weight of such a layer may matter, but no gradient and no output of the layer says how much: an index that is
computed without gradients only chooses what attention looks at, and a fused kernel reads a weight without calling its
layer. One short forward pass shows which layers these are, block by block.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from globalopt.models.streaming import LazyBlocks


@torch.no_grad()
def product_of(module: nn.Module, x: Tensor, output: Any) -> Tensor | None:
    """Choose the tensor of a layer's output that is the product of its weight and `x`; None where none is.

    A layer with a forward pass of its own may return scores beside the product, or in its place.

    >>> layer, x = nn.Linear(3, 2), torch.ones(1, 3)
    >>> product_of(layer, x, layer(x)).shape
    torch.Size([1, 2])
    """
    if type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return output
    kind = Conv1D if isinstance(module, Conv1D) else nn.Linear
    product = kind.forward(module, x)  # pyright: ignore[reportArgumentType]
    for y in output if isinstance(output, tuple | list) else (output,):
        if isinstance(y, Tensor) and y.shape == product.shape and torch.allclose(y, product, rtol=1e-2, atol=1e-3):
            return y
    return None


@contextmanager
def unreached(
    blocks: Sequence[nn.Module], found: Sequence[tuple[int, str, nn.Linear | Conv1D]], lazy: LazyBlocks | None = None
) -> Iterator[set[str]]:
    """Collect the names of the layers that their block's output does not depend on, as the model runs in the context.

    A layer counts if its product has no gradient (it was computed without, or only chose indices), if it returns no
    product, or if its weight was used without calling it. A layer that was not used at all does not count: it may be an
    expert that none of these tokens was routed to. Nor does any layer of a block that runs without gradients as a
    whole. Values are those of a pass without gradients; memory is needed for the graph of one block.

    Args:
        blocks: the decoder blocks.
        found: index of the block, name and module of every layer.
        lazy: reader of the blocks, if the model is lazy.

    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.used, self.index = nn.Linear(4, 4), nn.Linear(4, 4)
    ...     def forward(self, x):
    ...         return self.used(x) + self.index(x).argmax(-1, keepdim=True)
    >>> block = Block()
    >>> with torch.no_grad(), unreached([block], [(0, "used", block.used), (0, "index", block.index)]) as names:
    ...     _ = block(torch.ones(1, 2, 4))
    >>> names
    {'index'}
    """
    names: set[str] = set()
    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            modules = {name: module for owner, name, module in found if owner == index}
            watch = _Watch(index, modules, lazy, names)
            stack.callback(watch.end)
            stack.callback(block.register_forward_pre_hook(watch.enter, with_kwargs=True).remove)
            # Always, so that a block that raises leaves no gradients enabled behind.
            stack.callback(block.register_forward_hook(watch.leave).remove)
            for name, module in modules.items():
                stack.callback(module.register_forward_hook(watch.listen(name), with_kwargs=True).remove)
        yield names


class _Watch:
    """Run one block with gradients, cut off from the blocks before and after it, and note what its output reaches."""

    def __init__(
        self, index: int, modules: dict[str, nn.Linear | Conv1D], lazy: LazyBlocks | None, names: set[str]
    ) -> None:
        self.index = index
        self.modules = modules
        self.lazy = lazy
        self.names = names
        self.called: set[str] = set()
        self.products: defaultdict[str, list[Tensor | None]] = defaultdict(list)
        self.inside = ExitStack()

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record gradients from the hidden states and from the weights of the layers on."""
        if self.lazy is not None:
            self.inside.enter_context(self.lazy.open(self.index))
        for layer in self.modules.values():
            if not layer.weight.requires_grad:
                weight = layer.weight
                weight.requires_grad_()
                self.inside.callback(weight.requires_grad_, False)
        self.inside.enter_context(torch.enable_grad())
        if args and isinstance(args[0], Tensor):
            return (_cut_off(args[0]), *args[1:]), kwargs
        name = "hidden_states"
        if isinstance(kwargs.get(name), Tensor):
            return args, {**kwargs, name: _cut_off(kwargs[name])}
        return None

    def listen(self, name: str) -> Any:
        """Make the hook that notes the products of one layer."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            self.called.add(name)
            # An expert that no token was sent to may be called with nothing.
            if x.numel():
                y = product_of(module, x, output)
                self.products[name].append(y if y is not None and y.requires_grad else None)

        return hook

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Note the layers that no gradient of the output reaches, and cut the output off."""
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            self._note(hidden)
        self.end()
        if isinstance(output, tuple):
            return tuple(x.detach() if isinstance(x, Tensor) else x for x in output)
        return output.detach() if isinstance(output, Tensor) else output

    def _note(self, hidden: Tensor) -> None:
        made = [(name, y) for name, calls in self.products.items() for y in calls if y is not None]
        used = [(name, layer.weight) for name, layer in self.modules.items() if name not in self.called]
        tensors = [tensor for _, tensor in (*made, *used)]
        try:
            gradients = torch.autograd.grad(hidden, tensors, torch.ones_like(hidden), allow_unused=True)
        except RuntimeError:
            # An operation without derivative: the sweep that needs one says so.
            return
        arrived = {id(tensor) for tensor, gradient in zip(tensors, gradients, strict=True) if gradient is not None}
        reached = {name for name, y in made if id(y) in arrived}
        self.names.update(self.products.keys() - reached)
        self.names.update(name for name, weight in used if id(weight) in arrived)

    def end(self) -> None:
        """Forget the graph, and put back weights and gradient mode as they were."""
        self.called.clear()
        self.products.clear()
        self.inside.close()


def _cut_off(hidden: Tensor) -> Tensor:
    """Copy hidden states to a tensor with gradients that a block may change in place."""
    with torch.enable_grad():
        return hidden.detach().requires_grad_().clone()
