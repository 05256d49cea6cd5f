"""Models larger than memory: decoder blocks that are read from their checkpoint when they are opened, and let go after.

The parameters of a block are on the meta device, real only while the block is open; a block that is called opens
itself. What was put in place of a weight is not kept either but made again each time: from a saved layer, or a
candidate. Embeddings, head, and what else lies outside the blocks is in memory; matrices in the type they are stored
in, cast to that of the computation while their module is called: in float32 they would be half of a small model's file.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from itertools import chain
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from globalopt.errors import ArtefactError, NumericalError, UnsupportedModelError
from globalopt.machine.memory import give_back

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Precision:
    """How tensors are held: as in a whole model that is loaded in `stored`, then cast to `computed` on `device`."""

    stored: torch.dtype
    computed: torch.dtype
    device: torch.device

    def cast(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor` in this precision; integers stay as they are."""
        if not tensor.is_floating_point():
            return tensor.to(self.device, copy=True)
        return tensor.to(self.stored).to(self.device, self.computed, copy=True)

    def on(self, device: torch.device) -> Precision:
        return replace(self, device=device)


class Source(Protocol):
    """Where tensors come from, by the names of a model's parameters."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor there is."""
        ...

    def read(self, names: Iterable[str], precision: Precision) -> Iterator[tuple[str, Tensor]]:
        """The tensors called `names` and their names, in any order."""
        ...


class Checkpoint:
    """The safetensors files of a model folder, one or many; nothing of them is held.

    Raises:
        ArtefactError: there are none, one is missing, cut off or broken, or the index is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = self._find()
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in sorted(set(self._files.values())):
            with self._opened(path) as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    if self._files.get(name) == path:
                        self._shapes[name] = tuple(file.get_slice(name).get_shape())
        if absent := sorted(self._files.keys() - self._shapes.keys()):
            raise ArtefactError(
                f"The weights of {folder} lack {len(absent)} tensors that its index names, {absent[0]} among them; "
                "the checkpoint is incomplete. Fetch it again."
            )

    @property
    def bytes(self) -> int:
        """Size of the files together."""
        return sum(path.stat().st_size for path in set(self._files.values()))

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def dtype(self) -> torch.dtype:
        """The type of the first tensor of floating-point numbers, which stands for all."""
        for path in sorted(set(self._files.values())):
            with self._opened(path) as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    tensor = file.get_tensor(name)
                    if tensor.is_floating_point():
                        return tensor.dtype
        raise ArtefactError(f"The weights of {self.folder} hold no floating-point numbers; it is no model.")

    def read(self, names: Iterable[str], precision: Precision) -> Iterator[tuple[str, Tensor]]:
        by_file: defaultdict[Path, list[str]] = defaultdict(list)
        for name in names:
            by_file[self._files[name]].append(name)
        for path, here in by_file.items():
            with self._opened(path) as file:
                for name in here:
                    # What the file gives is a view of it; only copies leave, or the file would stay mapped.
                    yield name, precision.cast(file.get_tensor(name))

    def _find(self) -> dict[str, Path]:
        index = self.folder / INDEX
        if not index.is_file():
            single = self.folder / SINGLE
            if not single.is_file():
                raise ArtefactError(f"{self.folder} has no file named {SINGLE} and no {INDEX}.")
            with self._opened(single) as file:
                return dict.fromkeys(file.keys(), single)
        try:
            files = {str(name): self.folder / str(file) for name, file in _weight_map(index).items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ArtefactError(f"{index} is no index of weights; fetch it again.") from None
        for path in files.values():
            if not path.is_file():
                raise ArtefactError(f"{self.folder} lacks the file {path.name} that its index names. Fetch it again.")
        return files

    @contextmanager
    def _opened(self, path: Path) -> Iterator[Any]:
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except SafetensorError as cause:
            raise ArtefactError(f"The weights of {path} are broken or cut off: {cause}. Fetch them again.") from cause
        except OSError as cause:
            raise ArtefactError(f"The weights of {path} cannot be read: {cause.strerror or cause}.") from cause


def _weight_map(index: Path) -> Mapping[str, str]:
    return json.loads(index.read_text(encoding="utf-8"))["weight_map"]


class Zeros:
    """Zeros in place of a checkpoint, which take no memory: a model's structure without its weights."""

    def __init__(self, model: nn.Module) -> None:
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def read(self, names: Iterable[str], precision: Precision) -> Iterator[tuple[str, Tensor]]:
        zero = torch.zeros((), dtype=precision.computed, device=precision.device)
        return ((name, zero.expand(self._shapes[name])) for name in names)


