"""A multiplier of the error surface of every layer, from evaluated losses by ridge regression."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from globalopt.values.budget import Target
from globalopt.values.problem import Problem

PRIOR = 0.5
"""Standard deviation of a layer's multiplier, relative to the common scale."""

MISFIT = 0.1
"""Part of a loss that multipliers cannot express, relative to the sum of all changes of a candidate."""

CLIP = 10.0
"""A multiplier is within this factor of the common scale."""


class Feedback:
    """Estimate multipliers `m_l` of the surfaces' errors from differences of losses between allocations.

        min sum_i (y_i - sum_l m_l d_il)² / (se_i² + misfit_i²) + sum_l (m_l - scale)² / (PRIOR scale)²

    with `y_i` a mean paired difference, `se_i` its standard error, `d_il` the predicted change of layer l's error and
    `misfit_i = MISFIT scale sum_l |d_il|`.

    Args:
        scale: evaluated over predicted loss, the value of every multiplier before any difference is known.
    """

    def __init__(self, problem: Problem, scale: float) -> None:
        self._problem = problem
        self._surfaces = {s.spec.name: s for s in sorted(problem.surfaces, key=lambda s: s.spec.name)}
        self._scale = scale
        self._precision = np.eye(len(self._surfaces)) / (PRIOR * scale) ** 2
        self._moment = self._precision.sum(1) * scale

    def tell(self, before: Mapping[str, Target], after: Mapping[str, Target], differences: Tensor) -> None:
        """Add `differences` (windows,), the losses of `after` less those of `before`."""
        change = np.array(
            [surface.predict(after[name]) - surface.predict(before[name]) for name, surface in self._surfaces.items()]
        )
        error = float(differences.var()) / len(differences) if len(differences) > 1 else 0.0
        variance = error + (MISFIT * self._scale * np.abs(change).sum()) ** 2
        if variance > 0:
            self._precision += np.outer(change, change) / variance
            self._moment += change * float(differences.mean()) / variance

    @property
    def multipliers(self) -> dict[str, float]:
        """The estimates, by layer name."""
        solved = np.linalg.solve(self._precision, self._moment)
        clipped = np.clip(solved, self._scale / CLIP, self._scale * CLIP)
        return dict(zip(self._surfaces, clipped.tolist(), strict=True))

    def corrected(self) -> Problem:
        """Return the problem with the errors of every surface times its multiplier."""
        return self._problem.scaled(self.multipliers)
