"""Fit a plane of signs beside sparse and low-rank parts: `W ~ S + (U V) * B`, with `B` in {-1, +1}, `*` by entries."""

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
"""The Frobenius norm: both sides are the identity."""


@dataclass(frozen=True, eq=False)
class SignPlane:
    """Hold a low-rank matrix with signs, `L = (U V) * B`.

    Args:
        U: (d_out, rank). V: (rank, d_in).
        B: (d_out, d_in) of +-1 as floats.

    >>> plane = SignPlane(torch.tensor([[1.0], [2.0]]), torch.ones(1, 2), torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    >>> plane.dense().tolist()
    [[1.0, -1.0], [-2.0, 2.0]]
    """

    U: Tensor
    V: Tensor
    B: Tensor

    def dense(self) -> Tensor:
        """Compute `L` (d_out, d_in)."""
        return (self.U @ self.V) * self.B


class SparseAndSigns(NamedTuple):
    """Hold the decomposition `W ~ S + L` with a sign plane `L`.

    Args:
        S: (d_out, d_in) with exact zeros.
        plane: of `L`.

    >>> plane = SignPlane(torch.ones(2, 1), torch.ones(1, 2), signs(torch.tensor([[1.0, -2.0], [3.0, 4.0]])))
    >>> found = SparseAndSigns(S=torch.diag(torch.tensor([0.0, 3.0])), plane=plane)
    >>> (found.S + found.plane.dense()).tolist()
    [[1.0, -1.0], [1.0, 4.0]]
    """

    S: Tensor
    plane: SignPlane


def signs(Y: Tensor) -> Tensor:
    """Compute the signs +-1 of `Y` (d_out, d_in) as floats, with +1 at zero.

    >>> signs(torch.tensor([-2.0, 0.0, 3.0])).tolist()
    [-1.0, 1.0, 1.0]
    """
    return torch.where(Y < 0, -1.0, 1.0).to(Y.dtype)


def alternate(
    W: Tensor, keep: Callable[[Tensor], Tensor], rank: int, steps: int, error: Callable[[Tensor], float]
) -> SparseAndSigns:
    """Minimise `||W - S - (U V) * B||_F` by alternation and keep the round of least `error` (SLaB, arXiv:2604.04493).

        S <- the kept entries of W - L,   Y = W - S,   B <- sign(Y),   U V <- the best of that rank for |Y|

    As `B * B = 1`, the distance is `||Y * B - U V||_F`, and for `U V >= 0` the signs of `Y` are the best. The leading
    pair of `|Y|` has no negative entry (Perron-Frobenius), so that both steps are exact at rank 1. The subspace is
    computed exactly in the first round and tracked afterwards.

    Args:
        W: (d_out, d_in), not modified.
        keep: function from magnitudes (d_out, d_in) to the mask of the entries of `S`.
        rank: of `U V`; 0 has no sign plane.
        steps: rounds, >= 1; at rank 0 one is enough and one is made.
        error: function from a residual (d_out, d_in) to its error, by which rounds are compared.

    >>> W = torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])) * torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    >>> found = alternate(W, lambda scores: scores > 10, rank=1, steps=3, error=lambda E: float(E.square().sum()))
    >>> torch.allclose(found.plane.dense(), W, atol=1e-4)  # full rank without the signs
    True
    """
    subspace, L = None, torch.zeros_like(W)
    best, least = None, float("inf")
    for _ in range(steps if rank else 1):
        residual = W - L
        S = residual.masked_fill(~keep(residual.abs()), 0.0)
        Y = W - S
        magnitudes, B = Y.abs(), signs(Y)
        if subspace is None:
            subspace = leading_subspace(magnitudes, magnitudes, PLAIN, rank)
        else:
            subspace = subspace_step(magnitudes, magnitudes, PLAIN, subspace)
        plane = SignPlane(subspace.U, subspace.factor(magnitudes), B)
        L = plane.dense()
        current = error(Y - L)
        if best is None or current < least:
            best, least = SparseAndSigns(S, plane), current
    assert best is not None
    return best


