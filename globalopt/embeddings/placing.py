"""Put rounded embeddings into a model, and dense ones back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from globalopt.embeddings.coding import decode_matrix
from globalopt.models.layers import ModelLayers
from globalopt.values.embeddings import CodedMatrix


def place(layers: ModelLayers, name: str, coded: CodedMatrix, dtype: torch.dtype) -> None:
    """Overwrite an embedding of a model by its rounded numbers; a head that is tied to it changes too.

    Args:
        name: module path. dtype: type that the numbers are saved in, to which they are rounded first.

    >>> from globalopt.embeddings.coding import encode_matrix
    >>> from globalopt.models.finding import find_layers
    >>> from globalopt.reference.tiny import tiny_llama
    >>> layers = find_layers(tiny_llama().requires_grad_(False), allow_low_coverage=True)
    >>> before = layers.model.lm_head.weight.clone()
    >>> place(layers, "lm_head", encode_matrix(before, bits=6), torch.float32)
    >>> 0 < float((layers.model.lm_head.weight - before).norm() / before.norm()) < 0.05
    True
    """
    layers.set_parameter(f"{name}.weight", decode_matrix(coded, dtype))


@contextmanager
def placed(layers: ModelLayers, name: str, coded: CodedMatrix, dtype: torch.dtype) -> Iterator[None]:
    """Keep a rounded embedding in the model while the context is open, and put the present one back.

    >>> from globalopt.embeddings.coding import encode_matrix
    >>> from globalopt.models.finding import find_layers
    >>> from globalopt.reference.tiny import tiny_llama
    >>> layers = find_layers(tiny_llama().requires_grad_(False), allow_low_coverage=True)
    >>> before = layers.model.lm_head.weight.clone()
    >>> with placed(layers, "lm_head", encode_matrix(before, bits=6), torch.float32):
    ...     torch.equal(layers.model.lm_head.weight, before)
    False
    >>> torch.equal(layers.model.lm_head.weight, before)
    True
    """
    before = layers.model.get_parameter(f"{name}.weight").detach().clone()
    try:
        place(layers, name, coded, dtype)
        yield
    finally:
        layers.set_parameter(f"{name}.weight", before)
