"""Read and replace the weights of a model's compressible layers, in memory or read block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from globalopt.errors import NumericalError, UnknownNameError, UsageError
from globalopt.models.coverage import Coverage
from globalopt.models.linear import Linear, as_linear
from globalopt.models.streaming import LazyBlocks, lazy_blocks
from globalopt.values.entries import all_finite
from globalopt.values.layer import LayerSpec


@dataclass(frozen=True, eq=False)
class ModelLayers:
    """Hold a model with its decoder blocks and their compressible layers, in model order, and read and replace weights.

    Of a lazy model (`globalopt.models.streaming`) a block is in memory only while it is `resident`; all methods work on
    both kinds of models.

    Args:
        model: the causal language model.
        blocks: its decoder blocks. blocks_path: their module path.
        specs: the compressible layers.
        coverage: how much of the model these are.
        apart: other linear layers of the blocks, which the loss does not reach; they stay dense.

    >>> from globalopt.models.finding import find_layers
    >>> from globalopt.reference.tiny import tiny_llama
    >>> layers = find_layers(tiny_llama())
    >>> spec = layers.of_block(1)[0]
    >>> spec.name, tuple(layers.weight(spec.name).shape)
    ('model.layers.1.self_attn.q_proj', (16, 16))
    >>> layers.set_weight(spec.name, torch.zeros(16, 16))
    >>> bool(layers.module(spec.name).weight.any())
    False
    """

    model: PreTrainedModel
    blocks: nn.ModuleList
    blocks_path: str
    specs: tuple[LayerSpec, ...]
    coverage: Coverage
    apart: tuple[str, ...] = ()

    @cached_property
    def _modules(self) -> Mapping[str, Linear]:
        """Look up the modules of all layers by name."""
        return {spec.name: cast("Linear", self.model.get_submodule(spec.name)) for spec in self.specs}

    def module(self, name: str) -> Linear:
        """Return the module called `name`.

        Raises:
            UnknownNameError: it is none of the layers.
        """
        if name not in self._modules:
            raise UnknownNameError("layer", name, self._modules)
        return self._modules[name]

    @cached_property
    def lazy(self) -> LazyBlocks | None:
        """Return the reader of the blocks of a lazy model; None if all of the model is in memory."""
        return lazy_blocks(self.model)

    @contextmanager
    def resident(self, index: int, device: torch.device | str | None = None) -> Iterator[None]:
        """Keep block `index` in memory, on `device`, while the context is open, and move it back afterwards.

        Args:
            index: of the block.
            device: where to; None leaves it where it is.
        """
        if self.lazy is not None:
            with self.lazy.open(index, device):
                yield
            return
        block, home = self.blocks[index], self.device_of(index)
        try:
            if device is not None:
                block.to(device)
            yield
        finally:
            if device is not None:
                block.to(home)

    def device_of(self, index: int) -> torch.device:
        """Return the device of block `index`; for a lazy model the one it is read to."""
        device = next(self.blocks[index].parameters()).device
        return self.lazy.device if self.lazy is not None and device.type == "meta" else device

    def weight(self, name: str) -> Tensor:
        """Copy a layer's weight as float32 (d_out, d_in)."""
        if self.lazy is not None:
            self.module(name)
            return self.oriented(name, self.lazy.read(f"{name}.weight")).float().contiguous()
        return as_linear(self.module(name)).to(torch.float32, copy=True).contiguous()

    def originals(self) -> Mapping[str, Tensor]:
        """Return the present weights of all layers, float32 (d_out, d_in) by name.

        For a lazy model they are not copied: the mapping reads those of the checkpoint whenever they are used.
        """
        if self.lazy is not None:
            return _Originals(self, self.lazy)
        return {spec.name: self.weight(spec.name) for spec in self.specs}

    def restore(self, name: str, originals: Mapping[str, Tensor]) -> None:
        """Put back the weight that a layer had when `originals` were taken."""
        if self.lazy is None:
            self.set_weight(name, originals[name])
        else:
            self.lazy.restore(f"{name}.weight")

    def place(self, name: str, make: Callable[[], Tensor]) -> None:
        """Replace a layer's weight by the result of `make`, (d_out, d_in), cast to the parameter's own type.

        For a lazy model, `make` is called whenever the layer's block is read, so that the weight need not be held in
        between. The errors of `make` and of `set_weight` are then raised at that time.
        """
        if self.lazy is None:
            self.set_weight(name, make())
        else:
            self.module(name)
            self.lazy.replace(f"{name}.weight", lambda: self.oriented(name, make()))

    def oriented(self, name: str, W: Tensor) -> Tensor:
        """Transpose `W` (d_out, d_in) if the layer's module holds its weight transposed."""
        return W.mT if isinstance(self.module(name), Conv1D) else W

    def set_weight(self, name: str, W: Tensor) -> None:
        """Overwrite a layer's weight in place, cast to the parameter's own type.

        Args:
            name: of the layer.
            W: (d_out, d_in).

        Raises:
            UsageError: `W` has another shape than the layer.
            NumericalError: `W` is not finite in the parameter's type.
        """
        weight = as_linear(self.module(name))
        if W.shape != weight.shape:
            raise UsageError(f"Layer {name} is {tuple(weight.shape)}; the new weight is {tuple(W.shape)}.")
        if self.lazy is not None:
            kept = W.detach().to(weight.dtype, copy=True)
            self.place(name, lambda: kept)
            return
        cast = W.detach().to(device=weight.device, dtype=weight.dtype)
        if not all_finite(cast):
            raise NumericalError(
                f"The new weight of layer {name} is not finite in {str(weight.dtype).removeprefix('torch.')}."
            )
        with torch.no_grad():
            weight.copy_(cast)

    def set_parameter(self, name: str, value: Tensor) -> None:
        """Overwrite another parameter of the model in place, e.g. that of a norm."""
        if self.lazy is not None and self.lazy.has(name):
            kept = value.detach().clone()
            self.lazy.replace(name, lambda: kept)
            return
        parameter = self.model.get_parameter(name)
        with torch.no_grad():
            parameter.copy_(value)

    def of_block(self, index: int) -> tuple[LayerSpec, ...]:
        """Return the layers of block `index`."""
        return tuple(spec for spec in self.specs if spec.block == index)


