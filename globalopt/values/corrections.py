"""Hold corrections of error surfaces, by what a model loses at the targets of an allocation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from globalopt.values.budget import Target
from globalopt.values.layer import LayerSpec
from globalopt.values.problem import Problem
from globalopt.values.surface import ErrorSurface, interpolate

NEARBY = 0.03
"""A ratio replaces earlier ones within this distance in the fraction kept."""


@dataclass(frozen=True)
class Corrections:
    """Hold the factors by which the error surfaces of layers are multiplied.

    Args:
        points: by layer name, pairs of the fraction kept (in few bits: of the bytes) and the logarithm of the factor
            there, ascending. Between them the logarithm is linear, outside of them constant. A layer without any is not
            changed.
        losses: measured loss of the allocation of every round, in nats per token.

    >>> from globalopt.values.budget import Budget, Target
    >>> from globalopt.values.layer import LayerSpec
    >>> spec = LayerSpec("up", 0, "up", "up", 4, 4)
    >>> surface = ErrorSurface(spec, (Target(0, 0), Target(0, 8), Target(0, 16)), (1.0, 0.25, 0.0))
    >>> problem = Problem((surface,), Budget.fraction(0.5, [spec]))
    >>> doubled = Corrections({"up": ((0.5, math.log(2.0)),)}).apply(problem)
    >>> [round(error, 6) for error in doubled.surfaces[0].error]
    [2.0, 0.5, 0.0]
    """

    points: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    losses: tuple[float, ...] = ()

    def apply(self, problem: Problem) -> Problem:
        """Return the problem with corrected surfaces."""
        return replace(problem, surfaces=tuple(self._corrected(surface) for surface in problem.surfaces))

    def _corrected(self, surface: ErrorSurface) -> ErrorSurface:
        points = self.points.get(surface.spec.name)
        if not points:
            return surface
        xs, ys = [kept for kept, _ in points], [log for _, log in points]
        pairs = zip(surface.targets, surface.error, strict=True)
        errors = tuple(e * math.exp(interpolate(xs, ys, _kept(t, surface.spec))) for t, e in pairs)
        return ErrorSurface(surface.spec, surface.targets, errors)

    def with_ratios(self, problem: Problem, targets: Mapping[str, Target], ratios: Mapping[str, float]) -> Corrections:
        """Return corrections with the log ratios found at `targets`; they replace those found nearby."""
        points = dict(self.points)
        for spec in problem.specs:
            if spec.name in ratios:
                kept = _kept(targets[spec.name], spec)
                far = [point for point in points.get(spec.name, ()) if abs(point[0] - kept) > NEARBY]
                points[spec.name] = tuple(sorted([*far, (kept, ratios[spec.name])]))
        return Corrections(points, self.losses)


def _kept(target: Target, spec: LayerSpec) -> float:
    """Compute the fraction kept: of the parameters, or of the bytes of a target in few bits."""
    return target.params(spec) / spec.numel if target.storage.plain else target.bytes(spec) / (2 * spec.numel)


NO_CORRECTIONS = Corrections()
"""Corrections that change nothing."""
