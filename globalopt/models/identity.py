"""Compute fingerprints of a model's structure and of its weights."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from globalopt.models.layers import ModelLayers


def model_fingerprint(layers: ModelLayers) -> str:
    """Hash the structure of a model: its type, vocabulary size, and the names and shapes of its layers.

    A budget file must be of a model with the same fingerprint.

    >>> from globalopt.models.finding import find_layers
    >>> from globalopt.reference.tiny import tiny_llama
    >>> one, other = find_layers(tiny_llama(seed=0)), find_layers(tiny_llama(seed=1))
    >>> model_fingerprint(one) == model_fingerprint(other)  # the weights do not matter
    True
    """
    config = layers.model.config
    identity = {
        "model_type": config.model_type,
        "vocab_size": config.get_text_config(decoder=True).vocab_size,
        "layers": [[spec.name, spec.d_out, spec.d_in] for spec in layers.specs],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def weights_sha256(layers: ModelLayers) -> str:
    """Hash the weights of the compressible layers alone, with their names and types, as they are in memory.

    Returns:
        sha256, hexadecimal.

    >>> from globalopt.models.finding import find_layers
    >>> from globalopt.reference.tiny import tiny_llama
    >>> one, other = (find_layers(tiny_llama(seed), allow_low_coverage=True) for seed in (0, 1))
    >>> weights_sha256(one) == weights_sha256(other)
    False
    """
    hashed = hashlib.sha256()
    for index in range(len(layers.blocks)):
        with layers.resident(index):
            for spec in layers.of_block(index):
                weight = layers.module(spec.name).weight
                hashed.update(f"{spec.name} {spec.d_out} {spec.d_in} {weight.dtype}".encode())
                hashed.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return hashed.hexdigest()


IGNORED = ("_name_or_path", "transformers_version")
"""Fields of a configuration that say where a model is from and who wrote it, and nothing of what it computes."""


def model_sha256(layers: ModelLayers, tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash everything that a forward pass on a text uses: parameters, buffers, configuration, tokenizer.

    Blocks that are not in memory are read one at a time. Parameters that share storage are hashed under one name. All
    are hashed in the type that the model computes in: a lazily loaded model holds its embeddings in that of the file.

    Returns:
        sha256, hexadecimal.

    >>> from globalopt.models.finding import find_layers
    >>> from globalopt.models.loading import load_model
    >>> from globalopt.reference import reference_folder
    >>> loaded = load_model(reference_folder())
    >>> layers = find_layers(loaded.model)
    >>> before = model_sha256(layers, loaded.tokenizer)
    >>> _ = loaded.model.model.norm.weight.mul_(2)
    >>> model_sha256(layers, loaded.tokenizer) == before
    False
    """
    hashed = hashlib.sha256()
    config = {name: value for name, value in layers.model.config.to_dict().items() if name not in IGNORED}
    hashed.update(json.dumps(config, sort_keys=True, default=str).encode())
    hashed.update(tokenizer_sha256(tokenizer).encode())
    inside = {id(tensor) for block in layers.blocks for tensor in _tensors(block).values()}
    for name, tensor in _tensors(layers.model).items():
        if id(tensor) not in inside:
            _update(hashed, name, tensor, _computed_dtype(layers, tensor))
    for index, block in enumerate(layers.blocks):
        with layers.resident(index):
            for name, tensor in _tensors(block).items():
                _update(hashed, f"{index}.{name}", tensor, tensor.dtype)
    return hashed.hexdigest()


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash a tokenizer by the files it saves, so that every kind is covered.

    >>> from transformers import AutoTokenizer
    >>> from globalopt.reference import reference_folder
    >>> len(tokenizer_sha256(AutoTokenizer.from_pretrained(reference_folder())))
    64
    """
    hashed = hashlib.sha256()
    with tempfile.TemporaryDirectory(prefix="globalopt-") as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                hashed.update(path.relative_to(folder).as_posix().encode())
                hashed.update(path.read_bytes())
    return hashed.hexdigest()


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _computed_dtype(layers: ModelLayers, tensor: Tensor) -> torch.dtype:
    """Return the type that a tensor outside of the blocks is used in."""
    lazy = layers.lazy
    if lazy is not None and isinstance(tensor, nn.Parameter) and tensor.dtype == lazy.precision.stored:
        return lazy.precision.computed
    return tensor.dtype


CHUNK = 2**24
"""Entries that are converted at once."""


def _update(hashed: hashlib._Hash, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Add a tensor's name, shape, and the type and bytes that it has as `dtype`."""
    hashed.update(f"{name} {dtype} {tuple(tensor.shape)}".encode())
    for part in tensor.detach().flatten().split(CHUNK):
        hashed.update(part.to(dtype).cpu().view(torch.uint8).numpy().data)