class _Originals(Mapping[str, Tensor]):
    """Map layer names to the weights of a lazy model's checkpoint, float32 (d_out, d_in), read on every access."""

    def __init__(self, layers: ModelLayers, lazy: LazyBlocks) -> None:
        """Keep the layers and the reader of their blocks."""
        self._layers = layers
        self._lazy = lazy

    def __getitem__(self, name: str) -> Tensor:
        """Read a weight from the checkpoint; `UnknownNameError` if there is no such layer."""
        self._layers.module(name)
        return self._layers.oriented(name, self._lazy.original(f"{name}.weight")).float().contiguous()

    def __iter__(self) -> Iterator[str]:
        return (spec.name for spec in self._layers.specs)

    def __len__(self) -> int:
        return len(self._layers.specs)


def check_finite(layers: ModelLayers) -> None:
    """Check that all parameters of a model are finite.

    Raises:
        NumericalError: a parameter holds NaN or infinity; names the first module with one.

    >>> from globalopt.models.finding import find_layers
    >>> from globalopt.reference.tiny import tiny_llama
    >>> model = tiny_llama()
    >>> _ = model.model.norm.weight.data.fill_(torch.inf)
    >>> check_finite(find_layers(model))
    Traceback (most recent call last):
        ...
    globalopt.errors.NumericalError: Layer model.norm: 16 of 16 values of its weight are NaN or infinite. ...
    """
    inside = f"{layers.blocks_path}."
    _check_finite((n, p) for n, p in layers.model.named_parameters() if not n.startswith(inside))
    for index, block in enumerate(layers.blocks):
        with layers.resident(index):
            _check_finite((f"{inside}{index}.{name}", parameter) for name, parameter in block.named_parameters())


def _check_finite(parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Check parameters by name; `NumericalError` for the first that is not finite."""
    for name, parameter in parameters:
        finite = torch.isfinite(parameter)
        if not bool(finite.all()):
            owner, _, what = name.rpartition(".")
            count = int((~finite).sum())
            raise NumericalError(
                f"Layer {owner}: {count} of {parameter.numel()} values of its {what} are NaN or infinite. The "
                "checkpoint is broken; fetch it again, or use --dtype float32 or bfloat16 if float16 overflowed."
            )
