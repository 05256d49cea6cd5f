"""The positive definite norm `tr(A E G Eᵀ)` in which a layer is fitted, and its ridge problems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from globalopt.kernels.cholesky import ridge_inverse


@dataclass(frozen=True, eq=False)
class Side:
    """A positive definite `matrix` (d, d) and a `factor` (d, d) of it, `factor factorᵀ = matrix`."""

    matrix: Tensor
    factor: Tensor

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (d,) and eigenvectors (d, d)."""
        values, vectors = torch.linalg.eigh(self.matrix)
        return values, vectors

    @cached_property
    def geometric_mean(self) -> float:
        """Geometric mean of the eigenvalues, from the determinant; the factor is triangular."""
        return float(self.factor.diagonal().double().abs().log().mean().mul(2).exp())

    def reordered(self, order: Tensor) -> Side:
        """The same side with its coordinates in another `order` (d,); nothing is factorised again."""
        return _Reordered(self.matrix[order][:, order], self.factor[order], self, order)


@dataclass(frozen=True, eq=False)
class _Reordered(Side):
    """A `Side` in another order than that of its `origin`; its factor is no longer triangular."""

    origin: Side
    order: Tensor

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        values, vectors = self.origin.eigen
        return values, vectors[self.order]

    @cached_property
    def geometric_mean(self) -> float:
        return self.origin.geometric_mean


@dataclass(frozen=True, eq=False)
class Norm:
    """`||E||² = tr(A E G Eᵀ)`: `inputs` is G, `outputs` is A; None is the identity."""

    inputs: Side | None
    outputs: Side | None = None

    @property
    def factor(self) -> Tensor | None:
        """`F` (d_in, d_in) with `F Fᵀ = G`."""
        return None if self.inputs is None else self.inputs.factor

    def times(self, E: Tensor) -> Tensor:
        """`A E G` (d_out, d_in)."""
        EG = E if self.inputs is None else E @ self.inputs.matrix
        return EG if self.outputs is None else self.outputs.matrix @ EG


Ridge = Callable[[Tensor], Tensor]
"""Solves one ridge problem: `R` (d_out, d_in) -> the `S` with `A S G + penalty S = R`."""


def ridge(inputs: Side, outputs: Sequence[tuple[slice, Side | None]], penalty: float) -> Ridge:
    """The ridge problem at `penalty`, where the rows of a layer, or of several on the same inputs, have their own `A`.

    Without `A` that is a product with `(G + penalty I)^-1`; with it, in the eigenbases `A = P diag(a) Pᵀ` and
    `G = Q diag(b) Qᵀ`,

        S = P [(Pᵀ R Q) / (a bᵀ + penalty)] Qᵀ.

    Args:
        outputs: `A` by rows, covering all of them; None for the identity.
    """
    if all(side is None for _, side in outputs):
        inverse = ridge_inverse(inputs.matrix, penalty)
        return lambda R: R @ inverse

    b, Q = inputs.eigen

    def solve(R: Tensor) -> Tensor:
        RQ = R @ Q
        for rows, side in outputs:
            if side is None:
                RQ[rows] /= b + penalty
                continue
            a, P = side.eigen
            RQ[rows] = P @ ((P.mT @ RQ[rows]) / torch.addcmul(b.new_tensor(penalty), a[:, None], b))
        return RQ @ Q.mT

    return solve
