"""Read the analysis of a layer from artefacts: its options, its error metric, the residuals of its anchor solutions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from globalopt.analysis.grid import Options
from globalopt.analysis.solver_gap import NO_GAP, SolverGap, sampled
from globalopt.models.layers import ModelLayers
from globalopt.runs.artefacts import ANCHORS, GRAM, METRIC_CHOICE, OUTPUT_GRAM, SOLVER_GAP, SPAN, Stage
from globalopt.runs.workspace import Workspace
from globalopt.values.budget import NO_LIMITS, Limits, Target
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.metric import Gram, Metric
from globalopt.values.span import Span

PROBE_OUTPUT_GRAM = OUTPUT_GRAM.during(Stage.PROBE_LABELS)
"""The output Gram of the metric of probe solutions, from other labels than those that predict their losses."""


@dataclass(frozen=True, eq=False)
class Residuals:
    """Hold `W - S - L` of the anchor solutions of one layer, scaled by the root of the solver gap.

    Args:
        rows: the anchors, in rows of equal rank share.
        tensor: (anchors, d_out, d_in) bfloat16.

    >>> rows = ((Target(0, 2),),)
    >>> Residuals(rows, torch.ones(1, 2, 2).bfloat16()).at(Target(0, 2)).dtype
    torch.float32
    """

    rows: tuple[tuple[Target, ...], ...]
    tensor: Tensor

    @property
    def anchors(self) -> tuple[Target, ...]:
        """List the anchors of all rows, one after the other."""
        return tuple(anchor for row in self.rows for anchor in row)

    def at(self, anchor: Target) -> Tensor:
        """Return the residual of one anchor, (d_out, d_in) float32."""
        return self.tensor[self.anchors.index(anchor)].float()


@dataclass(frozen=True, eq=False)
class LayerAnalysis:
    """Read what the analysis of a layer needs from the model and from the artefacts of earlier stages.

    Args:
        layers: of the dense model.
        work: folder of the artefacts.
        pattern: N:M pattern of `S`, or None.
        limits: every option of a layer is within them.
        weighted: whether the error metric of a layer has its output Gram where `METRIC_CHOICE` says so.

    >>> from globalopt.models.layers import find_layers
    >>> from globalopt.reference.tiny import tiny_llama
    >>> from pathlib import Path
    >>> layers = find_layers(tiny_llama(), allow_low_coverage=True)
    >>> LayerAnalysis(layers, Workspace(Path("work"))).solved_anchors(layers.specs[0])
    False
    """

    layers: ModelLayers
    work: Workspace
    pattern: NM | None = None
    limits: Limits = NO_LIMITS
    weighted: bool = False

    def options(self, spec: LayerSpec) -> Options:
        """List the options of a layer."""
        return Options.of(spec, self.work.get(SPAN, spec).max_rank, self.pattern, self.limits)

    def span(self, spec: LayerSpec) -> Span:
        """Read the span of a layer, and compute its entries from the weight, which is to be dense."""
        return self.work.get(SPAN, spec).span(self.layers.weight(spec.name))

    def output_gram(self, spec: LayerSpec) -> Gram | None:
        """Read the output Gram of a layer's error metric, or None where the metric has the input Gram alone."""
        if not self.weighted or not self.work.get(METRIC_CHOICE, spec).uses_output_gram:
            return None
        return self.work.get(PROBE_OUTPUT_GRAM, spec)

    def metric(self, spec: LayerSpec) -> Metric:
        """Read the error metric in which a layer is solved, on the layer's device."""
        device, outputs = self.layers.device_of(spec.block), self.output_gram(spec)
        return Metric(self.work.get(GRAM, spec.site).to(device), outputs and outputs.to(device))

    def solved_anchors(self, spec: LayerSpec) -> bool:
        """Tell whether there are anchor solutions of the layer."""
        return self.work.has(ANCHORS, spec)

    def residuals(self, spec: LayerSpec, weight: Tensor, gap: SolverGap = NO_GAP) -> Residuals:
        """Compute the residuals of a layer's anchor solutions.

        Args:
            weight: (d_out, d_in) float32, the dense weight.
            gap: errors, which are quadratic, are multiplied by it, so residuals are multiplied by its root.
        """
        solutions = self.work.get(ANCHORS, spec)
        found = weight.new_empty(len(solutions.values), *weight.shape, dtype=torch.bfloat16)
        for i, (anchor, value) in enumerate(zip(solutions.anchors, solutions.values, strict=True)):
            residual = weight - value.to(weight.device).dense()
            found[i] = residual * gap.at(anchor, spec) ** 0.5
        return Residuals(solutions.rows, found)


def read_gap(analysis: LayerAnalysis) -> SolverGap:
    """Read the solver gaps of the sampled layers; `NO_GAP` where no solvers were compared.

    >>> from globalopt.models.layers import find_layers
    >>> from globalopt.reference.tiny import tiny_llama
    >>> from pathlib import Path
    >>> layers = find_layers(tiny_llama(), allow_low_coverage=True)
    >>> read_gap(LayerAnalysis(layers, Workspace(Path("work")))) == NO_GAP
    True
    """
    work = analysis.work
    measured = [(spec, found) for spec in sampled(analysis.layers.specs) if (found := work.find(SOLVER_GAP, spec))]
    return SolverGap.of([(analysis.options(spec), found) for spec, found in measured])
