"""What every stage of the analysis reads of a layer: its options, the metric it is solved in, its anchor residuals."""

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

PROBE_OUTPUT_GRAM = OUTPUT_GRAM.during(Stage.PROBE_LABELS)
"""The output Gram in which probe solutions are found: of other labels than those that predict their losses."""


@dataclass(frozen=True, eq=False)
class Residuals:
    """Hold `W - S - L` of the anchor solutions of one layer, scaled to what the real solver is expected to leave.

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
        """The anchors of all rows, one after the other."""
        return tuple(anchor for row in self.rows for anchor in row)

    def at(self, anchor: Target) -> Tensor:
        """(d_out, d_in) float32 of one anchor."""
        return self.tensor[self.anchors.index(anchor)].float()


@dataclass(frozen=True, eq=False)
class LayerAnalysis:
    """Read what the analysis of a layer needs from the model and from the artefacts of earlier stages.

    Args:
        layers: of the dense model.
        work: artefacts.
        pattern: of `S`, or None.
        limits: every option of a layer is within them.
        weighted: whether layers are solved in their output Grams too, where `METRIC_CHOICE` prefers that.

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
        """The grid of options of a layer."""
        return Options.of(spec, self.work.get(SPAN, spec).max_rank, self.pattern, self.limits)

    def output_gram(self, spec: LayerSpec) -> Gram | None:
        """The output Gram that the layer is solved in, or None where its input Gram alone is better."""
        if not self.weighted or not self.work.get(METRIC_CHOICE, spec).uses_output_gram:
            return None
        return self.work.get(PROBE_OUTPUT_GRAM, spec)

    def metric(self, spec: LayerSpec) -> Metric:
        """The metric that the layer is solved in, on the layer's device."""
        device, outputs = self.layers.device_of(spec.block), self.output_gram(spec)
        return Metric(self.work.get(GRAM, spec.site).to(device), outputs and outputs.to(device))

    def solved_anchors(self, spec: LayerSpec) -> bool:
        """Whether there are anchor solutions of the layer."""
        return self.work.has(ANCHORS, spec)

    def residuals(self, spec: LayerSpec, weight: Tensor, gap: SolverGap = NO_GAP) -> Residuals:
        """The residuals of a layer's anchor solutions.

        Args:
            weight: (d_out, d_in) float32, the dense weight.
            gap: errors are multiplied by it, so residuals by its root.
        """
        solutions = self.work.get(ANCHORS, spec)
        found = weight.new_empty(len(solutions.values), *weight.shape, dtype=torch.bfloat16)
        for i, (anchor, value) in enumerate(zip(solutions.anchors, solutions.values, strict=True)):
            residual = weight - value.to(weight.device).dense()
            found[i] = residual * gap.at(anchor, spec) ** 0.5
        return Residuals(solutions.rows, found)


def read_gap(analysis: LayerAnalysis) -> SolverGap:
    """Read the solver gap of the sampled layers; there is none where no solvers were compared.

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
