"""Single-layer losses: the KL divergence from the dense model when one layer at a time is replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from globalopt.analysis.fits import _Fits
from globalopt.models.walk import BlockRunner
from globalopt.objective.kl_to_dense import ModelObjective, Weight
from globalopt.protocols import Solver
from globalopt.runs.folder import Run
from globalopt.values.budget import FREE, Limits, Target
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.metric import Gram, Metric

WEIGHED_KEPT = 0.2
"""Fraction kept at which a layer's error metric is chosen; losses that grow faster than the square show there."""

MEASURED_WINDOWS = 4
"""Calibration windows on which single-layer losses are computed."""


@dataclass(frozen=True)
class MetricChoice:
    """The losses by which the error metric of a layer is chosen, in nats per token.

    Args:
        spec: the layer.
        plain: the loss with the layer solved in its input Gram alone, `tr(E G Eᵀ)`.
        weighted: the loss with the layer solved in its output Gram too, `tr(A E G Eᵀ)`.

    >>> spec = LayerSpec("layer", 0, "layer", "q_proj", 4, 4)
    >>> MetricChoice(spec, plain=0.5, weighted=0.3).uses_outputs
    True
    """

    spec: LayerSpec
    plain: float
    weighted: float

    @property
    def uses_outputs(self) -> bool:
        """Whether the loss is no larger with the output Gram."""
        return self.weighted <= self.plain


def choose_metrics(
    runner: BlockRunner,
    grams: Iterable[tuple[LayerSpec, Gram, Gram]],
    solver: Solver,
    pattern: NM | None = None,
    limits: Limits = FREE,
) -> Iterator[MetricChoice]:
    """Compute the single-layer losses of solutions with and without the output Gram, layer by layer.

    The output Gram `A` is the curvature at no loss: an output to which the loss is almost insensitive may still matter
    much once it is far off, as where a gate feeds a channel that the model's norms depend on. So each layer is solved
    in both metrics at `WEIGHED_KEPT`, and the loss of the model with this layer alone replaced decides. The model is
    dense whenever a layer is taken from `grams` or a choice is yielded.

    Args:
        runner: of the dense model, on the windows of the losses.
        grams: layers with their input Gram `G` and their output Gram `A`; moved to the layer's device.
        solver: solves the layers, with as much of `A` as its options say.
        pattern, limits: of the targets.

    >>> from globalopt.models.layers import find_layers
    >>> from globalopt.models.walk import Batch
    >>> from globalopt.reference.tiny import tiny_llama
    >>> from solvers import get_solver
    >>> layers = find_layers(tiny_llama(), allow_low_coverage=True)
    >>> runner = BlockRunner(layers, [Batch(torch.arange(48).reshape(3, 16))])
    >>> spec = layers.specs[0]
    >>> grams = [(spec, Gram(torch.eye(16), 48), Gram(torch.eye(16), 48))]
    >>> (choice,) = choose_metrics(runner, grams, get_solver("3basil", {"steps": "5"}))
    >>> choice.spec == spec, choice.plain > 0, choice.weighted > 0
    (True, True, True)
    """
    model = ModelObjective(runner)
    for spec, inputs, outputs in grams:
        dense = model.dense(spec.name)
        gram = inputs.to(dense.device)
        metrics = Metric(gram), Metric(gram, outputs.to(dense.device))
        target = _probed_target(spec, pattern, limits)
        solved = [solver.solve(solver.prepare(dense, metric), target).value.dense() for metric in metrics]
        plain, weighted = _losses(model, spec, solved)
        yield MetricChoice(spec, plain, weighted)


