"""Finished runs, made by hand: every way a layer can be kept, in a model small enough to export in a moment."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from globalopt.export.example import write_finished_run
from globalopt.models.finding import find_layers
from globalopt.rounding.stored import stored
from globalopt.values.decomposition import Decomposition
from globalopt.values.layer import NM
from globalopt.values.metric import Gram, Metric
from globalopt.values.storage import PLAIN, Storage
from tests.tiny_models import tiny_model, tiny_tokenizer

ALL = ("both", "sparse", "factors", "dense", "2:4", "zero", "few", "full")


def made_run(
    folder: Path,
    kind: str = "llama",
    dtype: torch.dtype = torch.float32,
    kinds: tuple[str, ...] = ALL,
    storages: tuple[Storage, ...] = (PLAIN,),
) -> Path:
    """A finished run of a tiny model of architecture `kind`, its layers decomposed and stored as `kinds` and `storages`
    say in turn."""
    model = tiny_model(kind)
    layers = find_layers(model, allow_low_coverage=True)
    ways = dict(zip((spec.name for spec in layers.specs), cycle(kinds), strict=False))
    patterns = {name: NM(2, 4) for name, how in ways.items() if how == "2:4"}
    values = {}
    for (name, how), storage in zip(ways.items(), cycle(storages), strict=False):
        value = decomposed(layers.weight(name), how)
        if not storage.plain and how not in ("zero", "signs"):
            value = in_few_bits(value, layers.weight(name), storage, patterns.get(name))
        values[name] = _in(value, dtype)
    return write_finished_run(folder, model, tiny_tokenizer(), values, patterns, dtype)


def decomposed(W: Tensor, how: str, seed: int = 0) -> Decomposition:
    """`W` (d_out, d_in) as a decomposition of the kind `how`."""
    d_out, d_in = W.shape
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    rank = {"both": 3, "factors": 5, "2:4": 2, "few": 1, "full": 2, "signs": 1}.get(how, 0)
    U, V = U[:, :rank] * s[:rank], Vh[:rank]
    signs = None
    if how == "signs":
        signs = W.sign()
        signs[signs == 0] = 1
    L = U @ V if signs is None else (U @ V) * signs
    R = W - L
    if how in ("dense", "full"):
        return Decomposition(R, U, V)
    if how in ("factors", "zero"):
        return Decomposition(torch.zeros_like(W), U, V)
    if how == "2:4":
        groups = R.reshape(-1, 4)
        mask = torch.zeros_like(groups).scatter_(1, groups.abs().topk(2, dim=1).indices, 1.0)
        # A group may have fewer than its pattern allows.
        mask[0] = 0
        return Decomposition((groups * mask).reshape(d_out, d_in), U, V)
    keep = max(1, W.numel() // (200 if how == "few" else 2))
    threshold = R.abs().flatten().topk(keep).values[-1]
    return Decomposition(R * (R.abs() >= threshold), U, V, signs)


def in_few_bits(value: Decomposition, W: Tensor, storage: Storage, pattern: NM | None = None) -> Decomposition:
    """`value` on the grids of `storage`, as a run would store it."""
    return stored(value, W, Metric(Gram(torch.eye(W.shape[1]), tokens=1)), storage, pattern)


def _in(value: Decomposition, dtype: torch.dtype) -> Decomposition:
    return Decomposition(value.S.to(dtype), value.U.to(dtype), value.V.to(dtype), value.signs, value.scales)


def assert_same_export(again: Path, before: Path) -> None:
    """Assert that two folders hold the same config and the same tensors, to the bit."""
    assert (again / "config.json").read_bytes() == (before / "config.json").read_bytes()
    found, expected = (load_file(folder / "model.safetensors") for folder in (again, before))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
