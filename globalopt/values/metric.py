"""Second moments of a layer's inputs and output gradients, and the error norm they define."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from globalopt.errors import CalibrationError

STRIP = 512
"""Rows of a Gram that are checked at once."""


@dataclass(frozen=True, eq=False)
class Gram:
    """Second moment `matrix` (d, d) float32 of a tensor over `tokens` tokens; never modified."""

    matrix: Tensor
    tokens: int

    def __post_init__(self) -> None:
        m = self.matrix
        if m.ndim != 2 or m.shape[0] != m.shape[1]:
            raise CalibrationError(f"A Gram must be square; got shape {tuple(m.shape)}.")
        if self.tokens < 1:
            raise CalibrationError("A Gram needs at least one token; no token reached this input.")
        # A strip at a time: copies of the matrix would be what a run needs most memory for.
        strips = [slice(first, first + STRIP) for first in range(0, len(m), STRIP)]
        if not all(bool(torch.isfinite(m[rows]).all()) for rows in strips):
            raise CalibrationError("The Gram is not finite: the activations overflow or the model holds NaN.")
        if bool((m.diagonal() < 0).any()):
            raise CalibrationError("The Gram has a negative diagonal entry; it is no second moment.")
        scale = max(m[rows].abs().max() for rows in strips)
        if any(bool((m[rows] - m.mT[rows]).abs().max() > 1e-4 * scale) for rows in strips):
            raise CalibrationError("The Gram is not symmetric; it is no second moment.")

    @property
    def diagonal(self) -> Tensor:
        """(d,) mean square of each coordinate."""
        return self.matrix.diagonal()

    @property
    def norms(self) -> Tensor:
        """(d,) root mean square of each coordinate, Wanda's `||x_j||` up to the number of tokens."""
        return self.diagonal.sqrt()

    def to(self, device: torch.device) -> Gram:
        """The same Gram on `device`."""
        return self if self.matrix.device == device else Gram(self.matrix.to(device), self.tokens)

    def damped(self, damping: float) -> Gram:
        """A new Gram with `damping * mean(diagonal)` added to the diagonal."""
        ridge = damping * float(self.diagonal.double().mean())
        return Gram(self.matrix + ridge * torch.eye(len(self.matrix), device=self.matrix.device), self.tokens)


ENTRIES_AT_ONCE = 2**22
"""Of a residual whose error is summed in float64."""


@dataclass(frozen=True, eq=False)
class Metric:
    """The norm a layer error is measured in: `tr(A E G Eᵀ)`, or `tr(E G Eᵀ)` without `outputs`.

    `inputs` is G (d_in, d_in); `outputs` is A (d_out, d_out) or None.
    """

    inputs: Gram
    outputs: Gram | None = None

    def error(self, residual: Tensor) -> float:
        """`tr(A E G Eᵀ)` for the residual `E` (d_out, d_in), undamped, summed in float64."""
        G = self.inputs.matrix
        residual = residual.to(G.dtype)
        AE = residual if self.outputs is None else self.outputs.matrix.to(residual.dtype) @ residual
        # Some rows at a time: copies in float64 of a whole layer would be what a small machine runs out of memory for.
        rows = max(1, ENTRIES_AT_ONCE // len(G))
        found = 0.0
        for begin in range(0, len(residual), rows):
            some = slice(begin, begin + rows)
            found += float((residual[some] @ G).double().mul_(AE[some]).sum())
        # Rounding can push an exact zero below it.
        return max(0.0, found)
