"""What a search needs to know of a model: Grams and spans by a forward walk, prices of all options after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from globalopt.capture import BlockRunner, BlockVisit, walk_blocks
from globalopt.curves import layer_curves
from globalopt.errors import GlobalOptError
from globalopt.fit_ratio import NOT_COMPARED, FitRatio, measure_ratios, sampled
from globalopt.kernels.sketch import DenseSketch, PrefixSketch
from globalopt.layers import ModelLayers
from globalopt.objective import ModelObjective
from globalopt.profile import profile_block
from globalopt.protocols import Candidate, Solver
from globalopt.sensitivity import backward_sweep
from globalopt.span import compute_span
from globalopt.store import Run
from globalopt.surface import Options, fit_anchors, gram_errors, priced, sketches
from globalopt.types import FREE, NM, Budget, ErrorSurface, Gram, LayerSpec, Limits, Mask, Metric, Target

WEIGHED_KEPT = 0.2
"""Fraction kept at which a layer's metric is chosen; losses that grow faster than the square show there."""

MEASURED_KEPT = 0.25
"""Fits that keep at most this are priced by a measurement."""

MEASURED_WINDOWS = 4
"""Calibration windows on which single layers are measured."""


@dataclass(frozen=True, eq=False)
class Priced:
    """What pricing found of a layer.

    Args:
        outputs: its output Gram, where one was collected.
        overlap: (anchors, anchors) float64, cosines between what its fits lost, in the norm of the prices; None
            without fits.
    """

    surface: ErrorSurface
    outputs: Gram | None
    overlap: Tensor | None


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


def weigh_layers(
    runner: BlockRunner,
    unweighed: Sequence[LayerSpec],
    run: Run,
    pattern: NM | None,
    solver: Solver,
    advance: Callable[[str], None] = lambda detail: None,
    limits: Limits = FREE,
) -> None:
    """Write whether the layers `unweighed` are better fitted with their output Grams, or in `tr(E G Eᵀ)` alone.

    `A` is the curvature at no loss: an output that the loss hardly feels may still matter much once it is far off, as
    where a gate feeds a channel that the model's norms depend on. So each layer is fitted both ways at `WEIGHED_KEPT`,
    and the model is asked: KL(dense || one layer replaced) in nats per token.

    Args:
        runner: on the windows to ask about.
        solver: fits, with as much of `A` as it is made to use.
    """
    fits: dict[str, tuple[Tensor, Tensor]] = {}

    def materialise(spec: LayerSpec, kept: Target | Mask) -> Tensor:
        assert isinstance(kept, Target), "a layer is asked about as a target"
        return fits[spec.name][kept.rank] if kept.nnz == 0 else objective.dense(spec.name)

    def asked_for(spec: LayerSpec) -> Target:
        if not limits.sparse:
            return Target(max(1, int(WEIGHED_KEPT * spec.numel / (spec.d_out + spec.d_in))), 0)
        return Target(0, pattern.nnz(spec) if pattern is not None else int(WEIGHED_KEPT * spec.numel), pattern)

    objective = ModelObjective(runner, materialise)
    everything: Candidate = {spec.name: Target.dense(spec) for spec in runner.layers.specs}
    try:
        for spec in unweighed:
            dense = objective.dense(spec.name)
            target = asked_for(spec)
            gram = run.read_gram(spec.site).to(dense.device)
            metrics = Metric(gram), Metric(gram, run.read_outputs(spec).to(dense.device))
            plain, weighted = (solver.solve(solver.prepare(dense, metric), target).value.dense() for metric in metrics)
            fits[spec.name] = plain, weighted
            # Two stand-ins for what a layer may be: the objective tells candidates apart by their targets.
            asked = [{**everything, spec.name: Target(which, 0)} for which in (0, 1)]
            losses = objective.losses(asked, range(objective.chunks)).mean(1).tolist()
            run.write_weighing(spec, losses[0], losses[1])
            del fits[spec.name]
            advance(spec.name)
    finally:
        objective.close()


