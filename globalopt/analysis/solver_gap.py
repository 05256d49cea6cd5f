"""Measure the solver gap on a few layers: error of the solver of the refinement over error of the probe solver.

The probe solver does not converge equally fast at every target: it finds a support in a few steps, but needs hundreds
for a low-rank part beside many nonzeros; and it searches without the correlations of outputs, which are worth the more
the more is kept. Predictions made from its solutions alone would underrate both. The ratio

    gap = error of the refinement solver's solution / error of the probe solver's

depends on rank and nonzeros in much the same way in all layers of one kind, so it is measured on one layer per kind.
Of the error that thirty steps leave with the diagonal of the output Gram alone, thirty steps with all of it leave .46,
.36, .31 in the queries of block 2 of SmolLM2-135M at .07, .22 and .55 kept without rank, .52, .42, .37 in those of
block 11, and .74, .65, .61 in the gates of block 2.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from torch import Tensor

from globalopt.analysis.grid import AnchorValues, Options
from globalopt.budgets.conversion import convert_target
from globalopt.errors import UsageError
from globalopt.protocols import Solver
from globalopt.runs.records import AnchorSolutions
from globalopt.values.budget import Budget, Target
from globalopt.values.layer import LayerSpec
from globalopt.values.metric import Metric

LEAST = 1e-9
"""Errors below this fraction of the layer's energy are rounding."""

TOGETHER = 2**22
"""Number of weights solved at once: several targets of a small layer take little more time than one."""


@dataclass(frozen=True)
class SolverGap:
    """Predict the solver gap at any target, by interpolation between the anchors of the sampled layer of its kind.

    The gap of a kind that was not sampled is the geometric mean of all kinds.

    Args:
        kinds: logarithms of the gaps by kind; empty where no solvers were compared.

    >>> spec = LayerSpec("up", 0, "in", "up", 8, 8)
    >>> options = Options.of(spec, max_rank=0)
    >>> gap = SolverGap.of([(options, {anchor: 0.5 for row in options.anchors for anchor in row})])
    >>> round(gap.at(Target(0, 20), spec), 3)
    0.5
    """

    kinds: Mapping[str, AnchorValues] = field(default_factory=dict)

    @classmethod
    def of(cls, measured: Sequence[tuple[Options, Mapping[Target, float]]]) -> SolverGap:
        """Make it from `measure_gap` of the sampled layers; layers in which nothing could be compared are left out."""
        kinds = {}
        for options, ratios in measured:
            if ratios:
                logarithms = {anchor: math.log(ratio) for anchor, ratio in ratios.items()}
                kinds[options.spec.kind] = AnchorValues.of(options, logarithms)
        return cls(kinds)

    def at(self, target: Target, spec: LayerSpec) -> float:
        """Predict the gap of a layer at `target`; 1 where no solvers were compared."""
        if not self.kinds:
            return 1.0
        alike = [self.kinds[spec.kind]] if spec.kind in self.kinds else self.kinds.values()
        return math.exp(fmean(values.at(target, spec) for values in alike))


NO_GAP = SolverGap()
"""A gap of 1 everywhere."""


def sampled(specs: Sequence[LayerSpec]) -> tuple[LayerSpec, ...]:
    """Select the first layer of every kind in the middle block.

    >>> layer = [LayerSpec(f"{block}.up", block, "in", "up", 2, 2) for block in range(3)]
    >>> [spec.name for spec in sampled(layer)]
    ['1.up']
    """
    blocks = sorted({spec.block for spec in specs})
    middle = blocks[len(blocks) // 2]
    found: dict[str, LayerSpec] = {}
    for spec in specs:
        if spec.block == middle:
            found.setdefault(spec.kind, spec)
    return tuple(found.values())


def measure_gap(
    spec: LayerSpec, weight: Tensor, metric: Metric, solutions: AnchorSolutions, solver: Solver, budget: Budget
) -> dict[Target, float]:
    """Measure the solver gap of one layer at its anchors; those that the solver cannot meet are left out.

    Args:
        weight: (d_out, d_in), dense.
        metric: error metric of the layer.
        solutions: anchor solutions of the probe solver.
        solver: solver of the refinement, of which the shorter version is compared (`Solver.shorter`).
        budget: parts that the solver lacks are converted into others of no higher cost in it; see `convert_target`.

    >>> import torch
    >>> from globalopt.values.decomposition import Decomposition
    >>> from globalopt.values.metric import Gram
    >>> from solvers import get_solver
    >>> spec, W = LayerSpec("up", 0, "in", "up", 2, 2), torch.tensor([[3.0, 1.0], [1.0, 2.0]])
    >>> kept = Decomposition(torch.diag(W.diag()), torch.zeros(2, 0), torch.zeros(0, 2))
    >>> probe = AnchorSolutions(((Target(0, 2),),), (kept,))
    >>> metric = Metric(Gram(torch.eye(2), 4))
    >>> measure_gap(spec, W, metric, probe, get_solver("magnitude"), Budget(4, 4)) == {Target(0, 2): 1.0}
    True
    """
    targets: dict[Target, Target] = {}
    for anchor in solutions.anchors:
        with contextlib.suppress(UsageError):
            targets[anchor] = convert_target(anchor, spec, solver, budget)
    least = LEAST * metric.error(weight)
    if least == 0:
        # A layer of zeros has no error by any solver.
        return dict.fromkeys(targets, 1.0)
    by_probe = {
        anchor: metric.error(weight - value.to(weight.device).dense())
        for anchor, value in zip(solutions.anchors, solutions.values, strict=True)
    }
    # Not along a path from anchor to anchor: that ended up to a quarter higher in queries and values.
    solver, found = solver.shorter(), {}
    together = max(1, TOGETHER // weight.numel())
    for start in range(0, len(targets), together):
        some = list(targets.items())[start : start + together]
        solved = solver.solve_site([(weight, metric, target) for _, target in some])
        for (anchor, _), solution in zip(some, solved, strict=True):
            own = metric.error(weight - solution.value.dense())
            found[anchor] = max(own, least) / max(by_probe[anchor], least)
    return found
