"""Coordinates in which a layer's damped Grams have unit diagonals: there `|w|` is Wanda's score, and a penalty has no
scale."""

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
from solvers._layer import Layer


@dataclass(frozen=True)
class Damping:
    """What is added to the Grams before they are factorised.

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
    """A layer, its weight `W` (d_out, d_in) `= rows W columns`, and the `norm` it is fitted in.

    `columns` (d_in,) is the root of the damped Gram's diagonal; `layer.rows` that of `A`. `inputs_damping` is what the
    Gram's factorisation took, `climbed` what A's took beyond what was asked.
    """

    layer: Layer
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
        """A layer in these coordinates; one on the inputs of `beside` shares what was made of their Gram."""
        layer = Layer.read(weight, metric, outputs)
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
            # A row the loss hardly feels keeps its whole scale.
            A.diagonal().fill_(1.0)
            correlated = damped_cholesky(A, damping.outputs)
            root = correlated.matrix.diagonal().sqrt()[:, None]
            side = Side(correlated.matrix / root / root.mT, correlated.factor / root)
            climbed = correlated.damping - damping.outputs
        return cls(layer, layer.live * columns, Norm(inputs, side), columns, took, climbed)

    @property
    def damping(self) -> float:
        """What the factorisations took, as fractions of mean diagonals: all of G's, and A's beyond what was asked."""
        return self.inputs_damping + self.climbed

    @property
    def inputs(self) -> Side:
        """The damped G (d_in, d_in) at unit diagonal."""
        if self.norm.inputs is None:
            raise ValueError("A layer at unit diagonals has an input Gram.")
        return self.norm.inputs

    def restored(self, S: Tensor, U: Tensor, V: Tensor) -> Decomposition:
        """`S + U V` in these coordinates, as parts of the weight."""
        return self.layer.restored(S, U, V, self.columns)

    def best_low_rank(self, S: Tensor, rank: int) -> tuple[Decomposition, float]:
        """`S` with the exact optimum of `L` for it, and the error of both in these coordinates."""
        M = self.W - S
        N = self.norm.times(M)
        subspace = leading_subspace(M, N, self.norm, rank)
        V = subspace.factor(M)
        # L is a projection of M, so Pythagoras gives the error.
        left = (M * N).sum(dtype=torch.float64) - (V * (subspace.U.mT @ N)).sum(dtype=torch.float64)
        return self.restored(S, subspace.U, V), max(0.0, float(left))

    def without_search(self, target: Target) -> Decomposition | None:
        """The optimum where there is no support to choose, all weights kept or none; None otherwise."""
        if target.nnz == self.W.numel():
            return self.layer.kept(torch.ones_like(self.W, dtype=torch.bool))
        if target.nnz == 0:
            return self.best_low_rank(torch.zeros_like(self.W), target.rank)[0]
        return None


@dataclass(frozen=True, eq=False)
class Sweepable:
    """A layer at unit diagonals with the upper factor `R` (d_in, d_in), `Rᵀ R = G^-1`, and the damping both took."""

    unit: UnitDiagonal
    R: Tensor
    damping: float

    @classmethod
    def of(cls, unit: UnitDiagonal) -> Sweepable:
        backwards = damped_cholesky(unit.inputs.matrix.flip(0, 1), 0.0)
        return cls(unit, obs_factor(backwards.factor), unit.damping + backwards.damping)
