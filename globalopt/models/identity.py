"""Compute fingerprints of a model's structure and of its weights."""

from __future__ import annotations

import hashlib
import json

import torch

from globalopt.models.layers import ModelLayers


def model_fingerprint(layers: ModelLayers) -> str:
    """Hash the structure of a model: its type, vocabulary size, and the names and shapes of its layers.

    A budget file must be of a model with the same fingerprint.

    >>> from globalopt.models.layers import find_layers
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
    """Hash the weights of the compressible layers as they are in memory, with their names, shapes and types.

    >>> from globalopt.models.layers import find_layers
    >>> from globalopt.reference.tiny import tiny_llama
    >>> one, other = find_layers(tiny_llama(seed=0)), find_layers(tiny_llama(seed=1))
    >>> weights_sha256(one) == weights_sha256(other)
    False
    """
    digest = hashlib.sha256()
    for index in range(len(layers.blocks)):
        with layers.resident(index):
            for spec in layers.of_block(index):
                weight = layers.module(spec.name).weight
                digest.update(f"{spec.name} {spec.d_out} {spec.d_in} {weight.dtype}".encode())
                digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
