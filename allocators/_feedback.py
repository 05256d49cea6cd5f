"""A multiplier of the error surface of every layer, from evaluated losses by ridge regression."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from globalopt.values.option_table import OptionTable
from globalopt.values.sizes import Floats, Sizes

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
    `misfit_i = MISFIT scale sum_l |d_il|`. The solution is taken through the products of the differences with each
    other, of which there are as many as evaluated candidates: `m = scale + P dᵀ (P d dᵀ + diag(variance))⁻¹ (y - d
    scale)`, `P = (PRIOR scale)²`. So the cost is linear in layers.

    Args:
        scale: evaluated over predicted loss, the value of every multiplier before any difference is known.
    """

    def __init__(self, table: OptionTable, scale: float) -> None:
        self._table = table
        self._scale = scale
        self._changes: list[Floats] = []
        self._variances: list[float] = []
        self._surprises: list[float] = []
        self._products = np.zeros((0, 0))

    def tell(self, before: Sizes, after: Sizes, differences: Tensor) -> None:
        """Add `differences` (windows,), the losses of `after` less those of `before`."""
        table = self._table
        errors = [table.predict(*sizes.arrays) for sizes in (before, after)]
        change = errors[1] - errors[0]
        error = float(differences.var()) / len(differences) if len(differences) > 1 else 0.0
        variance = error + (MISFIT * self._scale * np.abs(change).sum()) ** 2
        if variance > 0:
            self._changes.append(change)
            self._variances.append(variance)
            self._surprises.append(float(differences.mean()) - self._scale * float(change.sum()))

    @property
    def multipliers(self) -> Floats:
        """The estimates, (layers,) in the order of the table."""
        count = len(self._changes)
        if not count:
            return np.full(len(self._table.names), self._scale)
        d = np.stack(self._changes)
        known = len(self._products)
        products = np.empty((count, count))
        products[:known, :known] = self._products
        products[known:] = d[known:] @ d.T
        products[:known, known:] = products[known:, :known].T
        self._products = products
        prior = (PRIOR * self._scale) ** 2
        weights = np.linalg.solve(prior * products + np.diag(self._variances), np.array(self._surprises))
        return np.clip(self._scale + prior * (weights @ d), self._scale / CLIP, self._scale * CLIP)

    def corrected(self) -> OptionTable:
        """Return the table with the errors of every layer times its multiplier."""
        return self._table.scaled(self.multipliers)
