"""Fit the values of a fixed support to their grids: one sweep over the columns, then coordinate descent."""

from __future__ import annotations

import torch
from torch import Tensor

from globalopt.kernels.grid import snap

BLOCK = 64
"""Columns that are updated one by one; all others follow in one product."""


def grid_sweep(S: Tensor, scales: Tensor, bits: int, R: Tensor) -> Tensor:
    """Round `S` column by column, and let the columns to the right make up for it.

    Rounding column j changes the weights to its right by `-(e_j / R_jj) R_j`, the optimal correction when everything to
    its left is fixed (GPTQ, arXiv:2210.17323, section 3.3). Entries outside the support are rounded too, to zero.

    Args:
        S: (d_out, d_in), not modified.
        scales: (d_out, d_in) of the grids; 0 outside the support.
        bits: of the codes.
        R: (d_in, d_in) upper triangular with `Rᵀ R = G^-1` (`obs_factor`).
    Returns:
        (d_out, d_in) levels, with the support of `scales`.

    >>> from globalopt.kernels.cholesky import damped_cholesky, obs_factor
    >>> G = torch.tensor([[1.0, 0.9], [0.9, 1.0]])  # two correlated inputs
    >>> R = obs_factor(damped_cholesky(G.flip(0, 1), 0.0).factor)
    >>> grid_sweep(torch.tensor([[1.0, 0.7]]), torch.ones(1, 2), 3, R).tolist()  # 1.5 is .5 too much: the other is less
    [[1.5, 0.5]]
    """
    # Work on the transpose: a column of W is then contiguous.
    W = S.mT.clone(memory_format=torch.contiguous_format)
    scales = scales.mT.contiguous()
    found = torch.empty_like(W)
    steps = R / R.diagonal()[:, None]
    for begin in range(0, len(W), BLOCK):
        end = min(begin + BLOCK, len(W))
        errors = torch.empty_like(W[begin:end])
        for j in range(begin, end):
            found[j] = snap(W[j], scales[j], bits)
            torch.sub(W[j], found[j], out=errors[j - begin])
            W[j + 1 : end].addr_(steps[j, j + 1 : end], errors[j - begin], alpha=-1)
        W[end:].addmm_(steps[begin:end, end:].mT, errors, alpha=-1)
    return found.mT.contiguous()


def grid_descent(W: Tensor, S: Tensor, scales: Tensor, bits: int, G: Tensor, passes: int) -> Tensor:
    """Lower `tr((W - S) G (W - S)ᵀ)` over levels of the grids, one column after the other, all others fixed.

    The best levels of a column are those nearest to `S_j + ((W - S) G)_j / G_jj`; rows do not interact. No step raises
    the error. Where half of the weights are kept, it leaves .5 to .85 of the error that rounding adds by `grid_sweep`
    alone.

    Args:
        W: (d_out, d_in) to approximate.
        S: (d_out, d_in) levels, not modified.
        scales: (d_out, d_in) of the grids; 0 outside the support.
        G: (d_in, d_in) damped input Gram.
        passes: over all columns.

    >>> G = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    >>> W, levels = torch.tensor([[1.0, 0.7]]), torch.tensor([[0.5, 0.5]])
    >>> grid_descent(W, levels, torch.ones(1, 2), 3, G, passes=1).tolist()  # 1.18 would be the best for the first
    [[1.5, 0.5]]
    """
    S, scales = S.mT.clone(memory_format=torch.contiguous_format), scales.mT.contiguous()
    D = G @ (W.mT - S)  # (d_in, d_out)
    diagonal = G.diagonal()
    for _ in range(passes):
        moved = False
        for begin in range(0, len(S), BLOCK):
            end = min(begin + BLOCK, len(S))
            changes = torch.empty_like(S[begin:end])
            near = D[begin:end].clone()
            for j in range(begin, end):
                best = snap(S[j] + near[j - begin] / diagonal[j], scales[j], bits)
                torch.sub(best, S[j], out=changes[j - begin])
                S[j] = best
                near.addr_(G[begin:end, j], changes[j - begin], alpha=-1)
            if bool(changes.any()):
                moved = True
                D.addmm_(G[:, begin:end], changes, alpha=-1)
        if not moved:
            break
    return S.mT.contiguous()