class LazyBlocks:
    """The decoder blocks of a model on the meta device, each with its weights only while it is open.

    Args:
        blocks: with their parameters on the meta device.
        path: of the blocks in the model.
        source: has the blocks' parameters by their names in the model.
        precision: its device is where a block goes when nothing else is asked for.
    """

    def __init__(self, blocks: Sequence[nn.Module], path: str, source: Source, precision: Precision) -> None:
        self.loads = 0
        """How often a block was read."""
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
        return self.precision.device

    @property
    def opened(self) -> tuple[int, ...]:
        """The blocks whose weights are in memory."""
        return tuple(index for index, depth in enumerate(self._depth) if depth)

    @contextmanager
    def open(self, index: int, device: torch.device | str | None = None) -> Iterator[None]:
        """Keep the weights of block `index` in memory, on `device`; inside of another opening nothing is done."""
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
                give_back()

    def has(self, name: str) -> bool:
        """Whether `name` is a parameter of a block."""
        index, _, rest = name.removeprefix(f"{self._path}.").partition(".")
        return name.startswith(f"{self._path}.") and rest in self._empty[int(index)]

    def read(self, name: str) -> Tensor:
        """A copy of one parameter as it now is, whether or not its block is open."""
        index, rest = self._place(name)
        if self._depth[index]:
            return self._blocks[index].get_parameter(rest).detach().clone()
        return self._replaced(name, self.device) if name in self._made else self.original(name)

    def original(self, name: str) -> Tensor:
        """One parameter as the checkpoint has it."""
        ((_, tensor),) = self._source.read([name], self.precision)
        return tensor

    def replace(self, name: str, make: Callable[[], Tensor]) -> None:
        """From now on the parameter called `name` is what `make` returns, made whenever the block is opened."""
        index, rest = self._place(name)
        self._made[name] = make
        if self._depth[index]:
            parameter = self._blocks[index].get_parameter(rest)
            with torch.no_grad():
                parameter.copy_(self._replaced(name, parameter.device))

    def restore(self, name: str) -> None:
        """From now on the parameter called `name` is the checkpoint's again."""
        index, rest = self._place(name)
        self._made.pop(name, None)
        if self._depth[index]:
            parameter = self._blocks[index].get_parameter(rest)
            with torch.no_grad():
                parameter.copy_(self.original(name))

    def _place(self, name: str) -> tuple[int, str]:
        if not self.has(name):
            raise KeyError(name)
        index, _, rest = name.removeprefix(f"{self._path}.").partition(".")
        return int(index), rest

    def _load(self, index: int, device: torch.device) -> None:
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
        _put(self._blocks[index], name, nn.Parameter(tensor, requires_grad=False))

    def _replaced(self, name: str, device: torch.device) -> Tensor:
        index, rest = self._place(name)
        made = self._made[name]().detach().to(device, self.precision.computed, copy=True).contiguous()
        shape = self._empty[index][rest].shape
        if made.shape != shape:
            raise ArtefactError(f"{name} is {tuple(shape)}; what should stand in for it is {tuple(made.shape)}.")
        if not bool(torch.isfinite(made).all()):
            owner, _, what = name.rpartition(".")
            raise NumericalError(f"The new {what} of layer {owner} is not finite in {str(made.dtype)[6:]}.")
        return made

    def _opening(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def opening(*args: Any, **kwargs: Any) -> Any:
            with self.open(index):
                return forward(*args, **kwargs)

        return opening


_LAZY: WeakKeyDictionary[nn.Module, LazyBlocks] = WeakKeyDictionary()


def lazy_blocks(model: nn.Module) -> LazyBlocks | None:
    """What opens the blocks of `model`, or None if they are all in memory."""
    return _LAZY.get(model)


def fill(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    path: str,
    source: Source,
    precision: Precision,
    beside: nn.Module | None = None,
) -> LazyBlocks:
    """Make `model`, whose parameters are on the meta device, one that works: its blocks lazily, the rest now.

    Args:
        blocks: at `path` in the model.
        beside: another lazy model; what lies outside its blocks and is the same is shared, not held twice.

    Raises:
        ArtefactError: the source lacks a tensor, or has one of another shape.
        UnsupportedModelError: the source names its tensors differently, so that only a whole load can convert them,
            or a block shares a weight.
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
        same = other is not None and _equal(other, tensor)
        found[name] = nn.Parameter(other if same and other is not None else tensor, requires_grad=False)
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


def _widening(module: nn.Module, forward: Callable[..., Any], computed: torch.dtype) -> Callable[..., Any]:
    """`forward` of a module whose parameters are in `computed` during the call alone."""

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
    """The type a model computes in, which of a lazy one is not that of all its parameters."""
    lazy = lazy_blocks(model)
    return model.dtype if lazy is None else lazy.precision.computed


def _equal(one: Tensor, other: Tensor) -> bool:
    alike = one.device == other.device and one.dtype == other.dtype and one.shape == other.shape
    return alike and torch.equal(one, other)


def _check_tied(source: Source, names: Sequence[str], precision: Precision) -> None:
    """Refuse a weight that the model has once and the checkpoint several times, with different values."""
    if len(names) > 1:
        (_, first), *others = source.read(names, precision)
        if not all(torch.equal(first, other) for _, other in others):
            raise UnsupportedModelError(
                f"The model ties {' and '.join(names)}, but the checkpoint has different weights for them. Set "
                "tie_word_embeddings in its config.json to false."
            )


def _put(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    root.get_submodule(path)._parameters[leaf] = parameter


def _put_buffer(root: nn.Module, name: str, buffer: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    root.get_submodule(path)._buffers[leaf] = buffer
