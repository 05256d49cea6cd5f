"""A calibration of the error surfaces by the evaluated losses of a few allocations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from allocators._warp import Warp
from globalopt.values.option_table import OptionTable
from globalopt.values.sizes import Floats, Sizes

# Prior standard deviations, in log units: the coefficients of the warp, a layer's own multiplier, and the power.
WARP_SPREAD = 0.7
LAYER_SPREAD = 0.3
POWER_SPREAD = 0.2
LEVEL_SPREAD = 2.0
NOISE = 0.01
"""Standard deviation of an evaluated log loss about this model, from its misfit and from the choice of windows."""

LEAST = 1e-300

ITERATIONS = 200
CONVERGED = 1e-9
"""Most steps of the fit, and the fall of the gradient at which it ends."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Describe a model of the loss of an allocation, with multipliers of the predicted errors.

        log loss = level + power log sum_l m_l(c_l) error_l(c_l),   log m_l(c) = theta · features_l(c) + u_l

    `theta` warps by kind, depth and rank share (`Warp`), `u_l` is the layer's own; `power` below 1 is a loss that
    saturates. Level and power change no comparison at one budget, but the scale of the predictions.

    Args:
        warp: names the coefficients.
        theta: one per coefficient. own: (layers,) `u_l`, in the order of the table.
        residual: root mean square of `log measured - log predicted` over the allocations it was fitted to.
    """

    warp: Warp
    theta: Floats
    own: Floats
    level: float
    power: float
    residual: float

    @classmethod
    def fit(cls, table: OptionTable, measured: Sequence[tuple[Sizes, float]]) -> Calibration:
        """Fit the posterior mode under independent normal priors about 0 (power: about 1), by least squares.

        Args:
            measured: allocations and their losses above 0, on the same windows; one is enough.
        """
        posterior = Posterior(table, measured)
        x = posterior.mode()
        coefficients = len(posterior.warp.names)
        residual = float(np.sqrt(np.mean((posterior.misfits(x) * NOISE) ** 2)))
        own = x[coefficients:-2]
        return cls(posterior.warp, x[:coefficients], own, float(x[-2]), float(1 + x[-1]), residual)

    def apply(self, table: OptionTable, share: float = 1.0) -> OptionTable:
        """Return the table with its errors multiplied by `m_l(c)^share`; a share of 0 changes nothing."""
        warped = self.warp.apply(table, share * self.theta)
        return warped.with_errors(warped.error * np.exp(share * self.own)[table.layer])

    def loss(self, table: OptionTable, sizes: Sizes) -> float:
        """Predict the loss of targets of the table it was fitted to."""
        total = self.apply(table).predicted(sizes)
        return float(np.exp(self.level + self.power * np.log(max(total, LEAST))))


class Posterior:
    """Describe the negative log posterior of a calibration, `½ ||misfits(x)||² + ½ ||x / spread||²` up to a constant.

    `x` is `theta`, then `u` in the order of the table, the level, and the power less 1.

    Args:
        measured: allocations and their losses above 0.
    """

    def __init__(self, table: OptionTable, measured: Sequence[tuple[Sizes, float]]) -> None:
        self.warp = Warp.of(table.specs)
        self._error = np.stack([table.predict(*s.arrays) for s, _ in measured])
        self._features = self.warp.features(table.specs)
        self._share = np.stack([table.shares(*s.arrays) for s, _ in measured])
        self._losses = np.log([max(loss, LEAST) for _, loss in measured])
        coefficients, layers = len(self.warp.names), len(table.names)
        self.spread = np.concatenate(
            [np.full(coefficients, WARP_SPREAD), np.full(layers, LAYER_SPREAD), [LEVEL_SPREAD, POWER_SPREAD]]
        )

    def misfits(self, x: Floats) -> Floats:
        """Compute (measured,) the misfits of the log losses over `NOISE`."""
        total = np.maximum(self._terms(x).sum(1), LEAST)
        return (x[-2] + (1 + x[-1]) * np.log(total) - self._losses) / NOISE

    def jacobian(self, x: Floats) -> Floats:
        """Compute (measured, parameters) the derivative of `misfits`."""
        each = self._terms(x)
        total = np.maximum(each.sum(1, keepdims=True), LEAST)
        share = (1 + x[-1]) * each / total
        of_rank = (share * self._share).sum(1, keepdims=True)
        return np.hstack([share @ self._features, of_rank, share, np.ones((len(each), 1)), np.log(total)]) / NOISE

    def mode(self) -> Floats:
        """Find the `x` of largest posterior by damped Gauss-Newton steps (Levenberg-Marquardt) from 0.

        In units of the prior, `z = x / spread`, a step solves `((1 + damping) I + Aᵀ A) step = -gradient`, with A the
        derivative of the misfits. There are far fewer measurements than layers, so the inverse is taken through `A Aᵀ`
        (Woodbury), whose size is that of the measurements: the cost is linear in layers.
        """
        z = np.zeros_like(self.spread)
        damping, misfits = 0.0, self.misfits(z)
        first = None
        for _ in range(ITERATIONS):
            A = self.jacobian(z * self.spread) * self.spread
            gradient = z + A.T @ misfits
            size = float(np.linalg.norm(gradient))
            first = size if first is None else first
            if size <= CONVERGED * first:
                break
            value = misfits @ misfits + z @ z
            inner, outer = A @ gradient, A @ A.T
            while True:
                ridge = 1 + damping
                step = (A.T @ np.linalg.solve(outer + ridge * np.eye(len(outer)), inner) - gradient) / ridge
                then = self.misfits((z + step) * self.spread)
                # Not a number where the step overflows: then it is too long as well.
                if then @ then + (z + step) @ (z + step) <= value:
                    break
                damping = max(1e-3, 10 * damping)
                if damping > 1e12:  # no step improves: rounding is all that is left
                    return z * self.spread
            z, misfits = z + step, then
            damping = damping / 10 if damping > 1e-3 else 0.0
        return z * self.spread

    def _terms(self, x: Floats) -> Floats:
        """Compute (measured, layers) the corrected errors of the layers."""
        coefficients = len(self.warp.names)
        fixed = self._features @ x[: coefficients - 1] + x[coefficients:-2]
        with np.errstate(over="ignore"):
            return self._error * np.exp(fixed + x[coefficients - 1] * self._share)
