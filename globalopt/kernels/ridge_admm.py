"""Joint sparse + low-rank fit by the alternating direction method of multipliers (3BASiL, arXiv:2603.01376)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from globalopt.kernels.cholesky import ridge_inverse
from globalopt.kernels.low_rank import leading_subspace, subspace_step

# Share of the support that changed since the last check, and the growth of the penalty above it.
RARELY = 0.005
GROWTH = ((0.1, 1.1), (RARELY, 1.05), (0.0, 1.02))
LARGEST_PENALTY = 1e6
SMALLEST_PENALTY = 1e-6
RESTART = 5.0  # divides a penalty so large that the first support hardly moves
SETTLED = 3e-4  # share of the support below which the iteration stops,
EARLIEST = 100  # but not before this step


class RidgeADMM(NamedTuple):
    """Sparse `S` and low-rank `U V`, the steps taken, whether the support settled, and the last penalty."""

    S: Tensor
    U: Tensor
    V: Tensor
    steps: int
    settled: bool
    penalty: float


def ridge_admm(
    W: Tensor,
    G: Tensor,
    F: Tensor,
    rank: int,
    keep: Callable[[Tensor], Tensor],
    *,
    penalty: float = 0.1,
    check_every: int = 10,
    max_steps: int = 2000,
) -> RidgeADMM:
    """Minimise `tr((W - S - L) G (W - S - L)ᵀ)` over sparse `S` and `L` of rank at most `rank`.

    With a copy `Z` of `S` that carries the constraint, a dual `Y` and the penalty p, one step is

        R = (W - L) G - Y + p Z
        S <- R (G + p I)^-1
        Z <- the kept entries of S + Y / p
        Y <- Y + p (S - Z)
        L <- U Uᵀ M,  U <- orth((M G)(Mᵀ U)),  M = W - S

    The linear system hands over `S G = R - p S`, so `M G = W G - R + p S` costs nothing and a step has a single product
    with a (d_in, d_in) matrix. The penalty grows slowly while the support moves: that search is where the quality is.
    The last `L` is the exact optimum for the final `Z`.

    Args:
        W: (d_out, d_in). G: (d_in, d_in) positive definite, best with a unit diagonal, which makes `penalty` free of
            scale. F: any factor with `F Fᵀ = G`. None is modified.
        rank: 0 <= rank <= min(d_out, d_in).
        keep: magnitudes (d_out, d_in) -> mask of the entries to keep; keeps the same number every time, at least one.
        penalty: p at the start; the most sensitive setting, too large freezes the first support.
        check_every: steps between looks at the support, each of which moves the penalty (`GROWTH`).
        max_steps: most steps, >= 1.
    """
    WG = W @ G
    first = keep(W.abs())
    Z, Y, LG = W.masked_fill(~first, 0.0), torch.zeros_like(W), torch.zeros_like(W)
    nnz = int(first.sum())
    seen, grown, settled, step = first, False, False, 0
    inverse = ridge_inverse(G, penalty)
    U: Tensor | None = None
    for step in range(1, max_steps + 1):
        R = torch.add(WG, Z, alpha=penalty).sub_(LG).sub_(Y)
        S = R @ inverse
        proposal = torch.add(S, Y, alpha=1 / penalty)
        support = keep(proposal.abs())
        Z = proposal.masked_fill(~support, 0.0)
        Y = (proposal - Z).mul_(penalty)
        if rank:
            M, MG = W - S, torch.add(WG, S, alpha=penalty).sub_(R)
            U = leading_subspace(M, MG, F, rank) if U is None else subspace_step(M, MG, U)
            LG = U @ (U.mT @ MG)
        if step % check_every:
            continue
        moved = int((support != seen).sum()) / nnz
        seen = support
        settled = (grown and moved == 0) or (step >= EARLIEST and moved < SETTLED)
        if settled:
            break
        if not grown and moved <= RARELY:
            penalty = max(penalty / RESTART, SMALLEST_PENALTY)
            Z, Y, seen = W.masked_fill(~first, 0.0), torch.zeros_like(W), first
        else:
            grown = True
            penalty = min(penalty * next(factor for above, factor in GROWTH if moved > above), LARGEST_PENALTY)
        inverse = ridge_inverse(G, penalty)
    M = W - Z
    U = leading_subspace(M, M @ G, F, rank)
    return RidgeADMM(Z, U, U.mT @ M, step, settled, penalty)
