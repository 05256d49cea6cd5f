"""Choose the error metric of a layer: with the output Gram, or by the input Gram alone where that is the better one.

The output Gram `A` is the curvature at no loss: an output to which the loss is almost insensitive may still matter
much once it is far off, as where a gate feeds a channel that the model's norms depend on. Such layers are few. They are
found with one pass forward and backward: all layers are replaced by cheap solutions, and those whose share in the loss
(`attribution`) is far above what is predicted are replaced alone, one after the other. A layer whose loss then
contradicts its prediction is solved in the other metric too, and the lower loss decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import median_low

import torch
from torch import Tensor

from globalopt.analysis.attribution import attribute
from globalopt.analysis.layer_analysis import LayerAnalysis
from globalopt.machine import ranks
from globalopt.objective.kl_to_dense import ModelObjective, Weight
from globalopt.protocols import Solver
from globalopt.runs.records import AnchorSolutions, CheckedLoss, MetricChoice
from globalopt.values.budget import NO_LIMITS, Limits, Target
from globalopt.values.layer import NM, LayerSpec

VERSION = 4
"""Raised whenever choices of metrics change."""

KEPT = 0.22
"""Fraction kept at which metrics are compared where there are no anchor solutions."""

CHECKED_KEPT = 0.35
"""Anchors that keep at most this fraction are checked: losses that grow faster than the square show there."""

CONTRADICTED = 2.0
"""Times the usual ratio to the prediction, which is at least 1, above which a share or a loss contradicts it."""

LEAST = 1e-30
"""Predictions below are none."""

WINDOWS = 4
"""Calibration windows on which shares and losses are computed; what is looked for is off by a factor, not by noise."""


def probed_target(spec: LayerSpec, pattern: NM | None = None, limits: Limits = NO_LIMITS) -> Target:
    """Return the target at which a metric is chosen: sparse, or of low rank where sparse parts are not allowed.

    >>> probed_target(LayerSpec("up", 0, "in", "up", 10, 10))
    Target(rank=0, nnz=22)
    """
    if not limits.sparse:
        return Target(max(1, int(KEPT * spec.numel / (spec.d_out + spec.d_in))), 0)
    return Target(0, pattern.nnz(spec) if pattern is not None else int(KEPT * spec.numel), pattern)


def choose_metrics(
    analysis: LayerAnalysis,
    model: ModelObjective,
    specs: Sequence[LayerSpec],
    solutions: Callable[[LayerSpec], AnchorSolutions],
    probe: Solver,
    device: torch.device | None = None,
) -> Iterator[tuple[LayerSpec, MetricChoice]]:
    """Choose the error metrics of the layers `specs`: `tr(A E G Eᵀ)` or `tr(E G Eᵀ)`.

    Args:
        analysis: with Grams and output Grams of the layers.
        model: of the dense model, which it is again whenever a choice is yielded.
        solutions: reads the solutions of a layer with its output Gram, of which those that keep little are checked.
        probe: solves the layers that are doubted by their input Gram alone.
        device: where a block is moved for its turn; None leaves it.

    >>> from pathlib import Path
    >>> from globalopt.analysis.collect import write_output_grams
    >>> from globalopt.models.batch import Batch
    >>> from globalopt.models.block_runner import BlockRunner
    >>> from globalopt.models.finding import find_layers
    >>> from globalopt.reference.tiny import tiny_llama
    >>> from globalopt.runs.workspace import Workspace
    >>> from solvers import get_solver
    >>> layers, work = find_layers(tiny_llama(), allow_low_coverage=True), Workspace(Path("work"))
    >>> runner = BlockRunner(layers, [Batch(torch.arange(48).reshape(3, 16))])
    >>> write_output_grams(runner, work, layers.specs, seed=0)
    >>> analysis, probe = LayerAnalysis(layers, work, weighted=True), get_solver("3basil", {"steps": "5"})
    >>> def solutions(spec):
    ...     target = probed_target(spec)
    ...     state = probe.prepare(layers.weight(spec.name), analysis.loss_metric(spec))
    ...     return AnchorSolutions(((target,),), (probe.solve(state, target).value,))
    >>> len(dict(choose_metrics(analysis, ModelObjective(runner), layers.specs, solutions, probe)))
    14
    """
    # Not all of a model's solutions are held at once: each is read when its weight is put into the model.
    checked = {spec: _checked(spec, solutions(spec)) for spec in specs}
    weights = {spec.name: partial(_weight, solutions, spec, targets[-1]) for spec, targets in checked.items()}
    try:
        shares = attribute(model, weights, range(model.chunks), device).shares
    finally:
        model.close()
    mine = ranks.share(specs, LayerSpec.solve_cost)
    predicted = ranks.merged({spec: _predicted(analysis, model, spec, weights[spec.name]()) for spec in mine})
    ratios = {spec: float(shares[spec.name].mean()) / max(predicted[spec], LEAST) for spec in specs}
    # A prediction that is met is one more layer: of one or two, the usual ratio would be that of the odd one. Where all
    # layers together ruin the model, shares are small, and what is no more than predicted is no contradiction.
    most = CONTRADICTED * max(1.0, median_low([1.0, *ratios.values()]))
    doubted = [spec for spec in specs if ratios[spec] > most]
    # All in one call: the dense blocks before a layer are not run again for every layer.
    alone = dict(zip(doubted, _losses(model, [{spec.name: weights[spec.name]} for spec in doubted]), strict=True))
    for spec in specs:
        if spec in alone and alone[spec] > most * predicted[spec]:
            yield spec, _choice(analysis, model, spec, checked[spec], solutions, probe, (predicted[spec], alone[spec]))
        else:
            yield spec, MetricChoice()


def _checked(spec: LayerSpec, found: AnchorSolutions) -> tuple[Target, ...]:
    """Return the targets of a layer's first row of solutions that keep little, and at least the first of them."""
    row = found.rows[0]
    few = tuple(t for t in row if t.params(spec) <= CHECKED_KEPT * spec.numel)
    return few or row[:1]


