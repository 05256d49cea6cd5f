"""A sign plane beside sparse and low-rank parts: `W ~ S + (U V) * B` with `B` in {-1, +1}."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from globalopt.kernels.cholesky import damped_cholesky
from globalopt.kernels.low_rank import leading_subspace, subspace_step
from globalopt.kernels.norm import Norm, Side
from globalopt.kernels.obs import obs_prune
from globalopt.values.layer import NM

PLAIN = Norm(None)


@dataclass(frozen=True, eq=False)
class SignPlane:
    """`L = (U V) * B`: `U` (d_out, rank), `V` (rank, d_in), and `B` (d_out, d_in) of +-1 as floats."""

    U: Tensor
    V: Tensor
    B: Tensor

    def dense(self) -> Tensor:
        """(d_out, d_in) `L`."""
        return (self.U @ self.V) * self.B


class SparseAndSigns(NamedTuple):
    """`W ~ S + L` with a sign plane, `S` (d_out, d_in) with exact zeros."""

    S: Tensor
    plane: SignPlane


def signs(Y: Tensor) -> Tensor:
    """+-1 (d_out, d_in) floats; +1 at zero."""
    return torch.where(Y < 0, -1.0, 1.0).to(Y.dtype)


def alternate(
    W: Tensor, keep: Callable[[Tensor], Tensor], rank: int, steps: int, error: Callable[[Tensor], float]
) -> SparseAndSigns:
    """`min ||W - S - (U V) * B||_F` by turns, and the round of least `error` (SLaB, arXiv:2604.04493):

        S <- the kept entries of W - L,   Y = W - S,   B <- sign(Y),   U V <- the best of that rank for |Y|

    As `B * B = 1`, the distance is `||Y * B - U V||_F`, and for `U V >= 0` the signs of `Y` are the best. The leading
    pair of `|Y|` has no negative entry (Perron-Frobenius), so that both steps are exact at rank 1. The subspace is
    exact at first and tracked afterwards.

    Args:
        W: (d_out, d_in), not modified.
        keep: magnitudes (d_out, d_in) -> mask of the entries of `S`.
        steps: rounds, >= 1; without a plane (rank 0) one is enough.
        error: of a residual (d_out, d_in).
    """
    subspace, L = None, torch.zeros_like(W)
    best, least = None, float("inf")
    for _ in range(steps if rank else 1):
        rest = W - L
        S = rest.masked_fill(~keep(rest.abs()), 0.0)
        Y = W - S
        size, B = Y.abs(), signs(Y)
        if subspace is None:
            subspace = leading_subspace(size, size, PLAIN, rank)
        else:
            subspace = subspace_step(size, size, PLAIN, subspace)
        plane = SignPlane(subspace.U, subspace.factor(size), B)
        L = plane.dense()
        reached = error(Y - L)
        if best is None or reached < least:
            best, least = SparseAndSigns(S, plane), reached
    assert best is not None
    return best


def sign_sweep(
    W: Tensor, R: Tensor, plane: SignPlane, nnz: int, pattern: NM | None = None, *, column_block: int = 128
) -> SparseAndSigns:
    """`min tr((W - S - (U V) * B) G (W - S - (U V) * B)ᵀ)` over `S` and `B` at given `U V`, columns left to right.

    `obs_prune` with `|U V|` as the floor. The signs are those of the corrected weights, as in a quantiser that feeds
    its error forward. All column blocks compete for the nonzeros.

    Args:
        W: (d_out, d_in), not modified; where a column of `W` and of `U V` is zero, that of `S` is.
        R: (d_in, d_in) upper triangular with `Rᵀ R = G^-1` (`obs_factor`).
        plane: its `U` and `V` are kept; its signs are not read.
        nnz: weights to keep, 0 <= nnz <= numel; not read under a pattern.
        column_block: columns per block, rounded down to whole groups (at least one) under a pattern.
    """
    UV = plane.U @ plane.V
    swept = obs_prune(W, R, nnz, pattern, column_block=column_block, layer_wide=True, floor=UV.abs())
    B = signs(swept) * signs(UV)
    # Exactly zero where a weight has fallen to its magnitude.
    return SparseAndSigns(swept - UV * B, SignPlane(plane.U, plane.V, B))


def fit_factors(Y: Tensor, plane: SignPlane, norm: Norm) -> SignPlane:
    """Lower `||Y - (U V) * B||²` over `U` and `V`: for one pair after another, first `u` and then `v` exactly.

    With `Z = diag(v) Bᵀ` or `diag(u) B`, `*` by entries, and `N = A Y G` of what the other pairs leave of `Y`:

        [A * (Zᵀ G Z)] u = (N * Zᵀ) 1,    [G * (Zᵀ A Z)] v = (N * Z)ᵀ 1.

    Without `A` the system for `u` is diagonal. Signs average out most of what `G` has off its diagonal, so that the one
    for `v` is well conditioned.

    Args:
        Y: (d_out, d_in).
        norm: with an input side.
    """
    U, V, B = plane.U.clone(), plane.V.clone(), plane.B
    for k in range(U.shape[1]):
        u, v = U[:, k : k + 1], V[k]
        N = norm.times(Y - (U @ V - u * v) * B)
        u.copy_(_solve_scales(norm.outputs, v * B, _times(v * B, norm.inputs), N)[:, None])
        Z = (u * B).mT
        v.copy_(_solve_scales(norm.inputs, Z, _times(Z, norm.outputs), N.mT))
    return SignPlane(U, V, B)


def _times(Z: Tensor, side: Side | None) -> Tensor:
    return Z if side is None else Z @ side.matrix


def _solve_scales(side: Side | None, Z: Tensor, ZO: Tensor, N: Tensor) -> Tensor:
    """`x` (d,) with `[K * (Z O Zᵀ)] x = (N * Z) 1`, `K` the matrix of `side` and `ZO` (d, m) `= Z O`; 0 for `Z = 0`."""
    right = (N * Z).sum(1)
    diagonal = (ZO * Z).sum(1)
    if side is None or not bool((diagonal > 0).any()):
        return torch.where(diagonal > 0, right / diagonal, 0.0)
    factor = damped_cholesky(side.matrix * (ZO @ Z.mT), 0.0).factor
    return torch.cholesky_solve(right[:, None], factor)[:, 0]
