"""Scale a layer so that its damped Grams have unit diagonals.

In these coordinates `|w|` is Wanda's score, and a penalty does not depend on the scale of inputs or outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from globalopt.kernels.cholesky import damped_cholesky, obs_factor
from globalopt.kernels.low_rank import leading_subspace
from globalopt.kernels.norm import Norm, Side
from globalopt.protocols import Outputs
from globalopt.values.budget import Target
from globalopt.values.decomposition import Decomposition
from globalopt.values.metric import Metric
from solvers.layer_problem import LayerProblem


@dataclass(frozen=True)
class Damping:
    """Set the damping that is added to the Grams before they are factorised.

    Args:
        mean: fraction of the mean of G's diagonal added to it.
        diagonal: fraction of each of G's diagonal entries added to it.
        outputs: fraction of each of A's diagonal entries added to it.
    """

    mean: float
    diagonal: float
    outputs: float


@dataclass(frozen=True, eq=False)
class UnitDiagonal:
    """Hold a layer, its scaled weight `W` (d_out, d_in) `= rows * weight * columns`, and the `norm` of the fit.

    `columns` (d_in,) is the root of the damped Gram's diagonal; `layer.rows` that of `A`. `inputs_damping` is the
    damping that the factorisation of the Gram needed, `climbed` the part of A's damping beyond the one asked for.
    """

    layer: LayerProblem
    W: Tensor
    norm: Norm
    columns: Tensor
    inputs_damping: float
    climbed: float

    @classmethod
    def read(
        cls,
        weight: Tensor,
        metric: Metric,
        damping: Damping,
        outputs: Outputs,
        beside: UnitDiagonal | None = None,
    ) -> UnitDiagonal:
        """Scale a layer; one on the same inputs as `beside` shares its scaled Gram and factor."""
        layer = LayerProblem.read(weight, metric, outputs)
        if beside is None:
            damped = damped_cholesky(layer.G, damping.mean, damping.diagonal)
            columns = damped.matrix.diagonal().sqrt()
            inputs = Side(damped.matrix / columns / columns[:, None], damped.factor / columns[:, None])
            took = damped.damping
        else:
            columns, inputs, took = beside.columns, beside.inputs, beside.inputs_damping
        side, climbed = None, 0.0
        if outputs is Outputs.FULL and layer.weighted and metric.outputs is not None:
            A = metric.outputs.matrix / metric.outputs.diagonal.mean()
            A = A / layer.rows / layer.rows.mT
            # A row that hardly changes the loss keeps its whole scale.
            A.diagonal().fill_(1.0)
            correlated = damped_cholesky(A, damping.outputs)
            root = correlated.matrix.diagonal().sqrt()[:, None]
            side = Side(correlated.matrix / root / root.mT, correlated.factor / root)
            climbed = correlated.damping - damping.outputs
        return cls(layer, layer.live * columns, Norm(inputs, side), columns, took, climbed)

    @property
    def damping(self) -> float:
        """The damping of the factorisations, in fractions of mean diagonals: all of G's, and A's beyond that asked."""
        return self.inputs_damping + self.climbed

    @property
    def inputs(self) -> Side:
        """The damped G (d_in, d_in) at unit diagonal."""
        if self.norm.inputs is None:
            raise ValueError("A layer at unit diagonals has an input Gram.")
        return self.norm.inputs

    def restored(self, S: Tensor, U: Tensor, V: Tensor) -> Decomposition:
        """Undo the scaling of a decomposition `S + U V` of `W`."""
        return self.layer.restored(S, U, V, self.columns)

    def best_low_rank(self, S: Tensor, rank: int) -> tuple[Decomposition, float]:
        """Complete `S` (d_out, d_in) by the optimal `L` of at most `rank`, and give the error of both, all scaled."""
        M = self.W - S
        N = self.norm.times(M)
        subspace = leading_subspace(M, N, self.norm, rank)
        V = subspace.factor(M)
        # L is a projection of M, so Pythagoras gives the error.
        error = (M * N).sum(dtype=torch.float64) - (V * (subspace.U.mT @ N)).sum(dtype=torch.float64)
        return self.restored(S, subspace.U, V), max(0.0, float(error))

    def without_search(self, target: Target) -> Decomposition | None:
        """Compute the optimum of a target that keeps all weights or none, for which no support is chosen; else None."""
        if target.nnz == self.W.numel():
            return self.layer.kept(torch.ones_like(self.W, dtype=torch.bool))
        if target.nnz == 0:
            return self.best_low_rank(torch.zeros_like(self.W), target.rank)[0]
        return None


@dataclass(frozen=True, eq=False)
class Sweepable:
    """Hold a scaled layer, the upper factor `R` (d_in, d_in) with `Rᵀ R = G^-1`, and the damping of both."""

    unit: UnitDiagonal
    R: Tensor
    damping: float

    @classmethod
    def of(cls, unit: UnitDiagonal) -> Sweepable:
        """Factorise the inverse of the scaled Gram of `unit`."""
        backwards = damped_cholesky(unit.inputs.matrix.flip(0, 1), 0.0)
        return cls(unit, obs_factor(backwards.factor), unit.damping + backwards.damping)
