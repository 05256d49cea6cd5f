"""Collect Grams in one forward pass, output Grams in one backward pass; from them spans, spectra and profiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from globalopt.analysis.curves import layer_curves
from globalopt.analysis.profiles import profile_block
from globalopt.analysis.sensitivity import backward_sweep, label_gradients
from globalopt.analysis.spans import compute_span
from globalopt.kernels.precision import RoughLinear
from globalopt.machine import ranks
from globalopt.models.block_runner import BlockRunner
from globalopt.models.layers import ModelLayers
from globalopt.models.walk import BlockVisit, walk_blocks
from globalopt.runs.artefacts import BLOCK_OUTPUT_GRAM, CURVES, DIRECTIONS, GRAM, OUTPUT_GRAM, PROFILE, SPAN
from globalopt.runs.workspace import Workspace
from globalopt.values.layer import LayerSpec
from globalopt.values.metric import Gram

GRAMS_VERSION = 5
"""Raised whenever Grams, or what is stored of them, change."""

LABELS_VERSION = 6
"""Raised whenever output Grams, what is stored of them, or the labels that are sampled for them, change."""

ANALYSED = 2
"""Of so many batches one is analysed. Predictions need fewer tokens than refinement, which computes Grams of its own
from all of them: on the bundled model at 0.5, output Grams of half of the batches changed the KL by 3 % on validation
and less than 1 % on test."""


def write_grams(
    runner: BlockRunner,
    work: Workspace,
    device: torch.device | None = None,
    advance: Callable[[str], None] = lambda detail: None,
) -> None:
    """Compute the Gram of every site by one forward pass over one of `ANALYSED` batches, and write what is missing.

    Linear layers multiply in bfloat16 where a CPU is faster at it (`RoughLinear`); the moments are float32.

    Args:
        runner: of the dense model, on the calibration text.
        device: where a block is moved for its turn; None leaves it.
        advance: called with the number of each block that is done.

    >>> from pathlib import Path
    >>> from globalopt.models.batch import Batch
    >>> from globalopt.models.finding import find_layers
    >>> from globalopt.reference.tiny import tiny_llama
    >>> layers = find_layers(tiny_llama(), allow_low_coverage=True)
    >>> work = Workspace(Path("work"))
    >>> write_grams(BlockRunner(layers, [Batch(torch.arange(64).view(4, 16))]), work)
    >>> work.get(GRAM, layers.specs[0].site).tokens
    64
    """
    with RoughLinear():
        for visit in walk_blocks(runner.some(ANALYSED), device):
            _grams(visit, work)
            advance(f"block {visit.index}")
    ranks.written(work)


def write_output_grams(
    runner: BlockRunner,
    work: Workspace,
    specs: Sequence[LayerSpec],
    seed: int,
    device: torch.device | None = None,
    advance: Callable[[str], None] = lambda detail: None,
) -> None:
    """Compute the output Grams `A` of the layers `specs` and of all blocks, by one backward sweep, and write them.

    `A` is the second moment, per token, of the gradients of `log p(y)` at the outputs, with labels `y` sampled from
    the model's own predictions, on one of `ANALYSED` batches. The forward pass before it computes the Grams of all
    sites too, where they are missing.

    Args:
        seed: of the labels.
        device: where a block is moved for its turn; None leaves it.
        advance: called with the name of each layer that is done.

    >>> from pathlib import Path
    >>> from globalopt.models.batch import Batch
    >>> from globalopt.models.finding import find_layers
    >>> from globalopt.reference.tiny import tiny_llama
    >>> layers = find_layers(tiny_llama(), allow_low_coverage=True)
    >>> runner, work = BlockRunner(layers, [Batch(torch.arange(64).view(4, 16))]), Workspace(Path("work"))
    >>> write_output_grams(runner, work, layers.specs[:1], seed=0)
    >>> work.get(OUTPUT_GRAM, layers.specs[0]).tokens
    64
    """
    analysed = runner.some(ANALYSED)
    inputs: list[list[Tensor]] = []
    with RoughLinear():
        for visit in walk_blocks(analysed, device):
            _grams(visit, work)
            inputs += _hidden_states(visit, runner.layers)
    upstream = label_gradients(analysed, inputs[-1], seed, rough=True)

    def behind(block: int, gram: Gram) -> None:
        if ranks.owns(block):
            work.put(BLOCK_OUTPUT_GRAM, block, gram)

    sweep = backward_sweep(analysed, inputs, specs, upstream, device, behind=behind, rough=True)
    for number, found in enumerate(sweep):
        assert found.output_gram is not None
        if ranks.owns(number):
            work.put(OUTPUT_GRAM, found.spec, found.output_gram)
        advance(found.spec.name)
    ranks.written(work)


def _grams(visit: BlockVisit, work: Workspace) -> None:
    """Compute and write the Grams of a block's sites, where some are missing."""
    sites = list(dict.fromkeys(spec.site for spec in visit.specs))
    if ranks.told(bool(work.missing(GRAM, sites))):
        for number, (site, gram) in enumerate(visit.grams().items()):
            if ranks.owns(number):
                work.put(GRAM, site, gram)


