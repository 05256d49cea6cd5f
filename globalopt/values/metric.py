"""Measure layer errors by the second moments of a layer's inputs and of the gradients at its output.

The moments here are undamped: errors that are reported or compared are taken in them. A solver fits in a damped,
positive definite version of the same norm, `globalopt.kernels.norm.Norm`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from globalopt.errors import CalibrationError
from globalopt.values.entries import all_finite, count_nonzeros

STRIP = 512
"""Rows of a Gram that are checked at a time."""


@dataclass(frozen=True, eq=False)
class Gram:
    """Hold a second moment `matrix` (d, d), the mean of `x xᵀ` over `tokens` tokens.

    Args:
        matrix: (d, d) float32, symmetric up to rounding, positive semidefinite; never modified.
        tokens: how many tokens the mean was taken over; 0 where none reached the layer, and `matrix` stands in for it.
    Raises:
        CalibrationError: the matrix is not square, symmetric and finite, or has a negative diagonal.

    >>> x = torch.tensor([[1.0, 2.0], [3.0, 0.0]])  # two tokens
    >>> gram = Gram(x.mT @ x / 2, tokens=2)
    >>> gram.matrix.tolist()
    [[5.0, 1.0], [1.0, 2.0]]
    >>> gram.diagonal.tolist()
    [5.0, 2.0]
    """

    matrix: Tensor
    tokens: int

    def __post_init__(self) -> None:
        m = self.matrix
        if m.ndim != 2 or m.shape[0] != m.shape[1]:
            raise CalibrationError(f"A Gram must be square; got shape {tuple(m.shape)}.")
        if self.tokens < 0:
            raise CalibrationError(f"A Gram is a mean over tokens; got {self.tokens} of them.")
        # A strip at a time, as temporary copies of a whole Gram would set the peak memory of a run.
        strips = [slice(first, first + STRIP) for first in range(0, len(m), STRIP)]
        if not all(all_finite(m[rows]) for rows in strips):
            raise CalibrationError("The Gram is not finite: the activations overflow or the model holds NaN.")
        if bool((m.diagonal() < 0).any()):
            raise CalibrationError("The Gram has a negative diagonal entry; it is no second moment.")
        scale = max(m[rows].abs().max() for rows in strips)
        if any(bool((m[rows] - m.mT[rows]).abs().max() > 1e-4 * scale) for rows in strips):
            raise CalibrationError("The Gram is not symmetric; it is no second moment.")

    @classmethod
    def stand_in(cls, others: Iterable[Gram], d: int, scale: float = 1.0) -> Gram:
        """Make the Gram of a layer that no token reached: the mean of those of its siblings, or a multiple of identity.

        Args:
            others: Grams of the layer's siblings; of those that stand in themselves nothing is taken.
            d: size of the matrix.
            scale: of the identity, where there are no siblings.

        >>> Gram.stand_in([Gram(torch.eye(2), 5), Gram(3 * torch.eye(2), 5)], 2)
        Gram(matrix=tensor([[2., 0.],
                [0., 2.]]), tokens=0)
        """
        known = [gram for gram in others if gram.tokens]
        if not known:
            return cls(scale * torch.eye(d), 0)
        return cls(sum((gram.matrix for gram in known[1:]), known[0].matrix) / len(known), 0)

    @cached_property
    def is_diagonal(self) -> bool:
        """Tell whether all entries beside the diagonal are zero."""
        return count_nonzeros(self.matrix) == count_nonzeros(self.diagonal)

    @property
    def diagonal(self) -> Tensor:
        """Return the mean square of each coordinate, (d,)."""
        return self.matrix.diagonal()

    @property
    def norms(self) -> Tensor:
        """Compute the root mean square of each coordinate, (d,): Wanda's `||x_j||` divided by `sqrt(tokens)`."""
        return self.diagonal.sqrt()

    def to(self, device: torch.device) -> Gram:
        """Copy the Gram to `device`; one that is there already is returned itself."""
        return self if self.matrix.device == device else Gram(self.matrix.to(device), self.tokens)

    def damped(self, damping: float) -> Gram:
        """Make a new Gram with `damping * mean(diagonal)` added to the diagonal."""
        ridge = damping * float(self.diagonal.double().mean())
        return Gram(self.matrix + ridge * torch.eye(len(self.matrix), device=self.matrix.device), self.tokens)


ENTRIES_AT_ONCE = 2**22
"""Entries of a residual whose squared error is summed in float64 at a time."""


@dataclass(frozen=True, eq=False)
class Metric:
    """Measure the error of a layer by the undamped norm `tr(A E G Eᵀ)`, or `tr(E G Eᵀ)` without `outputs`.

    `tr(E G Eᵀ)` is the mean squared error of the layer's output, summed over its coordinates. With the output Gram `A`,
    half of `tr(A E G Eᵀ)` is the block-diagonal Fisher's estimate of the loss increase, in nats per token.

    This is the norm of reported errors. A Gram of few tokens is singular, so that a solver cannot invert it: solvers
    add damping and fit in `globalopt.kernels.norm.Norm`, and their result is measured here again.

    Args:
        inputs: input Gram G (d_in, d_in), the second moment of the layer's inputs.
        outputs: output Gram A (d_out, d_out), the second moment of the gradients at the layer's output; None: identity.

    >>> metric = Metric(Gram(torch.diag(torch.tensor([4.0, 1.0])), tokens=10))
    >>> E = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # the same error in an input that is large and in one that is small
    >>> metric.error(E[:1]), metric.error(E[1:])
    (4.0, 1.0)
    """

    inputs: Gram
    outputs: Gram | None = None

    def error(self, residual: Tensor) -> float:
        """Compute `tr(A E G Eᵀ)` of the residual `E` (d_out, d_in), undamped, summed in float64."""
        G = self.inputs.matrix
        residual = residual.to(G.dtype)
        AE = residual if self.outputs is None else self.outputs.matrix.to(residual.dtype) @ residual
        # Some rows at a time, as a float64 copy of a whole layer may be more than the memory that is left.
        rows = max(1, ENTRIES_AT_ONCE // len(G))
        found = 0.0
        for begin in range(0, len(residual), rows):
            some = slice(begin, begin + rows)
            EG = residual[some] * self.inputs.diagonal if self.inputs.is_diagonal else residual[some] @ G
            found += float(EG.double().mul_(AE[some]).sum())
        # Rounding can make an error that is exactly zero slightly negative.
        return max(0.0, found)

    def uncorrelated_error(self, residual: Tensor) -> float:
        """Compute the error expected of a residual (d_out, d_in) whose entries are uncorrelated, with mean 0.

            E tr(A E G Eᵀ) = sum_ij A_ii G_jj E_ij^2

        So it is with rounding errors, and takes no product with a Gram.

        >>> metric = Metric(Gram(torch.tensor([[4.0, 2.0], [2.0, 1.0]]), tokens=10))
        >>> metric.uncorrelated_error(torch.tensor([[0.5, -1.0]])), metric.error(torch.tensor([[0.5, -1.0]]))
        (2.0, 0.0)
        """
        by_row = residual.square().to(self.inputs.diagonal.dtype) @ self.inputs.diagonal
        outputs = torch.ones_like(by_row) if self.outputs is None else self.outputs.diagonal
        return float(by_row.double() @ outputs.double())
