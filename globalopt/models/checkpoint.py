"""Read the tensors of a model by name: from the safetensors files of a checkpoint, or zeros in place of one."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from globalopt.errors import ArtefactError

INDEX = "model.safetensors.index.json"
"""File that maps tensors to the files of a sharded checkpoint."""
SINGLE = "model.safetensors"
"""File of a checkpoint that is not sharded."""


@dataclass(frozen=True)
class Precision:
    """Cast tensors as a whole load does: from the checkpoint to `stored`, then to `computed` on `device`.

    >>> precision = Precision(stored=torch.bfloat16, computed=torch.float32, device=torch.device("cpu"))
    >>> precision.cast(torch.tensor([1.001]))  # rounded to bfloat16
    tensor([1.])
    """

    stored: torch.dtype
    computed: torch.dtype
    device: torch.device

    def cast(self, tensor: Tensor) -> Tensor:
        """Copy `tensor` in this precision; integers keep their type."""
        if not tensor.is_floating_point():
            return tensor.to(self.device, copy=True)
        return tensor.to(self.stored).to(self.device, self.computed, copy=True)

    def on(self, device: torch.device) -> Precision:
        """Return the same precision on another device."""
        return replace(self, device=device)


class Source(Protocol):
    """Provide tensors by the names of a model's parameters: a checkpoint, or zeros.

    >>> source = Zeros(nn.Linear(3, 2))
    >>> precision = Precision(torch.float32, torch.float32, torch.device("cpu"))
    >>> {name: tuple(tensor.shape) for name, tensor in source.read(["bias"], precision)}
    {'bias': (2,)}
    """

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of all tensors by name."""
        ...

    def read(self, names: Iterable[str], precision: Precision) -> Iterator[tuple[str, Tensor]]:
        """Yield names and tensors of `names`, in any order."""
        ...


class Checkpoint:
    """Read tensors from the safetensors files of a model folder, one or many; nothing of them is kept in memory.

    Raises:
        ArtefactError: there are none, one is missing, cut off or broken, the index is, or there are two checkpoints:
            a file beside the shards, or tensors in a shard that the index does not place there.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> tiny_llama().save_pretrained("tiny")
    >>> checkpoint = Checkpoint(Path("tiny"))
    >>> checkpoint.shapes()["model.layers.0.mlp.up_proj.weight"], checkpoint.dtype()
    ((24, 16), torch.float32)
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = self._find()
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        strays: list[str] = []
        for path in sorted(set(self._files.values())):
            with self._opened(path) as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    if self._files.get(name) != path:
                        strays.append(f"{path} holds the tensor {name}")
                        continue
                    entry = file.get_slice(name)
                    self._shapes[name] = tuple(entry.get_shape())
                    self._dtypes[name] = str(entry.get_dtype())
        if absent := sorted(self._files.keys() - self._shapes.keys()):
            raise ArtefactError(
                f"The weights of {folder} lack {len(absent)} tensors that its index names, {absent[0]} among them; "
                "the checkpoint is incomplete. Fetch it again."
            )
        if strays:
            # transformers reads every tensor of a shard, so that a whole load would have it, or have it from this file.
            raise ArtefactError(f"{strays[0]}, which {INDEX} does not place there. Fetch the checkpoint again.")

    @property
    def bytes(self) -> int:
        """Sum the sizes of the files."""
        return sum(path.stat().st_size for path in set(self._files.values()))

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of all tensors by name."""
        return self._shapes

    def types(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return the dtype, as safetensors writes it, and the shape of every tensor by name."""
        return {name: (self._dtypes[name], shape) for name, shape in self._shapes.items()}

    def dtype(self) -> torch.dtype:
        """Return the type of the first floating-point tensor, which stands for all.

        Raises:
            ArtefactError: there is no floating-point tensor.
        """
        for path in sorted(set(self._files.values())):
            with self._opened(path) as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    tensor = file.get_tensor(name)
                    if tensor.is_floating_point():
                        return tensor.dtype
        raise ArtefactError(f"The weights of {self.folder} hold no floating-point numbers; it is no model.")

    def read(self, names: Iterable[str], precision: Precision) -> Iterator[tuple[str, Tensor]]:
        """Yield copies of the tensors called `names`, file by file."""
        by_file: defaultdict[Path, list[str]] = defaultdict(list)
        for name in names:
            by_file[self._files[name]].append(name)
        for path, here in by_file.items():
            with self._opened(path) as file:
                for name in here:
                    # Tensors of the file are views of its mapping; with copies the file can be closed.
                    yield name, precision.cast(file.get_tensor(name))

    def _find(self) -> dict[str, Path]:
        """Find the file of every tensor, from the index if there is one."""
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
        single = self.folder / SINGLE
        if single.is_file() and single not in files.values():
            raise ArtefactError(
                f"{self.folder} holds {SINGLE} and, by {INDEX}, another checkpoint in several files; move away the one "
                "that is not the model's."
            )
        return files

    @contextmanager
    def _opened(self, path: Path) -> Iterator[Any]:
        """Open one file, with errors of known cause as one line."""
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except SafetensorError as cause:
            raise ArtefactError(f"The weights of {path} are broken or cut off: {cause}. Fetch them again.") from cause
        except OSError as cause:
            raise ArtefactError(f"The weights of {path} cannot be read: {cause.strerror or cause}.") from cause


def _weight_map(index: Path) -> Mapping[str, str]:
    """Read the mapping of tensors to files from an index."""
    return json.loads(index.read_text(encoding="utf-8"))["weight_map"]


class Zeros:
    """Provide zeros, which take no memory, in place of a checkpoint: a model's structure without its weights.

    >>> precision = Precision(torch.float32, torch.float32, torch.device("cpu"))
    >>> ((name, zeros),) = Zeros(nn.Linear(300, 200)).read(["weight"], precision)
    >>> tuple(zeros.shape), zeros.untyped_storage().nbytes()
    ((200, 300), 4)
    """

    def __init__(self, model: nn.Module) -> None:
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of all tensors by name."""
        return self._shapes

    def read(self, names: Iterable[str], precision: Precision) -> Iterator[tuple[str, Tensor]]:
        """Yield names and zeros in the shapes of `names`."""
        zero = torch.zeros((), dtype=precision.computed, device=precision.device)
        return ((name, zero.expand(self._shapes[name])) for name in names)
