"""Save a model whose weights were replaced as an ordinary checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from globalopt.errors import ArtefactError
from globalopt.models.checkpoint import INDEX, SINGLE
from globalopt.models.decoder import decoder_blocks
from globalopt.models.origin import CONFIG, complete_config, keep_side_files
from globalopt.models.quiet import quiet
from globalopt.models.streaming import lazy_blocks
from globalopt.models.tensor_file import TYPES, Pending, write_tensors
from globalopt.runs.files import remove_abandoned_beside, replacing

_SHARD = "50GB"
_READ_AT_ONCE = 2**26
"""Bytes that are read from a file before it is opened anew: what was read of an open one counts as memory in use."""
_COMPARED_AT_ONCE = 2**20
"""Numbers that are cast at once where a tensor is compared with the stored one: embeddings are large."""
_NEW_CLASS = re.compile(rb'("tokenizer_class"\s*:\s*)"TokenizersBackend"')


def save_dense(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    dtype: torch.dtype,
    origin: Path | None = None,
) -> None:
    """Save model and tokenizer in the Hugging Face format; `folder` appears whole or not at all.

    Of a lazy model every block becomes a file of its own, so that no more than one is in memory. Tensors that did not
    change since they were read from `origin` are written as they were there, and all keep their names and types.

    Args:
        model, tokenizer: of transformers.
        folder: must not exist yet, or be empty.
        dtype: type of the saved weights that `origin` does not have.
        origin: folder that the model was loaded from (`globalopt.models.origin.origin_of`), whose other files are kept;
            None: the model was made in memory.

    Raises:
        ArtefactError: `folder` holds something, or cannot be written (a full disk).

    >>> from globalopt.models.loading import load_model
    >>> from globalopt.reference import reference_folder
    >>> from globalopt.reference.tiny import tiny_llama
    >>> save_dense(tiny_llama(), load_model(reference_folder()).tokenizer, "copy", torch.bfloat16)
    >>> load_model("copy").checkpoint_dtype
    torch.bfloat16
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtefactError(f"{folder} exists and is not empty; choose another output folder.")
    remove_abandoned_beside(folder)
    with replacing(folder) as staging, quiet():
        staging.mkdir()
        stored = StoredTensors(origin)
        # The configs, and code that comes with the model.
        model.save_pretrained(staging, state_dict={})
        if lazy_blocks(model) is None:
            _save_whole(model, staging, dtype, stored)
        else:
            _save_blocks(model, staging, dtype, stored)
        tokenizer.save_pretrained(staging)
        path = staging / CONFIG
        config = json.loads(path.read_text(encoding="utf-8"))
        # In memory, the config has the computed type, and the cache is off; a saved model is used with its cache.
        config |= {"dtype": str(dtype).removeprefix("torch."), "use_cache": True}
        config = complete_config(config, origin, type(model.config))
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if origin is not None:
            keep_side_files(staging, origin, tokenizer)
        _spell_tokenizer(staging)


