"""Pose the allocation problem: the error surfaces of all layers under one budget, and its solution."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

import numpy as np

from globalopt.errors import BudgetError, UsageError
from globalopt.values.budget import NO_LIMITS, Budget, Limits, Target
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.option_table import OptionTable
from globalopt.values.span import Span
from globalopt.values.storage import Storage
from globalopt.values.surface import ErrorSurface

OUTLIER_THRESHOLDS = (3, 5, 7, 10)
"""Multiples M of the mean at which OWL's outliers are counted."""


@dataclass(frozen=True)
class Profile:
    """Hold the statistics of one layer that one-shot allocators read.

    Args:
        outliers: by threshold M, the share of the layer's entries whose `|w_ij| ||x_j||` is above M times the mean over
            all layers of its block (OWL, arXiv:2310.05175).
        alpha: Hill estimate of the power-law exponent of the eigenvalues of `Wᵀ W` (AlphaPruning, arXiv:2410.10912).

    >>> profile = Profile(outliers={3: 0.021, 5: 0.004}, alpha=2.6)
    >>> f"{profile.outliers[5]:.1%} of the entries are above 5 times the mean"
    '0.4% of the entries are above 5 times the mean'
    """

    outliers: Mapping[int, float]
    alpha: float


@dataclass(frozen=True)
class Allocation:
    """Assign one target to every layer, within a budget.

    `Problem.finish` makes it, or a budget file that is read.

    Args:
        targets: by layer name, in model order.
        budget: the limit and its unit.
        used: what the targets cost together, in the budget's unit.
        predicted: sum of the layers' predicted losses.
        by: the allocator's name.
        bound: a proved lower bound on `predicted` over all choices of options, or None.
    Raises:
        BudgetError: more is used than the budget allows.

    >>> targets = {"q_proj": Target(8, 1024)}
    >>> allocation = Allocation(targets, Budget(2048, 4096), used=2048, predicted=0.02, by="knapsack", bound=0.019)
    >>> round(allocation.gap, 3)
    0.05
    """

    targets: Mapping[str, Target]
    budget: Budget
    used: int
    predicted: float
    by: str
    bound: float | None = None

    def __post_init__(self) -> None:
        if self.used > self.budget.limit:
            raise BudgetError(f"The allocation uses {self.used} of {self.budget.limit} {self.budget.accounting}.")
        object.__setattr__(self, "targets", MappingProxyType(dict(self.targets)))

    @property
    def gap(self) -> float | None:
        """Compute the relative gap to the bound, `(predicted - bound) / predicted`, at least 0; None without one."""
        if self.bound is None:
            return None
        return max(0.0, self.predicted - self.bound) / self.predicted if self.predicted > 0 else 0.0


