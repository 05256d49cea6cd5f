"""Save a model whose weights were replaced as an ordinary checkpoint."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from globalopt.errors import ArtefactError
from globalopt.models.layers import decoder_blocks
from globalopt.models.loading import _first_line, quiet
from globalopt.models.streaming import (
    INDEX,
    lazy_blocks,
)


def save_dense(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, dtype: torch.dtype
) -> None:
    """Save model and tokenizer in the Hugging Face format; `folder` appears whole or not at all.

    Of a lazy model every block becomes a file of its own, so that no more than one is in memory.

    Args:
        model, tokenizer: of transformers.
        folder: must not exist yet, or be empty.
        dtype: type of the saved weights.

    Raises:
        ArtefactError: `folder` holds something, or cannot be written (a full disk).

    >>> from globalopt.models.loading import load_model, reference_folder
    >>> from globalopt.reference.tiny import tiny_llama
    >>> save_dense(tiny_llama(), load_model(reference_folder()).tokenizer, "copy", torch.bfloat16)
    >>> load_model("copy").checkpoint_dtype
    torch.bfloat16
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtefactError(f"{folder} exists and is not empty; choose another output folder.")
    # A sibling is on the same disk, so that the rename is atomic.
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise ArtefactError(f"Cannot write {folder}: {_first_line(error)}") from error
    try:
        with quiet():
            if lazy_blocks(model) is None:
                model.save_pretrained(staging, state_dict=_cast(model.state_dict(), dtype))
            else:
                _save_blocks(model, staging, dtype)
            tokenizer.save_pretrained(staging)
        path = staging / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        # In memory, the config has the computed type, and the cache is off; a saved model is used with its cache.
        config |= {"dtype": str(dtype).removeprefix("torch."), "use_cache": True}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        staging.chmod(0o755)
        staging.rename(folder)
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"Cannot write {folder}: {_first_line(error)}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _save_blocks(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Write a lazy model: its configs, the tensors outside the blocks, then the blocks one by one, and the index."""
    model.save_pretrained(folder, state_dict={})
    path, blocks = decoder_blocks(model)
    lazy = lazy_blocks(model)
    assert lazy is not None, "the caller has checked that the model is lazy"
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    outside: dict[str, Tensor] = {}
    seen: set[tuple[Any, ...]] = set()
    for name, tensor in model.state_dict().items():
        # A tied weight is saved once, under the first of its names.
        if not lazy.has(name) and name not in ignored and _memory(tensor) not in seen:
            outside[name] = tensor
            seen.add(_memory(tensor))
    sizes, files = 0, {}

    def write(index: int, tensors: dict[str, Tensor]) -> None:
        """Write the file with number `index`, and note its tensors for the index."""
        nonlocal sizes
        file = f"model-{index + 1:05}-of-{len(blocks) + 1:05}.safetensors"
        done = {name: tensor.contiguous() for name, tensor in _cast(tensors, dtype).items()}
        save_file(done, folder / file, metadata={"format": "pt"})
        sizes += sum(tensor.nbytes for tensor in done.values())
        files.update(dict.fromkeys(done, file))

    write(0, outside)
    for index, block in enumerate(blocks):
        with lazy.open(index):
            write(index + 1, {f"{path}.{index}.{name}": tensor for name, tensor in block.named_parameters()})
    metadata = {"total_parameters": model.num_parameters(), "total_size": sizes}
    text = json.dumps({"metadata": metadata, "weight_map": files}, indent=2, sort_keys=True) + "\n"
    (folder / INDEX).write_text(text, encoding="utf-8")


def _cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Cast floating-point tensors to `dtype`; tensors that share memory (tied weights) still do."""
    done: dict[tuple[Any, ...], Tensor] = {}
    for x in tensors.values():
        if (key := _memory(x)) not in done:
            done[key] = x.to(dtype) if x.is_floating_point() else x
    return {name: done[_memory(x)] for name, x in tensors.items()}


def _memory(x: Tensor) -> tuple[Any, ...]:
    """Return a key that is equal for tensors that share their memory."""
    return x.data_ptr(), x.shape, x.stride()