def sign_sweep(
    W: Tensor, R: Tensor, plane: SignPlane, nnz: int, pattern: NM | None = None, *, column_block: int = 128
) -> SparseAndSigns:
    """Choose `S` and `B` at given `U V` column by column, to minimise `tr(E G Eᵀ)` of `E = W - S - (U V) * B`.

    This is `obs_prune` with `|U V|` as the floor. The signs are those of the corrected weights, as in a quantiser that
    feeds its error forward. All column blocks compete for the nonzeros.

    Args:
        W: (d_out, d_in), not modified; where a column of `W` and of `U V` is zero, that of `S` is.
        R: (d_in, d_in) upper triangular with `Rᵀ R = G^-1` (`obs_factor`).
        plane: its `U` and `V` are kept; its signs are ignored.
        nnz: weights to keep, 0 <= nnz <= numel; ignored under a pattern.
        pattern: N:M pattern of `S`; None is unstructured.
        column_block: columns per block, rounded down to whole groups (at least one) under a pattern.

    >>> plane = SignPlane(torch.ones(1, 1), torch.ones(1, 4), torch.ones(1, 4))
    >>> S, plane = sign_sweep(torch.tensor([[1.0, -1.0, 1.0, 9.0]]), torch.eye(4), plane, nnz=1)
    >>> S.tolist(), plane.B.tolist()
    ([[0.0, 0.0, 0.0, 8.0]], [[1.0, -1.0, 1.0, 1.0]])
    """
    UV = plane.U @ plane.V
    swept = obs_prune(W, R, nnz, pattern, column_block=column_block, layer_wide=True, floor=UV.abs())
    B = signs(swept) * signs(UV)
    # The difference is exactly zero where a weight is not kept, as it then equals `U V * B`.
    return SparseAndSigns(swept - UV * B, SignPlane(plane.U, plane.V, B))


def fit_factors(Y: Tensor, plane: SignPlane, norm: Norm) -> SignPlane:
    """Lower `||Y - (U V) * B||²` over `U` and `V`: pair by pair, first `u` and then `v` by exact least squares.

    With `Z = diag(v) Bᵀ` or `diag(u) B`, `*` by entries, and `N = A E G` for the residual `E` of the other pairs in
    `Y`:

        [A * (Zᵀ G Z)] u = (N * Zᵀ) 1,    [G * (Zᵀ A Z)] v = (N * Z)ᵀ 1.

    Without `A` the system for `u` is diagonal. Signs average out most of the off-diagonal part of `G`, so that the
    system for `v` is well conditioned.

    Args:
        Y: (d_out, d_in) matrix to approximate.
        plane: the start; its signs are kept.
        norm: with an input side.

    >>> B = torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    >>> Y = torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])) * B
    >>> found = fit_factors(Y, SignPlane(torch.ones(2, 1), torch.ones(1, 2), B), Norm(Side(torch.eye(2), torch.eye(2))))
    >>> torch.allclose(found.dense(), Y)  # exact in one pass, as the signs fit
    True
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
    """Multiply `Z` by the matrix of `side`; None is the identity."""
    return Z if side is None else Z @ side.matrix


def _solve_scales(side: Side | None, Z: Tensor, ZO: Tensor, N: Tensor) -> Tensor:
    """Solve `[K * (Z O Zᵀ)] x = (N * Z) 1` for `x` (d,), where `*` is by entries.

    Args:
        side: whose matrix is `K` (d, d); None is the identity.
        Z: (d, m). ZO: (d, m) the product `Z O`. N: (d, m).
    Returns:
        (d,), with 0 where the diagonal of the system is 0, and all 0 for `Z = 0`.
    """
    right = (N * Z).sum(1)
    diagonal = (ZO * Z).sum(1)
    if side is None or not bool((diagonal > 0).any()):
        return torch.where(diagonal > 0, right / diagonal, 0.0)
    factor = damped_cholesky(side.matrix * (ZO @ Z.mT), 0.0).factor
    return torch.cholesky_solve(right[:, None], factor)[:, 0]
