"""A model is told by the shapes of its layers, and its weights by their values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from globalopt.models.finding import find_layers
from globalopt.models.identity import model_fingerprint, weights_sha256
from globalopt.models.loading import load_model
from tests.tiny_models import KINDS, save_tiny, tiny_model


def test_the_fingerprint_is_of_the_shapes_and_never_of_weights_or_place(tmp_path: Path) -> None:
    here = find_layers(load_model(save_tiny(tmp_path / "a", seed=0), device="cpu").model)
    there = find_layers(load_model(save_tiny(tmp_path / "b", seed=1), device="cpu").model)
    assert model_fingerprint(here) == model_fingerprint(there)
    assert weights_sha256(here) != weights_sha256(there)
    fingerprints = {model_fingerprint(find_layers(tiny_model(k), allow_low_coverage=True)) for k in KINDS}
    assert len(fingerprints) == len(KINDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_hash_of_the_weights_sees_one_changed_value(dtype: torch.dtype, tmp_path: Path) -> None:
    layers = find_layers(load_model(save_tiny(tmp_path, dtype=dtype), dtype=str(dtype)[6:], device="cpu").model)
    before = weights_sha256(layers)
    weight = layers.module(layers.specs[-1].name).weight
    value = weight[0, 0].clone()
    weight[0, 0] = value + 1
    assert weights_sha256(layers) != before
    weight[0, 0] = value
    assert weights_sha256(layers) == before
