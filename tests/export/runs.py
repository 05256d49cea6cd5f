"""Finished runs, made by hand: every way a layer can be kept, in a model small enough to export in a moment."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from globalopt.models.layers import find_layers
from globalopt.models.saving import save_dense
from globalopt.runs.folder import Run
from globalopt.values.decomposition import Decomposition
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.results import ErrorUnit, LayerResult, Summary
from tests.tiny_models import tiny_model, tiny_tokenizer

ALL = ("both", "sparse", "factors", "dense", "2:4", "zero", "few", "full")


def made_run(
    folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, kinds: tuple[str, ...] = ALL
) -> Path:
    """A finished run of a tiny model of architecture `kind`, its layers decomposed as `kinds` say in turn."""
    model = tiny_model(kind)
    layers = find_layers(model, allow_low_coverage=True)
    run = Run.start(folder, {"model": kind}, {})
    results = []
    for spec, how in zip(layers.specs, cycle(kinds), strict=False):
        value = _in(decomposed(layers.weight(spec.name), how), dtype)
        run.write_layer(spec, value, {})
        layers.set_weight(spec.name, value.dense())
        results.append(_result(spec, value, how))
    save_dense(model, tiny_tokenizer(), run.model_folder, dtype)
    run.write_summary(_summary(tuple(results)))
    return folder


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


def _in(value: Decomposition, dtype: torch.dtype) -> Decomposition:
    return Decomposition(value.S.to(dtype), value.U.to(dtype), value.V.to(dtype), value.signs)


def _result(spec: LayerSpec, value: Decomposition, how: str) -> LayerResult:
    return LayerResult(
        name=spec.name,
        block=spec.block,
        kind=spec.kind,
        d_out=spec.d_out,
        d_in=spec.d_in,
        rank=value.rank,
        nnz=value.nnz,
        pattern=str(NM(2, 4)) if how == "2:4" else None,
        cost=value.nnz,
        dense_cost=spec.numel,
        predicted=None,
        actual=0.0,
        relative=0.0,
        status="converged",
        damping=0.0,
        seconds=0.0,
    )


def _summary(layers: tuple[LayerResult, ...]) -> Summary:
    used = sum(layer.cost for layer in layers)
    total = sum(layer.dense_cost for layer in layers)
    return Summary(
        command="globalopt search",
        model="tiny",
        allocator="uniform",
        solver="3basil",
        seed=0,
        accounting="params",
        asked=0.5,
        limit=used,
        used=used,
        total=total,
        predicted=0.0,
        bound=None,
        error_unit=ErrorUnit.NATS,
        budget_unit=ErrorUnit.NATS,
        covered=total,
        block_params=total,
        skipped={},
        layers=layers,
        dense=(),
        compressed=(),
        stages=(),
        splits={},
    )
