"""Collect Grams, spans, spectra and profiles in one forward pass, output Grams in one backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from globalopt.analysis.curves import layer_curves
from globalopt.analysis.layer_analysis import PROBE_OUTPUT_GRAM
from globalopt.analysis.profiles import profile_block
from globalopt.analysis.sensitivity import Sketches, backward_sweep
from globalopt.analysis.spans import compute_span
from globalopt.models.layers import ModelLayers
from globalopt.models.walk import BlockRunner, BlockVisit, walk_blocks
from globalopt.runs.artefacts import BLOCK_OUTPUT_GRAM, CURVES, GRAM, OUTPUT_GRAM, PROFILE, SPAN, Stage
from globalopt.runs.workspace import Workspace
from globalopt.values.layer import LayerSpec
from globalopt.values.metric import Gram

GRAMS_VERSION = 2
"""Raised whenever Grams, or what is stored of them, change."""

LABELS_VERSION = 2
"""Raised whenever output Grams, what is stored of them, or the labels that are sampled for them, change."""


def span_layers(
    runner: BlockRunner,
    work: Workspace,
    scaling: str,
    keep_inputs: bool,
    device: torch.device | None = None,
    advance: Callable[[str], None] = lambda detail: None,
) -> list[list[Tensor]]:
    """Compute the Gram of every site, and the span, spectra and profile of every layer, where they are missing.

    Args:
        runner: of the dense model, on the calibration text.
        work: where they are written.
        scaling: of the spans; `output` needs the output Grams that `write_output_grams` writes.
        keep_inputs: whether hidden states are returned.
        device: where a block is moved for its turn; None leaves it.
        advance: called with the name of each layer that is done.
    Returns:
        With `keep_inputs`: hidden states per block and batch, and once more after the last block, for
        `backward_sweep`. Otherwise an empty list.

    >>> from pathlib import Path
    >>> from globalopt.models.layers import find_layers
    >>> from globalopt.models.walk import Batch
    >>> from globalopt.reference.tiny import tiny_llama
    >>> layers = find_layers(tiny_llama(), allow_low_coverage=True)
    >>> runner, work = BlockRunner(layers, [Batch(torch.arange(64).view(4, 16))]), Workspace(Path("work"))
    >>> hidden = span_layers(runner, work, "activation", keep_inputs=True)
    >>> [len(batches) for batches in hidden], tuple(hidden[0][0].shape)
    ([1, 1, 1], (4, 16, 16))
    >>> work.get(SPAN, layers.specs[0]).scale.shape
    torch.Size([16])
    """
    layers = runner.layers
    inputs: list[list[Tensor]] = []
    for visit in walk_blocks(runner, device):
        grams = _grams(visit, work)
        for spec in work.missing(SPAN, visit.specs):
            outputs = work.get(PROBE_OUTPUT_GRAM, spec) if scaling == "output" else None
            span = compute_span(layers.weight(spec.name), grams[spec.site], scaling, outputs)
            work.put(SPAN, spec, span.basis)
        for spec in visit.specs:
            if not work.has(CURVES, spec.name):
                work.put(CURVES, spec.name, layer_curves(layers.weight(spec.name), grams[spec.site]))
            advance(spec.name)
        if work.missing(PROFILE, visit.specs):
            weights = {spec.name: layers.weight(spec.name) for spec in visit.specs}
            found = profile_block(weights, {spec.name: grams[spec.site] for spec in visit.specs})
            for spec in visit.specs:
                work.put(PROFILE, spec, found[spec.name])
        if keep_inputs:
            inputs += _hidden_states(visit, layers)
    return inputs


def _grams(visit: BlockVisit, work: Workspace) -> dict[str, Gram]:
    """Read the Grams of a block's sites, or compute and write them where some are missing."""
    sites = list(dict.fromkeys(spec.site for spec in visit.specs))
    if not work.missing(GRAM, sites):
        return {site: work.get(GRAM, site) for site in sites}
    grams = visit.grams()
    for site, gram in grams.items():
        work.put(GRAM, site, gram)
    return grams


def _hidden_states(visit: BlockVisit, layers: ModelLayers) -> list[list[Tensor]]:
    """Return the input hidden states of a block by batch, and for the last block its outputs too."""
    last = visit.index + 1 == len(layers.blocks)
    return [visit.inputs, visit.outputs()] if last else [visit.inputs]


def write_output_grams(
    runner: BlockRunner,
    work: Workspace,
    stage: Stage,
    specs: Sequence[LayerSpec],
    seed: int,
    device: torch.device | None = None,
    advance: Callable[[str], None] = lambda detail: None,
) -> None:
    """Compute the output Grams `A` of the layers `specs` and of all blocks, by one backward sweep, and write them.

    `A` is the second moment, per token, of the gradients of `log p(y)` at the outputs, with labels `y` sampled from
    the model's own predictions.

    Args:
        stage: the stage that they belong to.
        seed: of the labels.
        device: where a block is moved for its turn; None leaves it.
        advance: called with the name of each layer that is done.

    >>> from pathlib import Path
    >>> from globalopt.models.layers import find_layers
    >>> from globalopt.models.walk import Batch
    >>> from globalopt.reference.tiny import tiny_llama
    >>> layers = find_layers(tiny_llama(), allow_low_coverage=True)
    >>> runner, work = BlockRunner(layers, [Batch(torch.arange(64).view(4, 16))]), Workspace(Path("work"))
    >>> write_output_grams(runner, work, Stage.LABELS, layers.specs[:1], seed=0)
    >>> work.get(OUTPUT_GRAM, layers.specs[0]).tokens
    64
    """
    inputs: list[list[Tensor]] = []
    for visit in walk_blocks(runner, device):
        _grams(visit, work)
        inputs += _hidden_states(visit, runner.layers)
    of_block, of_layer = BLOCK_OUTPUT_GRAM.during(stage), OUTPUT_GRAM.during(stage)
    behind = partial(work.put, of_block)
    for found in backward_sweep(runner, inputs, specs, lambda spec: Sketches(), seed, device, behind):
        work.put(of_layer, found.spec, found.output_gram)
        advance(found.spec.name)
