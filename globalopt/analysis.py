"""What a search needs to know of a model: Grams and spans by a forward walk, prices of all options after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from globalopt.capture import BlockRunner, BlockVisit, walk_blocks
from globalopt.kernels.sketch import DenseSketch, PrefixSketch
from globalopt.layers import ModelLayers
from globalopt.profile import profile_block
from globalopt.protocols import Solver
from globalopt.sensitivity import backward_sweep
from globalopt.span import compute_span
from globalopt.store import Run
from globalopt.surface import Options, fit_anchors, gram_errors, priced, sketches
from globalopt.types import NM, ErrorSurface, Gram, LayerSpec, Metric

Priced = Iterator[tuple[ErrorSurface, Gram | None]]


def span_layers(
    runner: BlockRunner,
    run: Run,
    scaling: str,
    keep_inputs: bool,
    device: torch.device | None = None,
    advance: Callable[[str], None] = lambda detail: None,
) -> list[list[Tensor]]:
    """Write the Gram of every site, and the span and the profile of every layer that are not there yet.

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


def price_by_gradients(
    runner: BlockRunner,
    inputs: Sequence[Sequence[Tensor]],
    unpriced: Sequence[LayerSpec],
    run: Run,
    pattern: NM | None,
    pricing: Solver | None,
    weighted: bool,
    seed: int,
    device: torch.device | None = None,
) -> Priced:
    """Surfaces in nats per token with the output Grams of the layers `unpriced`, last block first.

    Args:
        pricing: fits the anchors that set the level; None takes the spans' errors as they are.
        weighted: fit in output Grams that are there already (`output_grams`), of other labels than `seed`'s: what was
            fitted to gradients looks too good when the same ones price it.
        seed: of the labels.
    """
    layers = runner.layers
    grid: dict[str, Options] = {}

    def sketches_of(spec: LayerSpec) -> list[PrefixSketch | DenseSketch]:
        weight = layers.weight(spec.name)
        span = run.read_span(spec).to(weight.device)
        grid[spec.name] = Options.of(spec, span.max_rank, pattern)
        made = sketches(span, grid[spec.name])
        if pricing is not None:
            outputs = run.read_outputs(spec).to(weight.device) if weighted else None
            metric = Metric(run.read_gram(spec.site).to(weight.device), outputs)
            lost = fit_anchors(weight, metric, grid[spec.name], pricing)
            run.write_fits(spec, grid[spec.name].anchors, lost)
            made.append(DenseSketch(lost))
        return made

    for found in backward_sweep(runner, inputs, unpriced, sketches_of, seed, device):
        options = grid.pop(found.spec.name)
        count = len(options.targets)
        weight = layers.weight(found.spec.name)
        gram = run.read_gram(found.spec.site).to(weight.device)
        whole = Metric(gram, found.outputs.to(weight.device)).error(weight) / 2
        yield priced(options, found.error[:count], found.error[count:], whole), found.outputs


def output_grams(
    runner: BlockRunner,
    run: Run,
    specs: Sequence[LayerSpec],
    seed: int,
    device: torch.device | None = None,
    advance: Callable[[str], None] = lambda detail: None,
) -> None:
    """Write the output Gram `A` of the layers `specs`, without spans and prices; `seed` is of the labels."""
    inputs: list[list[Tensor]] = []
    for visit in walk_blocks(runner, device):
        inputs += _hidden_states(visit, runner.layers)
    for found in backward_sweep(runner, inputs, specs, lambda spec: (), seed, device):
        run.write_outputs(found.spec, found.outputs)
        advance(found.spec.name)


def price_by_grams(
    layers: ModelLayers, unpriced: Sequence[LayerSpec], run: Run, pattern: NM | None, pricing: Solver | None
) -> Priced:
    """Surfaces in output error `tr(E G Eᵀ)` of the layers `unpriced`, without a backward pass."""
    for spec in unpriced:
        weight = layers.weight(spec.name)
        metric = Metric(run.read_gram(spec.site).to(weight.device))
        span = run.read_span(spec).to(weight.device)
        options, errors = gram_errors(span, Options.of(spec, span.max_rank, pattern), metric)
        lost: Sequence[Tensor] = ()
        if pricing is not None:
            fitted = fit_anchors(weight, metric, options, pricing)
            run.write_fits(spec, options.anchors, fitted)
            lost = tuple(fitted)
        yield priced(options, errors, [metric.error(E) for E in lost], metric.error(weight)), None
