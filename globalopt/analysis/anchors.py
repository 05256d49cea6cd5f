"""Solve every layer at its anchors with the probe solver, and a few layers with the solver of the refinement too."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from globalopt.analysis.layer_analysis import LayerAnalysis
from globalopt.analysis.solver_gap import measure_gap
from globalopt.errors import GlobalOptError
from globalopt.protocols import Solver
from globalopt.runs.artefacts import SOLVER_GAP
from globalopt.runs.records import AnchorSolutions
from globalopt.values.budget import Budget
from globalopt.values.layer import LayerSpec

ANCHORS_VERSION = 5
"""Raised whenever anchor solutions change."""

GAPS_VERSION = 4
"""Raised whenever solver gaps change."""


def solve_anchors(
    analysis: LayerAnalysis,
    specs: Sequence[LayerSpec],
    probe: Solver,
    advance: Callable[[str], None] = lambda detail: None,
) -> None:
    """Solve the layers `specs` at their anchors, one path of targets per layer, and write the solutions.

    Args:
        analysis: with the Grams and spans of these layers.
        probe: the probe solver.
        advance: called with the name of each layer that is done.

    >>> from pathlib import Path
    >>> from globalopt.analysis.collect import write_grams, write_spans
    >>> from globalopt.models.batch import Batch
    >>> from globalopt.models.block_runner import BlockRunner
    >>> from globalopt.models.finding import find_layers
    >>> from globalopt.reference.tiny import tiny_llama
    >>> from globalopt.runs.artefacts import ANCHORS
    >>> from globalopt.runs.workspace import Workspace
    >>> from solvers import get_solver
    >>> import torch
    >>> layers = find_layers(tiny_llama(), allow_low_coverage=True)
    >>> analysis = LayerAnalysis(layers, Workspace(Path("work")))
    >>> write_grams(BlockRunner(layers, [Batch(torch.arange(64).view(4, 16))]), analysis.work)
    >>> write_spans(layers, analysis.work, layers.specs[:1], "activation")
    >>> solve_anchors(analysis, layers.specs[:1], get_solver("3basil", {"steps": "5"}))
    >>> found = analysis.work.get(ANCHORS, layers.specs[0])
    >>> [(value.rank, value.nnz) for value in found.values]
    [(0, 17), (0, 56), (0, 140), (1, 96)]
    """
    for spec in specs:
        rows = analysis.anchor_rows(spec)
        state = probe.prepare(analysis.layers.weight(spec.name), analysis.metric(spec))
        found = probe.solve_path(state, [anchor for row in rows for anchor in row])
        # Rounding errors of 2^-9 at most have about a millionth of the energy of what is kept; half as much is stored.
        solutions = AnchorSolutions(rows, tuple(solution.value.cast(torch.bfloat16) for solution in found))
        analysis.work.put(analysis.anchors(spec), spec, solutions)
        advance(spec.name)


def compare_solvers(
    analysis: LayerAnalysis,
    specs: Sequence[LayerSpec],
    solver: Solver,
    budget: Budget,
    advance: Callable[[str], None] = lambda detail: None,
) -> None:
    """Solve the layers `specs` at their anchors with the solver of the refinement too, and write the solver gaps.

    Args:
        analysis: with the anchor solutions of these layers.
        specs: one layer of every kind; see `sampled`.
        solver: solver of the refinement.
        budget: gives the cost at which parts that the solver lacks are converted into others.
        advance: called with the name of each layer that is done.
    Raises:
        GlobalOptError: what the solver raises, with the name of the layer.

    >>> import torch
    >>> from pathlib import Path
    >>> from globalopt.analysis.collect import write_grams, write_spans
    >>> from globalopt.models.batch import Batch
    >>> from globalopt.models.block_runner import BlockRunner
    >>> from globalopt.models.finding import find_layers
    >>> from globalopt.reference.tiny import tiny_llama
    >>> from globalopt.runs.artefacts import ANCHORS
    >>> from globalopt.runs.workspace import Workspace
    >>> from solvers import get_solver
    >>> layers = find_layers(tiny_llama(), allow_low_coverage=True)
    >>> analysis, first = LayerAnalysis(layers, Workspace(Path("gaps"))), layers.specs[:1]
    >>> write_grams(BlockRunner(layers, [Batch(torch.arange(64).view(4, 16))]), analysis.work)
    >>> write_spans(layers, analysis.work, layers.specs, "activation")
    >>> solve_anchors(analysis, first, get_solver("3basil", {"steps": "20"}))
    >>> compare_solvers(analysis, first, get_solver("wanda"), Budget.fraction(1.0, layers.specs))
    >>> gaps = analysis.work.get(SOLVER_GAP, first[0])  # Wanda moves no weight that it keeps
    >>> all(gap > 1 for gap in gaps.values())
    True
    """
    for spec in specs:
        weight, metric = analysis.layers.weight(spec.name), analysis.metric(spec)
        try:
            solutions = analysis.work.get(analysis.anchors(spec), spec)
            found = measure_gap(spec, weight, metric, solutions, solver, budget)
        except GlobalOptError as cause:
            cause.args = (f"Layer {spec.name}: {cause}",)
            raise
        analysis.work.put(SOLVER_GAP, spec, found)
        advance(spec.name)
