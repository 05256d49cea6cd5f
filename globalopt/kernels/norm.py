"""Define the damped norm `tr(A E G Eᵀ)` that solvers minimise, and solve ridge problems in it.

`Norm` and `globalopt.values.metric.Metric` are the same formula of different matrices. A `Metric` holds the second
moments as they were measured; they may be singular, and reported errors are taken in them. A `Norm` holds the same
moments with damping added, often rescaled to unit diagonals: positive definite, with their Cholesky factors, so that
a solver can invert them. As the damping goes to zero, the two norms agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from globalopt.kernels.cholesky import ridge_inverse
from globalopt.kernels.precision import rough_product

INVERSES = 2**27
"""Bytes of inverses that one matrix of a norm keeps."""


@dataclass(frozen=True, eq=False)
class Side:
    """Hold one matrix of a norm, the damped input or output Gram, with a factor of it.

    Args:
        matrix: (d, d) symmetric positive definite.
        factor: (d, d) with `factor factorᵀ = matrix`.

    >>> damped = torch.diag(torch.tensor([1.0, 16.0]))
    >>> round(Side(damped, damped.sqrt()).geometric_mean, 4)
    4.0
    """

    matrix: Tensor
    factor: Tensor

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Compute the eigenvalues (d,), ascending, and the eigenvectors (d, d)."""
        values, vectors = torch.linalg.eigh(self.matrix)
        return values, vectors

    def inverse(self, penalty: float) -> Tensor:
        """Compute `(matrix + penalty I)^-1` (d, d); the first ones, up to `INVERSES` bytes, are kept.

        The targets of a path are solved at the same penalties, and an inverse takes longer than several steps.
        """
        if penalty not in self._inverses:
            made = ridge_inverse(self.matrix, penalty)
            if (len(self._inverses) + 1) * made.nbytes > INVERSES:
                return made
            self._inverses[penalty] = made
        return self._inverses[penalty]

    @cached_property
    def _inverses(self) -> dict[float, Tensor]:
        return {}

    @cached_property
    def geometric_mean(self) -> float:
        """Compute the geometric mean of the eigenvalues, `det^(1/d)`, from the diagonal of the triangular factor."""
        return float(self.factor.diagonal().double().abs().log().mean().mul(2).exp())

    def reordered(self, order: Tensor) -> Side:
        """Permute the coordinates into another `order` (d,), without another factorisation."""
        return _Reordered(self.matrix[order][:, order], self.factor[order], self, order)


@dataclass(frozen=True, eq=False)
class _Reordered(Side):
    """Hold a permuted `Side`, which takes decompositions from its `origin`; its factor is no longer triangular."""

    origin: Side
    order: Tensor

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Return the eigenvalues of the origin, and its eigenvectors with permuted rows."""
        values, vectors = self.origin.eigen
        return values, vectors[self.order]

    @cached_property
    def geometric_mean(self) -> float:
        """Return the geometric mean of the origin's eigenvalues, which a permutation does not change."""
        return self.origin.geometric_mean


@dataclass(frozen=True, eq=False)
class Norm:
    """Define the damped norm `||E||² = tr(A E G Eᵀ)` of residuals `E` (d_out, d_in), in which a layer is fitted.

    Errors are reported in the undamped `globalopt.values.metric.Metric` instead.

    Args:
        inputs: damped input Gram G (d_in, d_in); None is the identity.
        outputs: damped output Gram A (d_out, d_out); None is the identity.

    >>> G = torch.diag(torch.tensor([4.0, 1.0]))
    >>> E = torch.tensor([[1.0, 2.0]])
    >>> AEG = Norm(Side(G, G.sqrt())).times(E)
    >>> AEG.tolist(), float((E * AEG).sum())  # the second is the squared norm
    ([[4.0, 2.0]], 8.0)
    """

    inputs: Side | None
    outputs: Side | None = None

    @property
    def factor(self) -> Tensor | None:
        """Return the factor `F` (d_in, d_in) of `G`, with `F Fᵀ = G`; None for the identity."""
        return None if self.inputs is None else self.inputs.factor

    def times(self, E: Tensor) -> Tensor:
        """Compute `A E G` (d_out, d_in), half the gradient of the squared norm."""
        EG = E if self.inputs is None else E @ self.inputs.matrix
        return EG if self.outputs is None else self.outputs.matrix @ EG


Product = Callable[[Tensor, Tensor], Tensor]
"""Function that multiplies two matrices."""

Ridge = Callable[[Tensor], Tensor]
"""Function that solves one ridge problem: `R` (d_out, d_in) -> the `S` with `A S G + penalty S = R`."""


class RidgePair(NamedTuple):
    """Hold two functions that solve one ridge problem, in float32 and with `rough_product`.

    Products in bfloat16 lose what cancels in them, and `R` is much larger than the solution. So `rough` is for changes
    of `R` alone: it maps them to changes of `S`, whose error is relative to the change.

    >>> G = torch.diag(torch.tensor([3.0, 15.0]))
    >>> solve = ridge(Side(G, G.sqrt()), [(slice(0, 1), None)], penalty=1.0)
    >>> R, change = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.04, 0.16]])
    >>> ((solve(R) + solve.rough(change)) / solve(R + change)).round(decimals=3).tolist()
    [[1.0, 1.0]]
    """

    exact: Ridge
    rough: Ridge

    def __call__(self, R: Tensor) -> Tensor:
        """Solve in the precision of `R`."""
        return self.exact(R)


def ridge(inputs: Side, outputs: Sequence[tuple[slice, Side | None]], penalty: float) -> RidgePair:
    """Prepare the ridge problem `A S G + penalty S = R` at one penalty, and return the functions that solve it.

    The rows may belong to several layers with the same inputs, each with its own `A`. Without any `A` the solution is a
    product with `(G + penalty I)^-1`; with it, in the eigenbases `A = P diag(a) Pᵀ` and `G = Q diag(b) Qᵀ`,

        S = P [(Pᵀ R Q) / (a bᵀ + penalty)] Qᵀ.

    Args:
        inputs: `G` (d_in, d_in).
        outputs: pairs of a slice of rows and their `A`, covering all rows; None for the identity.
        penalty: > 0.

    >>> G = torch.diag(torch.tensor([3.0, 15.0]))
    >>> solve = ridge(Side(G, G.sqrt()), [(slice(0, 1), None)], penalty=1.0)
    >>> solve(torch.tensor([[1.0, 1.0]])).tolist()
    [[0.25, 0.0625]]
    """
    if all(side is None for _, side in outputs):
        inverse = inputs.inverse(penalty)
        rounded = cache(inverse.bfloat16)
        return RidgePair(lambda R: R @ inverse, lambda R: rough_product(R, rounded()))

    b, Q = inputs.eigen

    def solve(R: Tensor, product: Product) -> Tensor:
        """Solve for `S` in the eigenbases."""
        RQ = product(R, Q)
        for rows, side in outputs:
            if side is None:
                RQ[rows] /= b + penalty
                continue
            a, P = side.eigen
            shrunk = product(P.mT, RQ[rows]) / torch.addcmul(b.new_tensor(penalty), a[:, None], b)
            RQ[rows] = product(P, shrunk)
        return product(RQ, Q.mT)

    return RidgePair(lambda R: solve(R, torch.matmul), lambda R: solve(R, rough_product))