def _weight(solutions: Callable[[LayerSpec], AnchorSolutions], spec: LayerSpec, target: Target) -> Tensor:
    found = solutions(spec)
    return found.values[found.anchors.index(target)].dense()


def _predicted(analysis: LayerAnalysis, model: ModelObjective, spec: LayerSpec, weight: Tensor) -> float:
    dense = model.dense(spec.name)
    return analysis.loss_metric(spec).error(dense - weight.to(dense.device)) / 2


def _losses(model: ModelObjective, groups: Sequence[Mapping[str, Weight]]) -> list[float]:
    """Compute the mean loss with each group of weights in the model; the model is dense after it."""
    if not groups:
        return []
    try:
        return model.losses_of(groups, range(model.chunks)).mean(1).tolist()
    finally:
        model.close()


def _choice(
    analysis: LayerAnalysis,
    model: ModelObjective,
    spec: LayerSpec,
    targets: Sequence[Target],
    solutions: Callable[[LayerSpec], AnchorSolutions],
    probe: Solver,
    known: tuple[float, float],
) -> MetricChoice:
    """Solve a layer whose loss contradicts its prediction in the other metric too, and measure both.

    Args:
        known: predicted and measured loss at the last of the targets.
    """
    state = probe.prepare(model.dense(spec.name), analysis.plain_metric(spec))
    plain = [solution.value.dense() for solution in probe.solve_path(state, targets)]
    weighted = [_weight(solutions, spec, target) for target in targets[:-1]]
    losses = _losses(model, [{spec.name: weight} for weight in (*weighted, *plain)])
    rows = zip(
        targets,
        (*(_predicted(analysis, model, spec, weight) for weight in weighted), known[0]),
        (*losses[: len(weighted)], known[1]),
        losses[len(weighted) :],
        strict=True,
    )
    return MetricChoice(tuple(CheckedLoss(*row) for row in rows))
