"""Collect Grams, spans, spectra and profiles in one forward pass, output Grams in one backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from globalopt.analysis.curves import layer_curves
from globalopt.analysis.profiles import profile_block
from globalopt.analysis.sensitivity import backward_sweep
from globalopt.analysis.spans import compute_span
from globalopt.models.layers import ModelLayers
from globalopt.models.walk import BlockRunner, BlockVisit, walk_blocks
from globalopt.runs.folder import Run
from globalopt.values.layer import LayerSpec


def span_layers(
    runner: BlockRunner,
    run: Run,
    scaling: str,
    keep_inputs: bool,
    device: torch.device | None = None,
    advance: Callable[[str], None] = lambda detail: None,
) -> list[list[Tensor]]:
    """Write the Gram of every site, and the span, curves and profile of every layer that are not there yet.

    Args:
        scaling: of the spans; `output` reads output Grams that are there already (`output_grams`).
    Returns:
        With `keep_inputs`: hidden states per block and batch, and once more behind the last block, what
        `backward_sweep` starts from. Else nothing is held.
    """
    layers = runner.layers
    inputs: list[list[Tensor]] = []
    for visit in walk_blocks(runner, device):
        grams = visit.grams()
        for site, gram in grams.items():
            run.write_gram(site, gram)
        for spec in visit.specs:
            if not run.span_path(spec).exists():
                outputs = run.read_outputs(spec) if scaling == "output" else None
                run.write_span(spec, compute_span(layers.weight(spec.name), grams[spec.site], scaling, outputs))
            if not run.curves_path(spec).exists():
                run.write_curves(spec, layer_curves(layers.weight(spec.name), grams[spec.site]))
            advance(spec.name)
        if not all(run.profile_path(spec).exists() for spec in visit.specs):
            weights = {spec.name: layers.weight(spec.name) for spec in visit.specs}
            found = profile_block(weights, {spec.name: grams[spec.site] for spec in visit.specs})
            for spec in visit.specs:
                run.write_profile(spec, found[spec.name])
        if keep_inputs:
            inputs += _hidden_states(visit, layers)
    return inputs


def _hidden_states(visit: BlockVisit, layers: ModelLayers) -> list[list[Tensor]]:
    """What goes into a block, batch by batch; of the last one also what comes out."""
    last = visit.index + 1 == len(layers.blocks)
    return [visit.inputs, visit.outputs()] if last else [visit.inputs]


def output_grams(
    runner: BlockRunner,
    run: Run,
    specs: Sequence[LayerSpec],
    seed: int,
    device: torch.device | None = None,
    advance: Callable[[str], None] = lambda detail: None,
) -> None:
    """Write the Grams of all sites, and the output Grams `A` of the layers `specs` and of all blocks.

    Args:
        seed: of the labels.
    """
    inputs: list[list[Tensor]] = []
    for visit in walk_blocks(runner, device):
        for site, gram in visit.grams().items():
            run.write_gram(site, gram)
        inputs += _hidden_states(visit, runner.layers)
    for found in backward_sweep(runner, inputs, specs, lambda spec: (), seed, device, run.write_block_outputs):
        run.write_outputs(found.spec, found.outputs)
        advance(found.spec.name)