def fit_layers(
    layers: ModelLayers,
    unfitted: Sequence[LayerSpec],
    run: Run,
    pattern: NM | None,
    solver: Solver,
    outputs: Callable[[LayerSpec], Gram | None],
    advance: Callable[[str], None] = lambda detail: None,
    limits: Limits = FREE,
    ratio: FitRatio = NOT_COMPARED,
) -> None:
    """Write what fits by `solver` at the anchors of the layers `unfitted` lose.

    Args:
        outputs: output Gram a layer is fitted in, or None.
        ratio: what another solver leaves of the fits' errors; residuals are scaled by its root.
    """
    for spec in unfitted:
        options, metric = _to_fit(layers, run, spec, pattern, limits, outputs)
        _write_fits(run, options, fit_anchors(layers.weight(spec.name), metric, options, solver), ratio)
        advance(spec.name)


def _write_fits(run: Run, options: Options, lost: Tensor, ratio: FitRatio) -> None:
    """Write `lost` (anchors, d_out, d_in), what fits lost of a layer, with errors multiplied by `ratio`."""
    roots = [ratio.at(anchor, options.spec) ** 0.5 for row in options.anchors for anchor in row]
    run.write_fits(options.spec, options.anchors, lost * lost.new_tensor(roots)[:, None, None])


def compare_fits(
    layers: ModelLayers,
    run: Run,
    pattern: NM | None,
    quick: Solver,
    solver: Solver,
    budget: Budget,
    outputs: Callable[[LayerSpec], Gram | None],
    advance: Callable[[str], None] = lambda detail: None,
    limits: Limits = FREE,
) -> FitRatio:
    """What `solver` leaves of the errors of the fits by `quick`, from a few layers, whose fits are written too.

    What is written already is read.

    Args:
        budget: of the model.
        outputs: output Gram a layer is fitted in, or None.
    """
    measured = []
    for spec in sampled(layers.specs):
        options, metric = _to_fit(layers, run, spec, pattern, limits, outputs)
        if not run.ratios_path(spec).exists():
            weight = layers.weight(spec.name)
            try:
                lost = fit_anchors(weight, metric, options, quick)
                found = measure_ratios(weight, metric, options, lost, solver, budget)
            except GlobalOptError as cause:
                cause.args = (f"Layer {spec.name}: {cause}",)
                raise
            run.write_ratios(spec, found)
            _write_fits(run, options, lost, FitRatio.of([(options, found)]))
        measured.append((options, run.read_ratios(spec)))
        advance(spec.name)
    return FitRatio.of(measured)


def _to_fit(
    layers: ModelLayers,
    run: Run,
    spec: LayerSpec,
    pattern: NM | None,
    limits: Limits,
    outputs: Callable[[LayerSpec], Gram | None],
) -> tuple[Options, Metric]:
    """The options of a layer, and the metric it is fitted in."""
    device, found = layers.device_of(spec.block), outputs(spec)
    metric = Metric(run.read_gram(spec.site).to(device), found and found.to(device))
    return Options.of(spec, run.read_span(spec).max_rank, pattern, limits), metric


def measure_layers(
    runner: BlockRunner,
    unmeasured: Sequence[LayerSpec],
    run: Run,
    advance: Callable[[str], None] = lambda detail: None,
) -> None:
    """Write what the layers `unmeasured` cost when one at a time is left at its lowest fits, or dropped.

    A second-order price knows nothing of a loss that grows faster than the square of what is lost, and a knapsack finds
    the layers where it does. So the anchors that keep at most `MEASURED_KEPT`, and the zero option, are asked of the
    model: KL(dense || one layer replaced) in nats per token.

    Args:
        runner: on the windows to ask about.
    """
    layers = runner.layers
    fits: dict[str, _Fits] = {}

    def materialise(spec: LayerSpec, kept: Target | Mask) -> Tensor:
        dense = objective.dense(spec.name)
        if kept == Target.dense(spec):
            return dense
        if kept == Target.zero():
            return torch.zeros_like(dense)
        return dense - fits[spec.name].residual(kept).to(dense.device)

    objective = ModelObjective(runner, materialise)
    everything: Candidate = {spec.name: Target.dense(spec) for spec in layers.specs}
    try:
        for spec in unmeasured:
            fits[spec.name] = _Fits.read(run, spec)
            asked = [*fits[spec.name].low, Target.zero()]
            losses = objective.losses([{**everything, spec.name: target} for target in asked], range(objective.chunks))
            run.write_measured(spec, list(zip(asked, losses.mean(1).tolist(), strict=True)))
            del fits[spec.name]
            advance(spec.name)
    finally:
        objective.close()


