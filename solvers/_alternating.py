"""Alternate between the sparse and the low-rank part: the loop of OATS and HASSLE-free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from globalopt.kernels.low_rank import Subspace, leading_subspace, subspace_step
from globalopt.kernels.norm import Norm
from globalopt.values.decomposition import Trace


class AlternatingResult(NamedTuple):
    """Hold `W ~ S + U V`, the steps taken, whether the error had settled, and the error after every step, from 0 on."""

    S: Tensor
    U: Tensor
    V: Tensor
    steps: int
    settled: bool
    trace: Trace


@dataclass(frozen=True, eq=False)
class TrackedSubspace:
    """Update the low-rank part: the exact leading subspace at first, one step of subspace iteration afterwards."""

    norm: Norm
    rank: int

    def __call__(self, M: Tensor, N: Tensor, previous: Subspace | None) -> Subspace:
        if previous is None:
            return leading_subspace(M, N, self.norm, self.rank)
        return subspace_step(M, N, self.norm, previous)


@dataclass(frozen=True, eq=False)
class Alternating:
    """Minimise `||W - S - L||²` by alternation, and keep the best pair of all rounds. One round is

        S <- sparse_step(W - L - m (L - L'))
        L <- U (A U)ᵀ (W - S)

    where `L'` is the `L` of the round before. With its support fixed for the moment, `S` reproduces entries that `L`
    could take over, so that rounds are small steps in one direction; the momentum m lengthens them. It takes fewer
    rounds, and ends at a lower error than two hundred rounds without.

    Args:
        sparse_step: `(W - L, with momentum, previous S)`, both (d_out, d_in) -> the next S. The first previous S is 0.
        low_rank_step: `(M, A M G, previous subspace or None)` -> subspace.
        norm: in which errors are measured.
        steps: the largest number of rounds, >= 1.
        tolerance: relative change of the error in one round below which it has settled.
        momentum: m, in [0, 1).
        low_rank_first: begin with `L` of `W` instead of `L = 0`.
    """

    sparse_step: Callable[[Tensor, Tensor], Tensor]
    low_rank_step: Callable[[Tensor, Tensor, Subspace | None], Subspace]
    norm: Norm
    steps: int
    tolerance: float
    momentum: float = 0.0
    low_rank_first: bool = False

    def run(self, W: Tensor) -> AlternatingResult:
        """Fit `W` (d_out, d_in), which is not modified."""
        AWG = self.norm.times(W)
        subspace = self.low_rank_step(W, AWG, None) if self.low_rank_first else None
        L = torch.zeros_like(W) if subspace is None else subspace.U @ subspace.factor(W)
        before = L
        S = best = torch.zeros_like(W)
        best_error, previous, settled, taken = float("inf"), float("inf"), False, 0
        trace = [(0, float((W * AWG).sum(dtype=torch.float64)))]
        while taken < self.steps and not settled:
            taken += 1
            S = self.sparse_step(W - torch.lerp(before, L, 1 + self.momentum), S)
            M = W - S
            N = self.norm.times(M)
            subspace = self.low_rank_step(M, N, subspace)
            V = subspace.factor(M)
            before, L = L, subspace.U @ V
            # L is a projection of M, so Pythagoras gives the error of the pair.
            error = float((M * N).sum(dtype=torch.float64) - (V * (subspace.U.mT @ N)).sum(dtype=torch.float64))
            trace.append((taken, max(0.0, error)))
            if error < best_error:
                best, best_error = S, error
            settled = subspace.rank == 0 or abs(previous - error) <= self.tolerance * error
            previous = error
        M = W - best
        subspace = self.low_rank_step(M, self.norm.times(M), None)
        return AlternatingResult(best, subspace.U, subspace.factor(M), taken, settled, tuple(trace))
