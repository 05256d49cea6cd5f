"""What the solver leaves of the error of a quick fit, learned from a few layers: it corrects the fits of all.

Quick fits price every layer, and are not equally quick to find everything: a support takes a few steps, a low-rank part
beside many nonzeros takes hundreds. Prices made of them keep rank from where the solver would put it to use. What

    error of the solver's own fit / error of the quick fit

says of rank against nonzeros is much alike in layers of one kind, so that one layer tells it for all of them. (Bundled
model, keys of blocks 1, 4 and 6 at 0.4 kept: .79, .91, .95 without rank, .53, .71, .78 with a quarter as rank.)
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from torch import Tensor

from globalopt.analysis.grid import AnchorValues, Options
from globalopt.budgets.conversion import for_solver
from globalopt.errors import UsageError
from globalopt.protocols import Solver
from globalopt.values.budget import Budget, Target
from globalopt.values.layer import LayerSpec
from globalopt.values.metric import Metric

LEAST = 1e-9
"""Errors below this fraction of the layer's energy are rounding."""

TOGETHER = 2**22
"""Weights that are fitted at once: a small layer to all its targets in little more time than to one."""


@dataclass(frozen=True)
class FitRatio:
    """The ratio at any target: what the sampled layer of the same kind says between its anchors.

    A kind that was not sampled has the geometric mean of all.

    Args:
        kinds: by kind, logarithms of the ratios; none where nothing was compared.
    """

    kinds: Mapping[str, AnchorValues] = field(default_factory=dict)

    @classmethod
    def of(cls, measured: Sequence[tuple[Options, Mapping[Target, float]]]) -> FitRatio:
        """From `measure_ratios` of the sampled layers."""
        kinds = {}
        for options, ratios in measured:
            if ratios:
                logarithms = {anchor: math.log(ratio) for anchor, ratio in ratios.items()}
                kinds[options.spec.kind] = AnchorValues.of(options, logarithms)
        return cls(kinds)

    def at(self, target: Target, spec: LayerSpec) -> float:
        """What the solver leaves of the error of a quick fit of a layer at `target`; 1 where nothing was compared."""
        if not self.kinds:
            return 1.0
        alike = [self.kinds[spec.kind]] if spec.kind in self.kinds else self.kinds.values()
        return math.exp(fmean(values.at(target, spec) for values in alike))


NOT_COMPARED = FitRatio()


def sampled(specs: Sequence[LayerSpec]) -> tuple[LayerSpec, ...]:
    """The first layer of every kind in the middle block."""
    blocks = sorted({spec.block for spec in specs})
    middle = blocks[len(blocks) // 2]
    found: dict[str, LayerSpec] = {}
    for spec in specs:
        if spec.block == middle:
            found.setdefault(spec.kind, spec)
    return tuple(found.values())


def measure_ratios(
    weight: Tensor, metric: Metric, options: Options, lost: Tensor, solver: Solver, budget: Budget
) -> dict[Target, float]:
    """`metric.error` of the solver's fits over that of the quick ones, by anchor; without what the solver cannot meet.

    Args:
        lost: (anchors, d_out, d_in) of the quick fits.
        budget: what the solver lacks becomes what it has at no higher cost, as when it refines: see `for_solver`.
    """
    anchors = [anchor for row in options.anchors for anchor in row]
    targets: dict[Target, Target] = {}
    for anchor in anchors:
        with contextlib.suppress(UsageError):
            targets[anchor] = for_solver(anchor, options.spec, solver, budget)
    least = LEAST * metric.error(weight)
    if least == 0:
        # A layer of zeros loses nothing by any fit.
        return dict.fromkeys(targets, 1.0)
    quickly = {anchor: metric.error(E) for anchor, E in zip(anchors, lost, strict=True)}
    found = {}
    together = max(1, TOGETHER // weight.numel())
    for start in range(0, len(targets), together):
        some = list(targets.items())[start : start + together]
        solutions = solver.solve_site([(weight, metric, target) for _, target in some])
        for (anchor, _), solution in zip(some, solutions, strict=True):
            own = metric.error(weight - solution.value.dense())
            found[anchor] = max(own, least) / max(quickly[anchor], least)
    return found