@dataclass(frozen=True)
class Problem:
    """Describe the allocation problem: the error surfaces of all layers, under one budget.

    Every option of the surfaces, and every allocation, is within the `limits`.

    Args:
        surfaces: one per layer, in model order.
        budget: of all layers together.
        pattern: of every `S`, or None.
        seed: of the allocators' random draws.
        profiles: by layer name, for the one-shot heuristics; may be empty, and then these refuse.
        limits: of the ranks, and whether there are sparse parts.
        spans: reads the span of a layer by its name, for allocators that choose among its components; None where there
            are no spans. A function, because all spans together are as large as the model.

    >>> spec = LayerSpec("layer", 0, "layer", "q_proj", 4, 4)
    >>> surface = ErrorSurface(spec, (Target(0, 0), Target(0, 8), Target(0, 16)), (1.0, 0.25, 0.0))
    >>> problem = Problem((surface,), Budget.fraction(0.5, [spec]))
    >>> problem.finish({"layer": Target(0, 8)}, by="hand").predicted
    0.25
    """

    surfaces: tuple[ErrorSurface, ...]
    budget: Budget
    pattern: NM | None = None
    seed: int = 0
    profiles: Mapping[str, Profile] = field(default_factory=dict)
    limits: Limits = NO_LIMITS
    spans: Callable[[str], Span] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.surfaces:
            raise BudgetError("There is no layer to allocate to.")
        if self.limits != NO_LIMITS:
            for surface in self.surfaces:
                for target in surface.targets:
                    self.limits.check(target, surface.spec)
        least = int(np.minimum.reduceat(self.table.cost, self.table.starts).sum())
        if least > self.budget.limit:
            share = least / self.budget.total
            why = f" with pattern {self.pattern}" if self.pattern else ""
            raise BudgetError(
                f"A budget of {self.budget.kept:.4g} keeps {self.budget.limit} {self.budget.accounting}; the cheapest "
                f"allocation{why} needs {least}. Raise --budget to at least {math.ceil(share * 1e4) / 1e4:g}."
            )

    @cached_property
    def table(self) -> OptionTable:
        """Return the options of all layers as arrays."""
        return OptionTable(self.surfaces, self.budget, self.pattern, self.limits)

    @property
    def specs(self) -> tuple[LayerSpec, ...]:
        """Return the layers, in model order."""
        return tuple(surface.spec for surface in self.surfaces)

    def span(self, name: str) -> Span:
        """Read the span of a layer; `UsageError` where the problem has none."""
        if self.spans is None:
            raise UsageError(
                "This needs the layers' spans: an allocator that reads them says so by Reads.SPANS, and a Problem made "
                "by hand takes the function that reads them as `spans`."
            )
        return self.spans(name)

    @cached_property
    def storages(self) -> tuple[Storage, ...]:
        """Return the storages in which every layer has options, most bits first."""
        common = set.intersection(*(set(surface.storages) for surface in self.surfaces))
        return tuple(sorted(common, reverse=True))

    @property
    def mixed(self) -> bool:
        """Tell whether a layer has options in several storages."""
        return any(len(surface.storages) > 1 for surface in self.surfaces)

    def narrowed(self, storages: Mapping[str, Storage]) -> Problem:
        """Make the same problem with the options of one storage for every layer, by layer name."""
        return replace(self, surfaces=tuple(s.narrowed(storages[s.spec.name]) for s in self.surfaces))

    @property
    def axis(self) -> str:
        """Name the field of a target that an allocator raises to use up the budget.

        It is "nnz", or "rank" where a pattern fixes the nonzeros or the limits forbid a sparse part.
        """
        return "nnz" if self.pattern is None and self.limits.sparse else "rank"

    def grow(self, target: Target, spec: LayerSpec, axis: str, top: int, limit: int) -> Target:
        """Raise the rank or the nonzeros of a target within a cost and within the limits, as `Budget.grow` does.

        Args:
            target: the target to start from, which is within the limits.
        """
        if axis == "rank":
            # A target that is above `top` already stays.
            top = max(target.rank, self.limits.floor(top))
            return self.budget.grow(target, spec, axis, top, limit, self.limits.rank_multiple)
        return self.budget.grow(target, spec, axis, top, limit)

    def scaled(self, factors: Mapping[str, float]) -> Problem:
        """Make the same problem with the errors of every layer multiplied by its factor."""
        surfaces = (
            replace(surface, error=tuple(factors[surface.spec.name] * error for error in surface.error))
            for surface in self.surfaces
        )
        return replace(self, surfaces=tuple(surfaces))

    def predicted(self, targets: Mapping[str, Target]) -> float:
        """Sum the predicted losses of all layers at `targets`."""
        return self.table.predicted(self.table.sizes(targets))

    def used(self, targets: Mapping[str, Target]) -> int:
        """Sum the costs of `targets`, in the budget's unit."""
        return sum(self.budget.cost(targets[spec.name], spec) for spec in self.specs)

    def finish(self, targets: Mapping[str, Target], by: str, bound: float | None = None) -> Allocation:
        """Check every target and the budget, and make the allocation; no other code makes one.

        Raises:
            BudgetError: the targets exceed the budget, or their layers are not the problem's.
            UsageError: a target does not fit its layer or the limits.
        """
        if set(targets) != {spec.name for spec in self.specs}:
            raise BudgetError(f"{by} returned targets for {len(targets)} layers; the problem has {len(self.specs)}.")
        ordered = {spec.name: self.limits.check(targets[spec.name].check(spec), spec) for spec in self.specs}
        return Allocation(ordered, self.budget, self.used(ordered), self.predicted(ordered), by, bound)
