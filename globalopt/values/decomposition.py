"""Sparse plus low-rank decompositions of a weight, and how a solver found one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from globalopt.errors import NumericalError
from globalopt.values.budget import Target
from globalopt.values.layer import NM


@dataclass(frozen=True, eq=False)
class Decomposition:
    """`W ~ S + U V`, or `S + (U V) * signs` for SLaB.

    Args:
        S: (d_out, d_in) with exact zeros.
        U: (d_out, rank). V: (rank, d_in). Rank 0 is allowed.
        signs: (d_out, d_in) of +-1, or None.
    """

    S: Tensor
    U: Tensor
    V: Tensor
    signs: Tensor | None = None

    def __post_init__(self) -> None:
        d_out, d_in = self.S.shape
        if self.U.shape[0] != d_out or self.V.shape[1] != d_in or self.U.shape[1] != self.V.shape[0]:
            raise NumericalError(
                f"Shapes disagree: S {tuple(self.S.shape)}, U {tuple(self.U.shape)}, V {tuple(self.V.shape)}."
            )
        if self.signs is not None and self.signs.shape != self.S.shape:
            raise NumericalError(f"Signs {tuple(self.signs.shape)} do not match S {tuple(self.S.shape)}.")
        for label, part in (("S", self.S), ("U", self.U), ("V", self.V)):
            if not bool(torch.isfinite(part).all()):
                raise NumericalError(f"{label} of the decomposition is not finite.")

    @property
    def rank(self) -> int:
        return self.U.shape[1]

    @property
    def nnz(self) -> int:
        return int(torch.count_nonzero(self.S))

    def dense(self) -> Tensor:
        """(d_out, d_in) float32, or float64 if the parts are: the matrix this stands for."""
        dtype = torch.promote_types(self.S.dtype, torch.float32)
        L = self.U.to(dtype) @ self.V.to(dtype)
        if self.signs is not None:
            L = L * self.signs
        return L.add_(self.S)

    def to(self, device: torch.device) -> Decomposition:
        """The same decomposition on `device`."""
        if self.S.device == device:
            return self
        signs = None if self.signs is None else self.signs.to(device)
        return Decomposition(self.S.to(device), self.U.to(device), self.V.to(device), signs)

    def matvec(self, x: Tensor) -> Tensor:
        """Apply to inputs `x` (..., d_in) -> (..., d_out), without forming the low-rank product where possible."""
        if self.signs is not None:
            return x @ self.dense().to(x.dtype).mT
        return x @ self.S.to(x.dtype).mT + (x @ self.V.to(x.dtype).mT) @ self.U.to(x.dtype).mT

    def fits(self, target: Target) -> bool:
        """Whether counts and pattern are within `target`."""
        if self.rank > target.rank or self.nnz > target.nnz or (self.signs is not None) != target.signs:
            return False
        return target.pattern is None or follows(self.S, target.pattern)


def follows(S: Tensor, pattern: NM) -> bool:
    """Whether every group of `pattern.of` consecutive weights of a row of `S` has at most `pattern.keep` nonzeros."""
    if S.shape[1] % pattern.of:
        return False
    groups = S.reshape(S.shape[0], -1, pattern.of)
    return bool(((groups != 0).sum(-1) <= pattern.keep).all())


class Status(Enum):
    """How a solver ended, each with a sentence of advice."""

    CONVERGED = "converged"
    MAX_STEPS = "max-steps"
    FALLBACK = "fallback"

    @property
    def advice(self) -> str:
        return {
            Status.CONVERGED: "The support settled, or the method has no iteration to wait for.",
            Status.MAX_STEPS: "The step limit came first; more steps may lower the error.",
            Status.FALLBACK: "The Gram needed more damping than asked; use more calibration tokens.",
        }[self]


@dataclass(frozen=True, eq=False)
class Solution:
    """A solver's answer: `value`, its undamped `error` (`Metric.error`), how it ended, and figures (`stats`).

    `trace` holds iterations and the objective after them, in the solver's own damped norm; first, after 0, that of
    keeping nothing. It is empty where there is no iteration, or where writing it down would cost time.
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
"""Iterations of a solver and its objective after them; after 0 it is that of keeping nothing."""
