"""ALPS as published: ADMM over the support with a fast penalty, then ten conjugate gradient steps on the support."""

from __future__ import annotations

import torch
from torch import Tensor

from globalopt.values.layer import NM
from tests.reference.penalty_loop import Penalty, UnitDiagonal, Verdict, damped, project


def fit(
    W: Tensor,
    G: Tensor,
    nnz: int,
    pattern: NM | None = None,
    *,
    damping: float = 0.01,
    max_steps: int = 300,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`S` (d_out, d_in) for a Gram damped by `damping` of its mean diagonal."""
    return prune(W.to(dtype), UnitDiagonal.of(damped(G.to(dtype), damping, 0.0)), nnz, pattern, max_steps)


def prune(W: Tensor, scaled: UnitDiagonal, nnz: int, pattern: NM | None, max_steps: int) -> Tensor:
    """`S` (d_out, d_in) for a damped Gram that is factorised already."""
    WD = W * scaled.D
    WH = WD @ scaled.H
    penalty = Penalty(growth=(1.3, 1.2, 1.1), earliest=30)
    inverse = scaled.ridge_inverse(penalty.rho)
    first = project(WD, nnz, pattern)
    Z, dual, seen = first, torch.zeros_like(WD), first != 0
    for step in range(1, max_steps + 1):
        B = (WH - dual + penalty.rho * Z) @ inverse
        Z = project(B + dual / penalty.rho, nnz, pattern)
        dual = dual + penalty.rho * (B - Z)
        if step % 3:
            continue
        moved = int(((Z != 0) != seen).sum())
        seen = Z != 0
        verdict = penalty.look(step, moved, nnz)
        if verdict is Verdict.STOP:
            break
        if verdict is Verdict.RESTART:
            Z, dual = first, torch.zeros_like(WD)
        inverse = scaled.ridge_inverse(penalty.rho)
    return back_solve(Z, WH, scaled.H, Z != 0, steps=10) / scaled.D


def back_solve(S: Tensor, WH: Tensor, H: Tensor, support: Tensor, steps: int) -> Tensor:
    """`min tr((W - S) H (W - S)ᵀ)` over the values on `support`, from `S`; each row is a system of its own."""
    R = (WH - S @ H) * support
    P, square = R, (R * R).sum(1, keepdim=True)
    for _ in range(steps):
        HP = (P @ H) * support
        curvature = (P * HP).sum(1, keepdim=True)
        alpha = torch.where(curvature > 0, square / curvature, 0.0)
        S, R = S + alpha * P, R - alpha * HP
        following = (R * R).sum(1, keepdim=True)
        P, square = R + torch.where(square > 0, following / square, 0.0) * P, following
    return S
