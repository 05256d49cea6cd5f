"""Read the analysis of a layer from artefacts: its options, its error metric, the residuals of its anchor solutions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from globalopt.analysis.anchor_curves import fully_solved, middle
from globalopt.analysis.grid import Options, largest_rank
from globalopt.analysis.solver_gap import NO_GAP, SolverGap, sampled
from globalopt.models.layers import ModelLayers
from globalopt.runs.artefacts import (
    ANCHORS,
    DIRECTIONS,
    GRAM,
    METRIC_CHOICE,
    OUTPUT_GRAM,
    SOLVER_GAP,
    SPAN,
    Artefact,
    Stage,
)
from globalopt.runs.records import AnchorSolutions
from globalopt.runs.workspace import Workspace
from globalopt.values.budget import NO_LIMITS, Limits, Target
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.metric import Gram, Metric
from globalopt.values.span import Span

PLAIN_ANCHORS = ANCHORS.during(Stage.METRICS)
"""Anchor solutions without the output Gram, of the layers for which that is the better metric."""


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
        weighted: whether the error metric of a layer has its output Gram, unless `METRIC_CHOICE` says otherwise.
        low_rank: whether options have low-rank parts.

    >>> from globalopt.models.finding import find_layers
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
    low_rank: bool = True

    def options(self, spec: LayerSpec) -> Options:
        """List the options of a layer."""
        most = self.offered_rank(spec, int(self.work.get(SPAN, spec).stats["rank"])) if self.low_rank else 0
        return Options.of(spec, most, self.pattern, self.limits)

    def offered_rank(self, spec: LayerSpec, rank: int) -> int:
        """Return the largest rank on offer in a layer whose span has `rank` directions."""
        return min(rank, largest_rank(spec, self.pattern, self.limits))

    def reads_directions(self, spec: LayerSpec, anchors: bool) -> bool:
        """Tell whether predictions read the directions of a layer's span.

        Args:
            anchors: whether the layer is solved at anchors.
        """
        return self.options(spec).of_span(anchors).ranked

    def anchor_rows(self, spec: LayerSpec) -> tuple[tuple[Target, ...], ...]:
        """List the anchors at which a layer is solved, in rows of equal rank share: all, or the middle of the first."""
        first, *others = self.options(spec).anchors
        if spec.name in self._fully_solved:
            return first, *others
        return ((middle(first),),)

    @cached_property
    def _fully_solved(self) -> frozenset[str]:
        return fully_solved(self.layers.specs)

    def span(self, spec: LayerSpec, anchors: bool = False) -> Span:
        """Read the span of a layer, and compute its entries from the weight, which is to be dense.

        Args:
            anchors: whether the layer is solved at anchors. Its directions are then part of its entries, if nothing
                reads them.
        """
        read = DIRECTIONS if self.reads_directions(spec, anchors) else SPAN
        return self.work.get(read, spec).span(self.layers.weight(spec.name))

    def plain(self, spec: LayerSpec) -> bool:
        """Tell whether a layer is solved without its output Gram, although the solver would weight by it."""
        choice = self.work.find(METRIC_CHOICE, spec) if self.weighted else None
        return choice is not None and not choice.uses_output_gram

    def checked_losses(self, spec: LayerSpec) -> dict[Target, float]:
        """Read the measured losses of a layer whose loss contradicts its prediction, by target."""
        choice = self.work.find(METRIC_CHOICE, spec) if self.weighted else None
        return {} if choice is None else choice.losses

    def metric(self, spec: LayerSpec) -> Metric:
        """Read the error metric in which a layer is solved, on the layer's device."""
        outputs = self.weighted and not self.plain(spec)
        return self._metric(spec, OUTPUT_GRAM if outputs else None)

    def plain_metric(self, spec: LayerSpec) -> Metric:
        """Read the error metric of a layer without its output Gram."""
        return self._metric(spec, None)

    def loss_metric(self, spec: LayerSpec) -> Metric:
        """Read the metric in which losses are predicted: with the output Gram where there is one."""
        return self._metric(spec, OUTPUT_GRAM if self.work.has(OUTPUT_GRAM, spec) else None)

    def _metric(self, spec: LayerSpec, output_gram: Artefact[LayerSpec, Gram] | None) -> Metric:
        device = self.layers.device_of(spec.block)
        outputs = None if output_gram is None else self.work.get(output_gram, spec).to(device)
        return Metric(self.work.get(GRAM, spec.site).to(device), outputs)

    def anchors(self, spec: LayerSpec) -> Artefact[LayerSpec, AnchorSolutions]:
        """Return where the anchor solutions of a layer are, in the metric in which it is solved."""
        return PLAIN_ANCHORS if self.plain(spec) else ANCHORS

    def solved_anchors(self, spec: LayerSpec) -> bool:
        """Tell whether there are anchor solutions of the layer."""
        return self.work.has(self.anchors(spec), spec)

    def lacks_anchors(self, spec: LayerSpec) -> bool:
        """Tell whether a layer was solved at one anchor alone, though there are others."""
        few = self.solved_anchors(spec) and spec.name not in self._fully_solved
        return few and self.anchor_rows(spec) != self.options(spec).anchors

    def residuals(self, spec: LayerSpec, weight: Tensor, gap: SolverGap = NO_GAP) -> Residuals:
        """Compute the residuals of a layer's anchor solutions.

        Args:
            weight: (d_out, d_in) float32, the dense weight.
            gap: errors, which are quadratic, are multiplied by it, so residuals are multiplied by its root.
        """
        solutions = self.work.get(self.anchors(spec), spec)
        found = weight.new_empty(len(solutions.values), *weight.shape, dtype=torch.bfloat16)
        for i, (anchor, value) in enumerate(zip(solutions.anchors, solutions.values, strict=True)):
            residual = weight - value.to(weight.device).dense()
            found[i] = residual * gap.at(anchor, spec) ** 0.5
        return Residuals(solutions.rows, found)


def read_gap(analysis: LayerAnalysis) -> SolverGap:
    """Read the solver gaps of the sampled layers; `NO_GAP` where no solvers were compared.

    >>> from globalopt.models.finding import find_layers
    >>> from globalopt.reference.tiny import tiny_llama
    >>> from pathlib import Path
    >>> layers = find_layers(tiny_llama(), allow_low_coverage=True)
    >>> read_gap(LayerAnalysis(layers, Workspace(Path("work")))) == NO_GAP
    True
    """
    work = analysis.work
    measured = [(spec, found) for spec in sampled(analysis.layers.specs) if (found := work.find(SOLVER_GAP, spec))]
    return SolverGap.of([(analysis.options(spec), found) for spec, found in measured])
