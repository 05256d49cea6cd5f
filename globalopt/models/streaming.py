"""Read decoder blocks from their checkpoint when they are needed, for models larger than memory.

Such a lazy model has the parameters of its blocks on the meta device. They are real only while the block is open, and a
block that is called opens itself. A replaced weight is not kept either, but made again each time: from a saved layer,
or by the objective for a candidate. Embeddings, head, and everything else outside the blocks is in memory. Its matrices
are kept in the narrower of the stored and the computed type, and cast while their module is called: in float32 they
would be half of a small model's file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from globalopt.errors import ArtefactError, NumericalError, UnsupportedModelError
from globalopt.machine.memory import trim_memory
from globalopt.models.checkpoint import Precision, Source
from globalopt.values.entries import all_finite


class LazyBlocks:
    """Keep the decoder blocks of a model on the meta device, each with its weights only while it is open.

    Args:
        blocks: with their parameters on the meta device.
        path: module path of the blocks in the model.
        source: has the blocks' parameters by their names in the model.
        precision: of the weights; its device is where a block is read to by default.

    >>> from globalopt.models.loading import load_model
    >>> from globalopt.reference import reference_folder
    >>> model = load_model(reference_folder(), device="cpu", lazily=True).model
    >>> lazy, weight = lazy_blocks(model), "model.layers.1.mlp.up_proj.weight"
    >>> with lazy.open(1):
    ...     lazy.opened, model.get_parameter(weight).device.type
    ((1,), 'cpu')
    >>> lazy.opened, model.get_parameter(weight).device.type
    ((), 'meta')
    """

    def __init__(self, blocks: Sequence[nn.Module], path: str, source: Source, precision: Precision) -> None:
        self.loads = 0
        """Number of times that a block was read."""
        self._blocks = tuple(blocks)
        self._path = path
        self._source = source
        self.precision = precision
        self._empty = [dict(block.named_parameters()) for block in self._blocks]
        self._depth = [0] * len(self._blocks)
        self._made: dict[str, Callable[[], Tensor]] = {}
        for index, block in enumerate(self._blocks):
            block.forward = self._opening(index, block.forward)

    @property
    def device(self) -> torch.device:
        """Return the device that blocks are read to by default."""
        return self.precision.device

    @property
    def opened(self) -> tuple[int, ...]:
        """Return the indices of the blocks whose weights are in memory."""
        return tuple(index for index, depth in enumerate(self._depth) if depth)

    @contextmanager
    def open(self, index: int, device: torch.device | str | None = None) -> Iterator[None]:
        """Keep the weights of block `index` in memory, on `device`, while the context is open.

        If the block is open already, nothing is read or moved.
        """
        if not self._depth[index]:
            self._load(index, self.device if device is None else torch.device(device))
        self._depth[index] += 1
        try:
            yield
        finally:
            self._depth[index] -= 1
            if not self._depth[index]:
                for name, empty in self._empty[index].items():
                    _put(self._blocks[index], name, empty)
                trim_memory()

    def has(self, name: str) -> bool:
        """Tell whether `name` is a parameter of a block."""
        index, _, rest = name.removeprefix(f"{self._path}.").partition(".")
        return name.startswith(f"{self._path}.") and rest in self._empty[int(index)]

    def read(self, name: str) -> Tensor:
        """Copy one parameter as it now is, whether or not its block is open."""
        index, rest = self._place(name)
        if self._depth[index]:
            return self._blocks[index].get_parameter(rest).detach().clone()
        return self._replaced(name, self.device) if name in self._made else self.original(name)

    def original(self, name: str) -> Tensor:
        """Read one parameter from the checkpoint, whether or not it was replaced."""
        ((_, tensor),) = self._source.read([name], self.precision)
        return tensor

    def replace(self, name: str, make: Callable[[], Tensor]) -> None:
        """Replace a parameter by the result of `make`, which is called whenever the block is opened.

        If the block is open, it is called now.
        """
        index, rest = self._place(name)
        self._made[name] = make
        if self._depth[index]:
            parameter = self._blocks[index].get_parameter(rest)
            with torch.no_grad():
                parameter.copy_(self._replaced(name, parameter.device))

    def restore(self, name: str) -> None:
        """Undo `replace`: the parameter is again that of the checkpoint."""
        index, rest = self._place(name)
        self._made.pop(name, None)
        if self._depth[index]:
            parameter = self._blocks[index].get_parameter(rest)
            with torch.no_grad():
                parameter.copy_(self.original(name))

    def _place(self, name: str) -> tuple[int, str]:
        """Split a parameter's name into the index of its block and the rest; `KeyError` if it is in no block."""
        if not self.has(name):
            raise KeyError(name)
        index, _, rest = name.removeprefix(f"{self._path}.").partition(".")
        return int(index), rest

    def _load(self, index: int, device: torch.device) -> None:
        """Read the weights of block `index`, with replaced ones made anew."""
        self.loads += 1
        prefix = f"{self._path}.{index}."
        names = [prefix + name for name in self._empty[index]]
        kept = [name for name in names if name not in self._made]
        for name, tensor in self._source.read(kept, self.precision.on(device)):
            self._fill(index, name.removeprefix(prefix), tensor)
        for name in names:
            if name in self._made:
                self._fill(index, name.removeprefix(prefix), self._replaced(name, device))

    def _fill(self, index: int, name: str, tensor: Tensor) -> None:
        """Set a parameter of block `index` to a real tensor."""
        _put(self._blocks[index], name, nn.Parameter(tensor, requires_grad=False))

    def _replaced(self, name: str, device: torch.device) -> Tensor:
        """Make the replacement of a parameter, in the computed precision, and check its shape and that it is finite."""
        index, rest = self._place(name)
        made = self._made[name]().detach().to(device, self.precision.computed, copy=True).contiguous()
        shape = self._empty[index][rest].shape
        if made.shape != shape:
            raise ArtefactError(f"{name} is {tuple(shape)}; its replacement is {tuple(made.shape)}.")
        if not all_finite(made):
            owner, _, what = name.rpartition(".")
            raise NumericalError(f"The new {what} of layer {owner} is not finite in {str(made.dtype)[6:]}.")
        return made

    def _opening(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the `forward` of block `index`, so that the block is open while it runs."""

        @wraps(forward)
        def opening(*args: Any, **kwargs: Any) -> Any:
            with self.open(index):
                return forward(*args, **kwargs)

        return opening


_LAZY: WeakKeyDictionary[nn.Module, LazyBlocks] = WeakKeyDictionary()
"""The reader of every lazy model; an entry is removed when its model is freed."""


def lazy_blocks(model: nn.Module) -> LazyBlocks | None:
    """Return the reader of the blocks of `model`, or None if they are all in memory.

    >>> lazy_blocks(nn.Linear(3, 2)) is None
    True
    """
    return _LAZY.get(model)


def fill(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    path: str,
    source: Source,
    precision: Precision,
    beside: nn.Module | None = None,
) -> LazyBlocks:
    """Make a working lazy model of `model`, whose parameters are on the meta device: read all but the blocks.

    Args:
        model: the model.
        blocks: its decoder blocks. path: their module path.
        source: of all parameters.
        precision: of the weights.
        beside: another lazy model; parameters outside the blocks that are equal in both are shared, not held twice.

    Raises:
        ArtefactError: the source lacks a tensor, or has one of another shape.
        UnsupportedModelError: the source names its tensors differently, so that only a whole load can convert them,
            or a block shares a weight.

    >>> from accelerate import init_empty_weights
    >>> from globalopt.models.checkpoint import Zeros
    >>> from globalopt.reference.tiny import tiny_llama
    >>> with init_empty_weights(include_buffers=False):
    ...     model = tiny_llama()
    >>> precision = Precision(torch.float32, torch.float32, torch.device("cpu"))
    >>> lazy = fill(model, list(model.model.layers), "model.layers", Zeros(model), precision)
    >>> bool(model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.any()), lazy.loads  # each block was read once
    (False, 2)
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in parameters.items():
        tied[id(parameter)].append(name)
    aliases = {name: names for names in tied.values() for name in names}
    for names in tied.values():
        if len(names) > 1 and any(name.startswith(f"{path}.") for name in names):
            raise UnsupportedModelError(
                f"{' and '.join(names[:2])} use the same weight, and one of them is in a block: {WHOLE}"
            )
    _check_names(type(model).__name__, wanted, aliases, source.shapes())

    outside = [name for name in parameters if not name.startswith(f"{path}.")]
    present = {name: [alias for alias in aliases[name] if alias in source.shapes()] for name in outside}
    found: dict[str, nn.Parameter] = {}
    others = {} if beside is None else dict(beside.named_parameters(remove_duplicate=False))
    narrow = replace(precision, computed=min(precision.stored, precision.computed, key=lambda dtype: dtype.itemsize))
    vectors = {names[0] for names in present.values() if len(wanted[names[0]]) < 2}
    matrices = {names[0] for names in present.values()} - vectors
    for name, tensor in chain(source.read(matrices, narrow), source.read(vectors, precision)):
        other = others.get(name)
        other = None if other is None else other.detach()
        same = other is not None and _equal(other, tensor)
        found[name] = nn.Parameter(other if same and other is not None else tensor, requires_grad=False)
    if narrow != precision:
        found = {
            name: found[name] if name in vectors else _Narrow.of(found[name], precision.computed) for name in found
        }
    for name, names in present.items():
        _check_tied(source, names, narrow)
        _put(model, name, found[names[0]])
    if narrow != precision:
        for module in {model.get_submodule(name.rpartition(".")[0]) for name in outside if len(wanted[name]) > 1}:
            module.forward = _widening(module, module.forward, precision.computed)
    for name, buffer in dict(model.named_buffers()).items():
        dtype = precision.computed if buffer.is_floating_point() else buffer.dtype
        _put_buffer(model, name, buffer.to(precision.device, dtype))
    for name, tensor in source.read([name for name in wanted if name not in parameters], precision):
        _put_buffer(model, name, tensor)
    lazy = LazyBlocks(blocks, path, source, precision)
    _LAZY[model] = lazy
    return lazy


WHOLE = "it cannot be loaded block by block. Raise --max-memory so that it is loaded whole."


def _check_names(
    model: str,
    wanted: Mapping[str, tuple[int, ...]],
    aliases: Mapping[str, Sequence[str]],
    found: Mapping[str, tuple[int, ...]],
) -> None:
    """Check that the source has every tensor of the model, in its shape."""
    missing = sorted(name for name in wanted if not any(alias in found for alias in aliases.get(name, [name])))
    unknown = sorted(found.keys() - wanted.keys())
    if missing and unknown:
        raise UnsupportedModelError(
            f"The checkpoint has {unknown[0]} but not {missing[0]}: its tensors must be converted for {model}, and so "
            f"{WHOLE}"
        )
    if missing:
        raise ArtefactError(
            f"The weights lack {len(missing)} tensors, {missing[0]} among them; the checkpoint is incomplete or for "
            "another model."
        )
    for name, shape in wanted.items():
        if found.get(name, shape) != shape:
            raise ArtefactError(
                f"The weights do not have the shapes its config.json says: {name} is {found[name]}, not {shape}."
            )


class _Narrow(nn.Parameter):
    """Hold a parameter in a narrower type than it is computed in, and tell models the latter.

    Models cast their hidden states to the type of a weight outside of the call that uses it, where it is not widened.
    """

    _computed: torch.dtype

    @classmethod
    def of(cls, parameter: nn.Parameter, computed: torch.dtype) -> _Narrow:
        """Share the memory of a parameter that is computed in the type `computed`."""
        made = cls(parameter.data, requires_grad=False)
        made._computed = computed
        return made

    @property
    def dtype(self) -> torch.dtype:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Return the type that it is computed in; `element_size` is that of the type it is held in."""
        return self._computed


def _widening(module: nn.Module, forward: Callable[..., Any], computed: torch.dtype) -> Callable[..., Any]:
    """Wrap the `forward` of a module so that its parameters are in the type `computed` during the call alone."""

    @wraps(forward)
    def widened(*args: Any, **kwargs: Any) -> Any:
        held = dict(module._parameters)
        try:
            for name, parameter in held.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.to(computed), requires_grad=False)
            return forward(*args, **kwargs)
        finally:
            module._parameters.update(held)

    return widened


def dtype_of(model: PreTrainedModel) -> torch.dtype:
    """Return the type that a model computes in; in a lazy model some parameters are of another.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> dtype_of(tiny_llama())
    torch.float32
    """
    lazy = lazy_blocks(model)
    return model.dtype if lazy is None else lazy.precision.computed


def _equal(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are equal in device, type, shape and values."""
    alike = one.device == other.device and one.dtype == other.dtype and one.shape == other.shape
    return alike and torch.equal(one, other)


def _check_tied(source: Source, names: Sequence[str], precision: Precision) -> None:
    """Refuse a weight that the model ties but that the checkpoint holds several times, with different values."""
    if len(names) > 1:
        (_, first), *others = source.read(names, precision)
        if not all(torch.equal(first, other) for _, other in others):
            raise UnsupportedModelError(
                f"The model ties {' and '.join(names)}, but the checkpoint has different weights for them. Set "
                "tie_word_embeddings in its config.json to false."
            )


def _put(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Set a parameter by its path, also from or to the meta device."""
    path, _, leaf = name.rpartition(".")
    root.get_submodule(path)._parameters[leaf] = parameter


def _put_buffer(root: nn.Module, name: str, buffer: Tensor) -> None:
    """Set a buffer by its path."""
    path, _, leaf = name.rpartition(".")
    root.get_submodule(path)._buffers[leaf] = buffer