@dataclass(frozen=True, eq=False)
class _Fits:
    """What fits lost of a layer, by anchor."""

    spec: LayerSpec
    anchors: tuple[Target, ...]
    residuals: Tensor

    @classmethod
    def read(cls, run: Run, spec: LayerSpec) -> _Fits:
        rows, residuals = run.read_fits(spec)
        return cls(spec, tuple(anchor for row in rows for anchor in row), residuals)

    @property
    def low(self) -> list[Target]:
        """The anchors that keep so little that they are measured."""
        return [anchor for anchor in self.anchors if anchor.params(self.spec) <= MEASURED_KEPT * self.spec.numel]

    def residual(self, anchor: Target | Mask) -> Tensor:
        """(d_out, d_in) float32."""
        return self.residuals[[known == anchor for known in self.anchors].index(True)].float()


def price_by_gradients(
    runner: BlockRunner,
    inputs: Sequence[Sequence[Tensor]],
    unpriced: Sequence[LayerSpec],
    run: Run,
    pattern: NM | None,
    seed: int,
    device: torch.device | None = None,
    limits: Limits = FREE,
) -> Iterator[Priced]:
    """Surfaces in nats per token with the output Grams of the layers `unpriced`, last block first.

    Fits that are there set the level, where they were measured by what was measured; otherwise the spans' errors stay
    as they are.

    Args:
        seed: of the labels. Fits in output Grams should be of others: what was fitted to gradients looks too good when
            the same ones price it.
    """
    layers = runner.layers
    grid: dict[str, Options] = {}

    def sketches_of(spec: LayerSpec) -> list[PrefixSketch | DenseSketch]:
        span = run.read_span(spec).to(layers.device_of(spec.block))
        grid[spec.name] = Options.of(spec, span.max_rank, pattern, limits)
        made = sketches(span, grid[spec.name])
        if run.fits_path(spec).exists():
            made.append(DenseSketch(_Fits.read(run, spec).residuals.to(span.S.device).float()))
        return made

    for found in backward_sweep(runner, inputs, unpriced, sketches_of, seed, device):
        spec, options = found.spec, grid.pop(found.spec.name)
        count = len(options.targets)
        weight = layers.weight(spec.name)
        gram = run.read_gram(spec.site).to(weight.device)
        whole = Metric(gram, found.outputs.to(weight.device)).error(weight) / 2
        measured = run.read_measured(spec) if run.measured_path(spec).exists() else {}
        anchors = [anchor for row in options.anchors for anchor in row] if len(found.error) > count else []
        lost = [measured.get(a, error) for a, error in zip(anchors, found.error[count:], strict=True)]
        zero = max(whole, measured.get(Target.zero(), 0.0))
        overlap = _cosines(found.products) if anchors and found.products is not None else None
        yield Priced(priced(options, found.error[:count], lost, zero), found.outputs, overlap)


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


def price_by_grams(
    layers: ModelLayers, unpriced: Sequence[LayerSpec], run: Run, pattern: NM | None, limits: Limits = FREE
) -> Iterator[Priced]:
    """Surfaces in output error `tr(E G Eᵀ)` of the layers `unpriced`, without a backward pass."""
    for spec in unpriced:
        weight = layers.weight(spec.name)
        metric = Metric(run.read_gram(spec.site).to(weight.device))
        span = run.read_span(spec).to(weight.device)
        options, errors = gram_errors(span, Options.of(spec, span.max_rank, pattern, limits), metric)
        anchor_errors, overlap = [], None
        if run.fits_path(spec).exists():
            lost = _Fits.read(run, spec).residuals.to(weight.device).float()
            products = ((lost @ metric.inputs.matrix).flatten(1) @ lost.flatten(1).mT).cpu().double()
            anchor_errors, overlap = [metric.error(E) for E in lost], _cosines(products)
        yield Priced(priced(options, errors, anchor_errors, metric.error(weight)), None, overlap)


def _cosines(products: Tensor) -> Tensor:
    """Inner products (k, k) over both norms; what is zero is at right angles to all else."""
    norms = products.diagonal().clamp_min(0.0).sqrt()
    norms = norms.clamp_min(torch.finfo(norms.dtype).tiny)
    found = products / norms / norms[:, None]
    return found.fill_diagonal_(1.0)
