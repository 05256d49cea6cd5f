"""Fingerprints of a model and of its weights."""

from __future__ import annotations

import hashlib
import json

import torch

from globalopt.models.layers import ModelLayers


def model_fingerprint(layers: ModelLayers) -> str:
    """sha256 (hex) of what a budget must agree with: model type, vocabulary size, names and shapes of the layers."""
    config = layers.model.config
    identity = {
        "model_type": config.model_type,
        "vocab_size": config.get_text_config(decoder=True).vocab_size,
        "layers": [[spec.name, spec.d_out, spec.d_in] for spec in layers.specs],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def weights_sha256(layers: ModelLayers) -> str:
    """sha256 (hex) of the weights of the compressible layers, with their names and types, as they are in memory."""
    digest = hashlib.sha256()
    for index in range(len(layers.blocks)):
        with layers.resident(index):
            for spec in layers.of_block(index):
                weight = layers.module(spec.name).weight
                digest.update(f"{spec.name} {spec.d_out} {spec.d_in} {weight.dtype}".encode())
                digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