def single_layer_losses(
    runner: BlockRunner, residuals: Iterable[tuple[LayerSpec, Mapping[Target, Tensor]]]
) -> Iterator[tuple[LayerSpec, dict[Target, float]]]:
    """Compute the losses of solutions of single layers, and of the model without the layer.

    The second-order prediction knows nothing of a loss that grows faster than the square of the error, and a knapsack
    finds the layers where it does. So the solutions that keep least, and the zero target, are evaluated on the model:
    KL(dense || one layer replaced). The model is dense whenever a layer is taken from `residuals` or one is yielded.

    Args:
        runner: of the dense model, on the windows of the losses.
        residuals: layers, with the residual `E` (d_out, d_in) of a solution at each target, in any float dtype; the
            layer is replaced by `W - E`.
    Yields:
        every layer with its losses in nats per token, by target; `Target.zero()` last.

    >>> from globalopt.models.layers import find_layers
    >>> from globalopt.models.walk import Batch
    >>> from globalopt.reference.tiny import tiny_llama
    >>> layers = find_layers(tiny_llama(), allow_low_coverage=True)
    >>> runner = BlockRunner(layers, [Batch(torch.arange(48).reshape(3, 16))])
    >>> spec = layers.specs[0]
    >>> tenth = {Target(0, 128): 0.1 * layers.weight(spec.name)}  # a solution that shrinks the weight by a tenth
    >>> ((of, losses),) = single_layer_losses(runner, [(spec, tenth)])
    >>> of == spec, losses[Target(0, 128)] < losses[Target.zero()]
    (True, True)
    """
    model = ModelObjective(runner)
    for spec, by_target in residuals:
        dense = model.dense(spec.name)
        weights: dict[Target, Weight] = {
            target: lambda E=E, W=dense: W - E.float().to(W.device) for target, E in by_target.items()
        }
        weights[Target.zero()] = torch.zeros_like(dense)
        losses = _losses(model, spec, list(weights.values()))
        yield spec, dict(zip(weights, losses, strict=True))


def _losses(model: ModelObjective, spec: LayerSpec, weights: Sequence[Weight]) -> list[float]:
    """Mean losses on all windows with the layer replaced by each of `weights`; the model is dense after it."""
    try:
        return model.losses_of([{spec.name: weight} for weight in weights], range(model.chunks)).mean(1).tolist()
    finally:
        model.close()


def _probed_target(spec: LayerSpec, pattern: NM | None, limits: Limits) -> Target:
    """The target at which a metric is chosen: sparse, or of low rank where sparse parts are not allowed."""
    if not limits.sparse:
        return Target(max(1, int(WEIGHED_KEPT * spec.numel / (spec.d_out + spec.d_in))), 0)
    return Target(0, pattern.nnz(spec) if pattern is not None else int(WEIGHED_KEPT * spec.numel), pattern)


def weigh_layers(
    runner: BlockRunner,
    unweighed: Sequence[LayerSpec],
    run: Run,
    pattern: NM | None,
    solver: Solver,
    advance: Callable[[str], None] = lambda detail: None,
    limits: Limits = FREE,
) -> None:
    """Write the losses by which the error metrics of the layers `unweighed` are chosen; see `choose_metrics`.

    >>> from pathlib import Path
    >>> from globalopt.models.layers import find_layers
    >>> from globalopt.models.walk import Batch
    >>> from globalopt.reference.tiny import tiny_llama
    >>> runner = BlockRunner(find_layers(tiny_llama(), True), [Batch(torch.arange(48).reshape(3, 16))])
    >>> run = Run.start(Path("run"), {}, {})
    >>> from solvers import get_solver
    >>> weigh_layers(runner, [], run, None, get_solver("3basil", {}))  # no layer is left to decide
    """
    grams = ((spec, run.read_gram(spec.site), run.read_outputs(spec)) for spec in unweighed)
    for choice in choose_metrics(runner, grams, solver, pattern, limits):
        run.write_weighing(choice.spec, choice.plain, choice.weighted)
        advance(choice.spec.name)


def measure_layers(
    runner: BlockRunner,
    unmeasured: Sequence[LayerSpec],
    run: Run,
    advance: Callable[[str], None] = lambda detail: None,
) -> None:
    """Write the losses of the anchor solutions that keep least, layer by layer; see `single_layer_losses`.

    >>> from pathlib import Path
    >>> from globalopt.models.layers import find_layers
    >>> from globalopt.models.walk import Batch
    >>> from globalopt.reference.tiny import tiny_llama
    >>> runner = BlockRunner(find_layers(tiny_llama(), True), [Batch(torch.arange(48).reshape(3, 16))])
    >>> run = Run.start(Path("run"), {}, {})
    >>> measure_layers(runner, [], run)  # no layer is left to evaluate
    """

    def residuals(spec: LayerSpec) -> dict[Target, Tensor]:
        fits = _Fits.read(run, spec)
        return {target: fits.residuals[fits.anchors.index(target)] for target in fits.low}

    for spec, losses in single_layer_losses(runner, ((spec, residuals(spec)) for spec in unmeasured)):
        run.write_measured(spec, list(losses.items()))
        advance(spec.name)
