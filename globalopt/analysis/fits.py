"""Fit every layer at a few anchor targets, and compare the quick solver with the real one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from globalopt.analysis.fit_ratio import NOT_COMPARED, FitRatio, measure_ratios, sampled
from globalopt.analysis.grid import Options
from globalopt.analysis.surfaces import fit_anchors
from globalopt.errors import GlobalOptError
from globalopt.models.layers import ModelLayers
from globalopt.protocols import Solver
from globalopt.runs.folder import Run
from globalopt.values.budget import FREE, Budget, Limits, Target
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.metric import Gram, Metric
from globalopt.values.span import Mask

MEASURED_KEPT = 0.25
"""Fits that keep at most this are priced by a measurement."""


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
