"""Sparse and low-rank parts fitted by turns: the strategy behind OATS, HASSLE-free and one-shot compensation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from globalopt.kernels.low_rank import leading_subspace, subspace_step


class Fit(NamedTuple):
    """`W ~ S + U V`, the steps taken, and whether the error had settled."""

    S: Tensor
    U: Tensor
    V: Tensor
    steps: int
    settled: bool


@dataclass(frozen=True, eq=False)
class TrackedSubspace:
    """Low-rank step: the exact leading subspace at first, one step of subspace iteration afterwards.

    `F` (d_in, d_in) is a factor of the metric, `F Fᵀ = G`; None for the plain norm.
    """

    F: Tensor | None
    rank: int

    def __call__(self, M: Tensor, MG: Tensor, previous: Tensor | None) -> Tensor:
        if previous is None:
            return leading_subspace(M, MG, self.F, self.rank)
        return subspace_step(M, MG, previous)


@dataclass(frozen=True, eq=False)
class Alternating:
    """`min tr((W - S - L) G (W - S - L)ᵀ)` by `S <- sparse_step(W - L)`, `L <- U Uᵀ (W - S)`, keeping the best pair.

    Args:
        sparse_step: (d_out, d_in) -> its sparse approximation.
        low_rank_step: `(M, M G, previous U or None)` -> orthonormal `U` (d_out, rank).
        G: (d_in, d_in) positive definite, or None for the plain norm.
        steps: most rounds, >= 1.
        tolerance: relative change of the error in one round below which it has settled.
        low_rank_first: begin with `L` of `W` instead of `L = 0`.
    """

    sparse_step: Callable[[Tensor], Tensor]
    low_rank_step: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    G: Tensor | None
    steps: int
    tolerance: float
    low_rank_first: bool = False

    def run(self, W: Tensor) -> Fit:
        """Fit `W` (d_out, d_in), which is not modified."""
        U = self.low_rank_step(W, self._times_G(W), None) if self.low_rank_first else None
        L = torch.zeros_like(W) if U is None else U @ (U.mT @ W)
        best, best_error, previous, settled, taken = torch.zeros_like(W), float("inf"), float("inf"), False, 0
        while taken < self.steps and not settled:
            taken += 1
            S = self.sparse_step(W - L)
            M = W - S
            MG = self._times_G(M)
            U = self.low_rank_step(M, MG, U)
            UM = U.mT @ M
            L = U @ UM
            # L is a projection of M, so Pythagoras gives the error of the pair.
            error = float((M * MG).sum(dtype=torch.float64) - (UM * (U.mT @ MG)).sum(dtype=torch.float64))
            if error < best_error:
                best, best_error = S, error
            settled = U.shape[1] == 0 or abs(previous - error) <= self.tolerance * error
            previous = error
        M = W - best
        U = self.low_rank_step(M, self._times_G(M), None)
        return Fit(best, U, U.mT @ M, taken, settled)

    def _times_G(self, M: Tensor) -> Tensor:
        return M if self.G is None else M @ self.G