def _hidden_states(visit: BlockVisit, layers: ModelLayers) -> list[list[Tensor]]:
    """Return the input hidden states of a block by batch, and for the last block its outputs too."""
    last = visit.index + 1 == len(layers.blocks)
    return [visit.inputs, visit.outputs()] if last else [visit.inputs]


def write_spans(
    layers: ModelLayers,
    work: Workspace,
    specs: Sequence[LayerSpec],
    scaling: str,
    directions: Callable[[LayerSpec, int], int | None] = lambda spec, rank: rank,
    advance: Callable[[str], None] = lambda detail: None,
) -> None:
    """Compute the spans of the layers `specs`, and write them.

    Args:
        layers: of the dense model.
        work: with the Grams of the layers.
        scaling: of the spans; `output` needs the output Grams that `write_output_grams` writes.
        directions: how many of the directions that a layer's span has are stored; None where they are not read.
        advance: called with the name of each layer that is done.

    >>> from pathlib import Path
    >>> from globalopt.models.finding import find_layers
    >>> from globalopt.reference.tiny import tiny_llama
    >>> layers, work = find_layers(tiny_llama(), allow_low_coverage=True), Workspace(Path("work"))
    >>> write_spans(layers, work, layers.specs[:1], "none")
    >>> work.get(SPAN, layers.specs[0]).scale.shape
    torch.Size([16])
    """
    for spec in specs:
        weight = layers.weight(spec.name)
        gram = None if scaling == "none" else work.get(GRAM, spec.site).to(weight.device)
        outputs = work.get(OUTPUT_GRAM, spec) if scaling == "output" else None
        basis = compute_span(weight, gram, scaling, outputs).basis
        work.put(SPAN, spec, basis.leading(0))
        if (count := directions(spec, basis.max_rank)) is not None:
            work.put(DIRECTIONS, spec, basis.leading(count))
        advance(spec.name)


def write_curves(
    layers: ModelLayers,
    work: Workspace,
    specs: Sequence[LayerSpec],
    advance: Callable[[str], None] = lambda detail: None,
) -> None:
    """Compute the singular values and saliencies of the layers `specs`, as curves for reports, and write them.

    >>> from pathlib import Path
    >>> from globalopt.models.finding import find_layers
    >>> from globalopt.reference.tiny import tiny_llama
    >>> from globalopt.values.metric import Gram
    >>> layers, work = find_layers(tiny_llama(), allow_low_coverage=True), Workspace(Path("work"))
    >>> work.put(GRAM, layers.specs[0].site, Gram(torch.eye(16), 64))
    >>> write_curves(layers, work, layers.specs[:1])
    >>> work.get(CURVES, layers.specs[0].name).singular.count
    16
    """
    for spec in specs:
        weight = layers.weight(spec.name)
        work.put(CURVES, spec.name, layer_curves(weight, work.get(GRAM, spec.site).to(weight.device)))
        advance(spec.name)


def write_profiles(
    layers: ModelLayers,
    work: Workspace,
    blocks: Sequence[int],
    advance: Callable[[str], None] = lambda detail: None,
) -> None:
    """Compute the profiles of the layers of some blocks, which one-shot allocators read, and write them.

    >>> from pathlib import Path
    >>> from globalopt.models.batch import Batch
    >>> from globalopt.models.finding import find_layers
    >>> from globalopt.reference.tiny import tiny_llama
    >>> layers, work = find_layers(tiny_llama(), allow_low_coverage=True), Workspace(Path("work"))
    >>> write_grams(BlockRunner(layers, [Batch(torch.arange(64).view(4, 16))]), work)
    >>> write_profiles(layers, work, [0])
    >>> work.get(PROFILE, layers.specs[0]).alpha > 1
    True
    """
    for block in blocks:
        specs = layers.of_block(block)
        weights = {spec.name: layers.weight(spec.name) for spec in specs}
        grams = {spec.name: work.get(GRAM, spec.site).to(weights[spec.name].device) for spec in specs}
        found = profile_block(weights, grams)
        for spec in specs:
            work.put(PROFILE, spec, found[spec.name])
        advance(f"block {block}")