class StoredTensors:
    """Read the tensors of the checkpoint in `folder` as they are stored; none where it has no safetensors files.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> tiny_llama().save_pretrained("tiny")
    >>> stored = StoredTensors(Path("tiny"))
    >>> stored.read("model.norm.weight").shape, "lm_head.bias" in stored.names
    (torch.Size([16]), False)
    """

    def __init__(self, folder: Path | None) -> None:
        self.names: dict[str, Path] = {}
        """The file of every tensor."""
        self._file: tuple[Path, Any] | None = None
        self._read = 0
        self.complete = True
        """Whether the stored tensors are the model's own, not the parts of a quantised or packed one."""
        if folder is None:
            return
        try:
            if (folder / SINGLE).is_file():
                with safe_open(folder / SINGLE, framework="pt") as file:
                    self.names = dict.fromkeys(file.keys(), folder / SINGLE)
            elif (folder / INDEX).is_file():
                weights = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
                self.names = {name: folder / file for name, file in weights.items()}
            self.complete = "quantization_config" not in json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        # The model was loaded from there all the same: transformers has said what it has to say.
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
            self.names = {}

    def read(self, name: str) -> Tensor | None:
        """Copy a tensor; None where it is not there, or of a type that is not a model's own (8-bit floats)."""
        if self.form(name) is None:
            return None
        copied = self._opened(self.names[name]).get_tensor(name).clone()
        self._read += copied.nbytes
        if self._read > _READ_AT_ONCE:
            self._file = None
        return copied

    def form(self, name: str) -> tuple[torch.dtype, tuple[int, ...]] | None:
        """Return type and shape of a tensor; None where `read` does."""
        path = self.names.get(name)
        if path is None:
            return None
        entry = self._opened(path).get_slice(name)
        dtype = TYPES.get(str(entry.get_dtype()))
        return None if dtype is None else (dtype, tuple(entry.get_shape()))

    def _opened(self, path: Path) -> Any:
        """Open a file, unless it is open from the call before."""
        # The header of a file may name many thousands of tensors: it is read once for those in a row.
        if self._file is None or self._file[0] != path:
            self._file, self._read = (path, safe_open(path, framework="pt")), 0
        return self._file[1]

    def settled(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Pending:
        """Describe the tensor that `settle` returns, without making it; the arguments are its own."""
        form = self.form(name)
        if not _alike(form, tensor):
            form = (dtype if tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape))
        assert form is not None
        return Pending(*form, partial(self.settle, name, tensor, dtype))

    def settle(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the stored tensor called `name` if `tensor` is that one as it was loaded, else `tensor` in its type.

        Args:
            dtype: for a floating-point tensor that is not stored, or in another shape.
        """
        stored = self.read(name)
        if stored is None or not _alike((stored.dtype, tuple(stored.shape)), tensor):
            return tensor.to(dtype) if tensor.is_floating_point() else tensor
        mine = tensor.detach().cpu()
        # transformers casts to the type of the model first, then we to the computed type.
        if any(_equal_as(first, stored, mine) for first in (stored.dtype, dtype)):
            return stored
        return mine.to(stored.dtype)

    def unused(self, written: Mapping[str, Any]) -> dict[str, Pending]:
        """Describe the stored tensors that a model does not have, if the `written` names are all stored ones.

        Where names differ, transformers has renamed tensors, and the others may be the same weights.
        """
        if not self.complete or not all(name in self.names for name in written):
            return {}
        found = {}
        for name in sorted(self.names.keys() - written.keys()):
            if (form := self.form(name)) is not None:
                found[name] = Pending(*form, partial(self._sure, name))
        return found

    def _sure(self, name: str) -> Tensor:
        """Copy a tensor that is there."""
        found = self.read(name)
        assert found is not None, name
        return found


def _equal_as(first: torch.dtype, stored: Tensor, loaded: Tensor) -> bool:
    """Tell whether `stored`, cast to the type `first` and then to that of `loaded`, is `loaded`; by some rows."""
    one, other = torch.atleast_1d(stored), torch.atleast_1d(loaded)
    rows = max(1, _COMPARED_AT_ONCE * len(one) // max(1, one.numel()))
    return all(torch.equal(a.to(first).to(b.dtype), b) for a, b in zip(one.split(rows), other.split(rows), strict=True))


def _alike(form: tuple[torch.dtype, tuple[int, ...]] | None, tensor: Tensor) -> bool:
    """Tell whether a stored tensor may be `tensor` in another type: by their shapes, and whether both are floats."""
    return (
        form is not None and form[1] == tuple(tensor.shape) and form[0].is_floating_point == tensor.is_floating_point()
    )


def _save_whole(model: PreTrainedModel, folder: Path, dtype: torch.dtype, stored: StoredTensors) -> None:
    """Write the tensors of a model that is in memory, under the names that they have in its checkpoint."""
    state = model.state_dict()
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ()) - stored.names.keys()
    once = remove_tied_weights_from_state_dict({name: x for name, x in state.items() if name not in ignored}, model)
    # Tied weights are written once, or under all the names that the checkpoint has them under.
    found = {name: x for name, x in state.items() if name in once or name in stored.names}
    found = _renamed(dict(revert_weight_conversion(model, found)), f"{model.base_model_prefix}.", stored)
    tensors = {name: stored.settled(name, x, _type_of(model, name, dtype)) for name, x in found.items()}
    tensors |= stored.unused(tensors)
    plan = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=_SHARD,
    )
    for file, names in plan.filename_to_tensors.items():
        write_tensors(folder / file, {name: tensors[name] for name in names}, {"format": "pt"})
    if plan.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **plan.metadata}
        _write_index(folder, metadata, plan.tensor_to_filename)


def _type_of(model: PreTrainedModel, name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the type to save a tensor in that no checkpoint has: float32 where the model asks for it, else `dtype`."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    return torch.float32 if kept.intersection(name.split(".")) else dtype


def _renamed(tensors: dict[str, Tensor], prefix: str, stored: StoredTensors) -> dict[str, Tensor]:
    """Leave out the name of the base model where the checkpoint is one of the base model alone (as GPT-2's)."""
    shorter = {name.removeprefix(prefix): x for name, x in tensors.items()}
    missing = any(name not in stored.names for name in tensors)
    return shorter if missing and all(name in stored.names for name in shorter) else tensors


def _write_index(folder: Path, metadata: Mapping[str, Any], files: Mapping[str, str]) -> None:
    """Write the index of a checkpoint of several files."""
    text = json.dumps({"metadata": dict(metadata), "weight_map": dict(files)}, indent=2, sort_keys=True) + "\n"
    (folder / INDEX).write_text(text, encoding="utf-8")


def _save_blocks(model: PreTrainedModel, folder: Path, dtype: torch.dtype, stored: StoredTensors) -> None:
    """Write a lazy model: the tensors outside the blocks, then the blocks one by one, and the index."""
    path, blocks = decoder_blocks(model)
    lazy = lazy_blocks(model)
    assert lazy is not None, "the caller has checked that the model is lazy"
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ()) - stored.names.keys()
    outside: dict[str, Tensor] = {}
    seen: set[tuple[Any, ...]] = set()
    for name, tensor in model.state_dict().items():
        # A tied weight is saved once, under the first of its names, or under all that the checkpoint has.
        if not lazy.has(name) and name not in ignored and (_memory(tensor) not in seen or name in stored.names):
            outside[name] = tensor
            seen.add(_memory(tensor))
    inside = {f"{path}.{index}.{name}" for index, block in enumerate(blocks) for name, _ in block.named_parameters()}
    unused = stored.unused(dict.fromkeys([*outside, *inside]))
    sizes, files = 0, {}

    def write(index: int, tensors: dict[str, Tensor], more: dict[str, Pending] | None = None) -> None:
        """Write the file with number `index`, and note its tensors for the index."""
        nonlocal sizes
        file = f"model-{index + 1:05}-of-{len(blocks) + 1:05}.safetensors"
        done = {name: stored.settled(name, tensor, dtype) for name, tensor in tensors.items()} | (more or {})
        write_tensors(folder / file, done, {"format": "pt"})
        sizes += sum(tensor.nbytes for tensor in done.values())
        files.update(dict.fromkeys(done, file))

    write(0, outside, unused)
    for index, block in enumerate(blocks):
        with lazy.open(index):
            write(index + 1, {f"{path}.{index}.{name}": tensor for name, tensor in block.named_parameters()})
    _write_index(folder, {"total_parameters": model.num_parameters(), "total_size": sizes}, files)


def _memory(x: Tensor) -> tuple[Any, ...]:
    """Return a key that is equal for tensors that share their memory."""
    return x.data_ptr(), x.shape, x.stride()


def _spell_tokenizer(folder: Path) -> None:
    """Name the class of a tokenizer as transformers 4 does too, where transformers 5 has given it a new name.

    The rest of the file stays as it is. transformers 5 takes both names for the same class.
    """
    path = folder / "tokenizer_config.json"
    if path.is_file():
        text = path.read_bytes()
        path.write_bytes(_NEW_CLASS.sub(rb'\1"PreTrainedTokenizerFast"', text))
