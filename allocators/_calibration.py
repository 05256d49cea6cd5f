"""A calibration of the error surfaces by the evaluated losses of a few allocations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from allocators._warp import Warp
from globalopt.values.budget import Target
from globalopt.values.problem import Problem

Floats = NDArray[np.float64]

# Prior standard deviations, in log units: the coefficients of the warp, a layer's own multiplier, and the power.
WARP_SPREAD = 0.7
LAYER_SPREAD = 0.3
POWER_SPREAD = 0.2
LEVEL_SPREAD = 2.0
NOISE = 0.01
"""Standard deviation of an evaluated log loss about this model, from its misfit and from the choice of windows."""

LEAST = 1e-300


@dataclass(frozen=True, eq=False)
class Calibration:
    """Describe a model of the loss of an allocation, with multipliers of the predicted errors.

        log loss = level + power log sum_l m_l(c_l) error_l(c_l),   log m_l(c) = theta · features_l(c) + u_l

    `theta` warps by kind, depth and rank share (`Warp`), `u_l` is the layer's own; `power` below 1 is a loss that
    saturates. Level and power change no comparison at one budget, but the scale of the predictions.

    Args:
        warp: names the coefficients.
        theta: one per coefficient. own: `u_l` by layer name.
        residual: root mean square of `log measured - log predicted` over the allocations it was fitted to.
    """

    warp: Warp
    theta: Floats
    own: Mapping[str, float]
    level: float
    power: float
    residual: float

    @classmethod
    def fit(cls, problem: Problem, measured: Sequence[tuple[Mapping[str, Target], float]]) -> Calibration:
        """Fit the posterior mode under independent normal priors about 0 (power: about 1), by least squares.

        Args:
            measured: allocations and their losses above 0, on the same windows; one is enough.
        """
        posterior = Posterior(problem, measured)
        # The type stubs of scipy do not know that the derivative may be a function.
        x = least_squares(
            posterior.residuals,
            np.zeros(len(posterior.spread)),
            jac=posterior.jacobian,  # pyright: ignore[reportArgumentType]
            x_scale=posterior.spread,
        ).x
        misfit = posterior.residuals(x)[: len(measured)] * NOISE
        coefficients = len(posterior.warp.names)
        own = dict(zip(posterior.names, x[coefficients:-2].tolist(), strict=True))
        return cls(
            posterior.warp,
            x[:coefficients],
            own,
            float(x[-2]),
            float(1 + x[-1]),
            float(np.sqrt(np.mean(misfit**2))),
        )

    def apply(self, problem: Problem, share: float = 1.0) -> Problem:
        """Return the problem with its errors multiplied by `m_l(c)^share`; a share of 0 changes nothing."""
        warped = self.warp.apply(problem, share * self.theta)
        return warped.scaled({name: math.exp(share * own) for name, own in self.own.items()})

    def loss(self, problem: Problem, targets: Mapping[str, Target]) -> float:
        """Predict the loss of `targets` of the problem it was fitted to."""
        total = self.apply(problem).predicted(targets)
        return float(np.exp(self.level + self.power * np.log(max(total, LEAST))))


class Posterior:
    """Describe the negative log posterior of a calibration as a sum of squares, `½ ||residuals(x)||²` up to a constant.

    `x` is `theta`, then `u` in the order of the surfaces, the level, and the power less 1.

    Args:
        measured: allocations and their losses above 0.
    """

    def __init__(self, problem: Problem, measured: Sequence[tuple[Mapping[str, Target], float]]) -> None:
        self.warp = Warp.of(problem)
        self.names = [surface.spec.name for surface in problem.surfaces]
        self._error = np.array([[s.predict(t[s.spec.name]) for s in problem.surfaces] for t, _ in measured])
        self._features = np.stack(
            [self.warp.features(s.spec, [t[s.spec.name] for t, _ in measured]) for s in problem.surfaces], axis=1
        )
        self._losses = np.log([max(loss, LEAST) for _, loss in measured])
        coefficients, layers = len(self.warp.names), len(self.names)
        self.spread = np.concatenate(
            [np.full(coefficients, WARP_SPREAD), np.full(layers, LAYER_SPREAD), [LEVEL_SPREAD, POWER_SPREAD]]
        )

    def residuals(self, x: Floats) -> Floats:
        """Compute (measured + parameters,) the misfits over `NOISE`, and the parameters over their prior deviations."""
        total = np.maximum(self._terms(x).sum(1), LEAST)
        return np.concatenate([(x[-2] + (1 + x[-1]) * np.log(total) - self._losses) / NOISE, x / self.spread])

    def jacobian(self, x: Floats) -> Floats:
        """Compute (measured + parameters, parameters) the derivative of `residuals`."""
        each = self._terms(x)
        total = np.maximum(each.sum(1, keepdims=True), LEAST)
        share = (1 + x[-1]) * each / total
        columns = [np.einsum("nl,nlk->nk", share, self._features), share, np.ones((len(each), 1)), np.log(total)]
        return np.concatenate([np.concatenate(columns, axis=1) / NOISE, np.diag(1 / self.spread)])

    def _terms(self, x: Floats) -> Floats:
        """Compute (measured, layers) the corrected errors of the layers."""
        coefficients = len(self.warp.names)
        return self._error * np.exp(self._features @ x[:coefficients] + x[coefficients:-2])
