"""Represent a weight as sparse plus low-rank, and record how a solver found this decomposition."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

import torch
from torch import Tensor

from globalopt.errors import NumericalError
from globalopt.values.budget import Target
from globalopt.values.entries import all_finite, count_nonzeros
from globalopt.values.layer import NM, Shape
from globalopt.values.storage import PLAIN, Scales, Storage


@dataclass(frozen=True, eq=False)
class Decomposition:
    """Approximate a weight by `S + U V`; for SLaB by `S + (U V) * signs`, with `*` entry by entry.

    Args:
        S: (d_out, d_in), sparse: with exact zeros.
        U: (d_out, rank). V: (rank, d_in). Rank 0 is allowed.
        signs: (d_out, d_in) of +-1, or None.
        scales: of the grids on which the numbers lie, but for rounding to their dtype; None where they lie on none.
    Raises:
        NumericalError: the shapes disagree, or a part is not finite.

    >>> S = torch.tensor([[0.0, 3.0], [0.0, 0.0]])
    >>> value = Decomposition(S, U=torch.tensor([[1.0], [2.0]]), V=torch.tensor([[1.0, 1.0]]))
    >>> value.dense().tolist()
    [[1.0, 4.0], [2.0, 2.0]]
    >>> value.rank, value.nnz
    (1, 1)
    """

    S: Tensor
    U: Tensor
    V: Tensor
    signs: Tensor | None = None
    scales: Scales | None = None

    def __post_init__(self) -> None:
        d_out, d_in = self.S.shape
        if self.U.shape[0] != d_out or self.V.shape[1] != d_in or self.U.shape[1] != self.V.shape[0]:
            raise NumericalError(
                f"Shapes disagree: S {tuple(self.S.shape)}, U {tuple(self.U.shape)}, V {tuple(self.V.shape)}."
            )
        if self.signs is not None and self.signs.shape != self.S.shape:
            raise NumericalError(f"Signs {tuple(self.signs.shape)} do not match S {tuple(self.S.shape)}.")
        for label, part in (("S", self.S), ("U", self.U), ("V", self.V)):
            if not all_finite(part):
                raise NumericalError(f"{label} of the decomposition is not finite.")

    @property
    def storage(self) -> Storage:
        """Return the bits in which the numbers can be stored."""
        return PLAIN if self.scales is None else self.scales.storage

    @property
    def rank(self) -> int:
        """Return the number of columns of `U`."""
        return self.U.shape[1]

    @property
    def nnz(self) -> int:
        """Count the nonzeros of `S`."""
        return count_nonzeros(self.S)

    def dense(self) -> Tensor:
        """Compute the dense matrix (d_out, d_in), in float32, or in float64 if the parts are."""
        dtype = torch.promote_types(self.S.dtype, torch.float32)
        L = self.U.to(dtype) @ self.V.to(dtype)
        if self.signs is not None:
            L = L * self.signs
        return L.add_(self.S)

    def to(self, device: torch.device) -> Decomposition:
        """Return the same decomposition on `device`."""
        if self.S.device == device:
            return self
        signs = None if self.signs is None else self.signs.to(device)
        scales = None if self.scales is None else self.scales.to(device)
        return Decomposition(self.S.to(device), self.U.to(device), self.V.to(device), signs, scales)

    def cast(self, dtype: torch.dtype) -> Decomposition:
        """Return the decomposition with its parts rounded to `dtype`; in bfloat16 no nonzero becomes zero."""
        signs = None if self.signs is None else self.signs.to(dtype)
        return Decomposition(self.S.to(dtype), self.U.to(dtype), self.V.to(dtype), signs, self.scales)

    def matvec(self, x: Tensor) -> Tensor:
        """Multiply inputs `x` (..., d_in) by the approximated weight, giving (..., d_out).

        Without signs the low-rank product is not formed: `x Sᵀ + (x Vᵀ) Uᵀ`.
        """
        if self.signs is not None:
            return x @ self.dense().to(x.dtype).mT
        return x @ self.S.to(x.dtype).mT + (x @ self.V.to(x.dtype).mT) @ self.U.to(x.dtype).mT

    def fits(self, target: Target) -> bool:
        """Tell whether rank, nonzeros, bytes and pattern are within `target`, and signs and storage are those of it.

        >>> value = Decomposition(torch.eye(2), torch.zeros(2, 0), torch.zeros(0, 2))
        >>> value.fits(Target(0, 2)), value.fits(Target(0, 1))
        (True, False)
        """
        if self.storage != target.storage:
            return False
        nnz, shape = self.nnz, Shape(*self.S.shape)
        if self.rank > target.rank or nnz > target.nnz or (self.signs is not None) != target.signs:
            return False
        # A layer with some zeros takes an index, in few bits, and one without takes none.
        if replace(target, rank=self.rank, nnz=nnz).bytes(shape) > target.bytes(shape):
            return False
        return target.pattern is None or follows(self.S, target.pattern)


def follows(S: Tensor, pattern: NM) -> bool:
    """Tell whether `S` (d_out, d_in) follows an N:M pattern.

    Every group of `pattern.of` consecutive weights of a row must have at most `pattern.keep` nonzeros.

    >>> follows(torch.tensor([[1.0, 0.0, 0.0, 2.0]]), NM(2, 4))
    True
    >>> follows(torch.tensor([[1.0, 3.0, 0.0, 2.0]]), NM(2, 4))
    False
    """
    if S.shape[1] % pattern.of:
        return False
    groups = S.reshape(S.shape[0], -1, pattern.of)
    return bool(((groups != 0).sum(-1) <= pattern.keep).all())


class Status(Enum):
    """Name how a solver ended, each with a sentence of advice.

    >>> Status("max-steps").advice
    'The step limit came first; more steps may lower the error.'
    """

    CONVERGED = "converged"
    MAX_STEPS = "max-steps"
    FALLBACK = "fallback"

    @property
    def advice(self) -> str:
        """Return the sentence that tells a user what the status means."""
        return {
            Status.CONVERGED: "The support settled, or the method has no iteration to wait for.",
            Status.MAX_STEPS: "The step limit came first; more steps may lower the error.",
            Status.FALLBACK: "The Gram needed more damping than asked; use more calibration tokens.",
        }[self]


@dataclass(frozen=True, eq=False)
class Solution:
    """Hold the result of a solver for one layer.

    Args:
        value: the decomposition.
        error: `tr(A E G Eᵀ)` of the residual `E = W - S - L`, undamped (`Metric.error`), >= 0.
        status: how the solver ended.
        stats: figures by name, such as steps and damping.
        trace: iterations and the objective after them, in the solver's own damped norm; the first entry, at 0, is the
            objective of the zero matrix. It is empty for a solver without iterations, or where evaluating the objective
            would cost time.
    Raises:
        NumericalError: the error is negative or not finite.

    >>> W = torch.eye(2)
    >>> value = Decomposition(torch.diag(torch.tensor([1.0, 0.0])), U=torch.zeros(2, 0), V=torch.zeros(0, 2))
    >>> solution = Solution(value, error=float((W - value.dense()).square().sum()))
    >>> solution.error, solution.status.value
    (1.0, 'converged')
    """

    value: Decomposition
    error: float
    status: Status = Status.CONVERGED
    stats: Mapping[str, float] = field(default_factory=dict)
    trace: Trace = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.error) and self.error >= 0):
            raise NumericalError(f"The layer error came out as {self.error}; the decomposition is unusable.")


Trace = tuple[tuple[int, float], ...]
"""Iterations of a solver and its objective after each; the entry at iteration 0 is that of the zero matrix."""
