"""Finished runs of small models, made without a search: for examples and tests of exports."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from globalopt.models.finding import find_layers
from globalopt.models.saving import save_dense
from globalopt.reference import reference_folder
from globalopt.runs.artefacts import SOLVED_LAYER, SUMMARY
from globalopt.runs.folder import Run
from globalopt.runs.records import SolvedLayer
from globalopt.values.budget import Target
from globalopt.values.decomposition import Decomposition
from globalopt.values.error_unit import ErrorUnit
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.layer_results import LayerResult
from globalopt.values.results import Summary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def example_run(folder: Path = Path("run")) -> Path:
    """Write the finished run of a tiny Llama: every layer has rank 1 and half of its nonzeros.

    Returns:
        `folder`.

    >>> run = Run.open(example_run())
    >>> layer = run.summary().layers[0]
    >>> layer.rank, layer.density
    (1, 0.5)
    """
    from transformers import AutoTokenizer

    from globalopt.reference.tiny import tiny_llama

    model = tiny_llama()
    values: dict[str, Decomposition] = {}
    layers = find_layers(model)
    for spec in layers.specs:
        W = layers.weight(spec.name)
        U, s, Vh = torch.linalg.svd(W, full_matrices=False)
        U, V = U[:, :1] * s[:1], Vh[:1]
        residual = W - U @ V
        values[spec.name] = Decomposition(residual * (residual.abs() > residual.abs().median()), U, V)
    return write_finished_run(folder, model, AutoTokenizer.from_pretrained(reference_folder()), values)


def write_finished_run(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    values: Mapping[str, Decomposition],
    patterns: Mapping[str, NM] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write the finished run in which the layers of `model` were compressed to given decompositions.

    Args:
        folder: of the run; it must not exist yet, or be empty.
        model: its weights are replaced.
        values: a decomposition in `dtype` for every layer, by name.
        patterns: N:M patterns, of the layers that have one.
        dtype: that the model is saved in.
    Returns:
        `folder`.

    >>> from transformers import AutoTokenizer
    >>> from globalopt.reference.tiny import tiny_llama
    >>> model = tiny_llama()
    >>> weights = {spec.name: find_layers(model).weight(spec.name) for spec in find_layers(model).specs}
    >>> values = {name: Decomposition(W * (W > 0), W[:, :0], W[:0]) for name, W in weights.items()}
    >>> folder = write_finished_run(Path("pruned"), model, AutoTokenizer.from_pretrained(reference_folder()), values)
    >>> Run.open(folder).summary().layers[0].rank
    0
    """
    layers = find_layers(model, allow_low_coverage=True)
    run = Run.start(folder, {"model": type(model).__name__}, {})
    for spec in layers.specs:
        run.put(SOLVED_LAYER, spec, SolvedLayer(values[spec.name], {}))
        layers.set_weight(spec.name, values[spec.name].dense())
    save_dense(model, tokenizer, run.model_folder, dtype)
    results = tuple(_result(spec, values[spec.name], (patterns or {}).get(spec.name)) for spec in layers.specs)
    run.put(SUMMARY, None, _summary(results))
    run.close()
    return folder


def _result(spec: LayerSpec, value: Decomposition, pattern: NM | None) -> LayerResult:
    """Make the result of a layer from its decomposition."""
    return LayerResult(
        name=spec.name,
        block=spec.block,
        kind=spec.kind,
        d_out=spec.d_out,
        d_in=spec.d_in,
        rank=value.rank,
        nnz=value.nnz,
        pattern=str(pattern) if pattern else None,
        storage=str(value.storage),
        cost=Target(value.rank, value.nnz, signs=value.signs is not None).params(spec),
        dense_cost=spec.numel,
        predicted=None,
        actual=0.0,
        relative=0.0,
        status="converged",
        damping=0.0,
        seconds=0.0,
    )


def _summary(layers: tuple[LayerResult, ...]) -> Summary:
    """Make the summary of a run that was not evaluated."""
    used, total = sum(layer.cost for layer in layers), sum(layer.dense_cost for layer in layers)
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
