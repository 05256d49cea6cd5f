"""The analysis of a model of seven blocks, up to its anchor solutions."""

from __future__ import annotations

from pathlib import Path

import torch

from globalopt.analysis.anchors import solve_anchors
from globalopt.analysis.collect import write_grams, write_spans
from globalopt.analysis.layer_analysis import LayerAnalysis
from globalopt.models.batch import Batch
from globalopt.models.block_runner import BlockRunner
from globalopt.models.finding import find_layers
from globalopt.reference.tiny import tiny_llama
from globalopt.runs.workspace import Workspace
from globalopt.values.budget import Target
from globalopt.values.layer import LayerSpec
from solvers import get_solver


class EveryAnchor(LayerAnalysis):
    """An analysis in which every layer is solved at all of its anchors."""

    def anchor_rows(self, spec: LayerSpec) -> tuple[tuple[Target, ...], ...]:
        """List all anchors."""
        return self.options(spec).anchors


def solved(kind: type[LayerAnalysis], folder: Path) -> LayerAnalysis:
    """Analyse the model, and write what that takes into `folder`."""
    layers, work = find_layers(tiny_llama(blocks=7), allow_low_coverage=True), Workspace(folder)
    write_grams(BlockRunner(layers, [Batch(torch.arange(128).view(8, 16) % 64)]), work)
    write_spans(layers, work, layers.specs, "activation")
    analysis = kind(layers, work)
    solve_anchors(analysis, layers.specs, get_solver("3basil", {"steps": "40"}))
    return analysis
