"""Optimal-brain-surgeon pruning, column by column (SparseGPT, arXiv:2301.00774, algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from globalopt.kernels.projection import indicate_planes, indicate_top
from globalopt.values.layer import NM

INNER = 32  # columns


def obs_prune(
    W: Tensor,
    R: Tensor,
    nnz: int,
    pattern: NM | None = None,
    *,
    column_block: int = 128,
    layer_wide: bool = False,
    floor: Tensor | None = None,
) -> Tensor:
    """Sparse `S` for `min tr((W - S) G (W - S)ᵀ)`, pruning columns left to right.

    Pruning `w_j` moves the weights to its right by `-(w_j / R_jj) R_j`, the optimal correction for what is already
    fixed; its price is `(w_j / R_jj)²`. Weights are chosen by price, on the corrected weights, entering each
    `column_block`, or under a pattern entering each group.

    Departures from the published code: the counts of the blocks add up to `nnz` exactly, in proportion to their
    columns that are not zero, so that dead inputs use none of it; `layer_wide` lets blocks compete, each taking those
    of its weights that are among the best of all columns still to come. With a `floor` a weight that is not kept falls
    to it with its own sign instead of to zero, and what it loses takes the place of `w_j` above.

    Args:
        W: (d_out, d_in), not modified; zero columns stay zero.
        R: (d_in, d_in) upper triangular with `Rᵀ R = G^-1` (`obs_factor`).
        nnz: weights to keep, 0 <= nnz <= numel; not read under a pattern.
        column_block: columns per block, rounded down to whole groups (at least one) under a pattern.
        floor: (d_out, d_in) magnitudes >= 0 that a weight not kept falls to; None is 0.
    Returns:
        (d_out, d_in) with at most `nnz` entries off the floor, or following `pattern`.
    """
    d_out, d_in = W.shape
    if pattern is not None:
        column_block = max(1, column_block // pattern.of) * pattern.of
    # Work on the transpose: a column of W is then contiguous.
    W = W.mT.clone(memory_format=torch.contiguous_format)
    floor = None if floor is None else floor.mT.contiguous()
    S = torch.zeros_like(W)
    pivots = R.diagonal()[:, None]
    # A column that loses `e` moves the later ones by these multiples of it.
    steps = R / pivots
    live = (W != 0).any(1).cumsum(0)
    # Few columns at a time stay in the cache; what they lost reaches the rest of their block in one product.
    inner = INNER if pattern is None else max(1, INNER // pattern.of) * pattern.of
    used = 0
    for begin in range(0, d_in, column_block):
        end = min(begin + column_block, d_in)
        columns = W[begin:end]
        if pattern is not None:
            keep = torch.empty_like(columns)
        elif layer_wide:
            prices = (_lost(W, floor, slice(begin, d_in)) / pivots[begin:]).abs_()
            keep = indicate_top(prices.flatten(), nnz - used).view(-1, d_out)[: end - begin]
            used += int(keep.count_nonzero())
        else:
            quota = min(nnz * int(live[end - 1]) // max(1, int(live[-1])) - used, columns.numel())
            prices = (_lost(W, floor, slice(begin, end)) / pivots[begin:end]).abs_()
            keep = indicate_top(prices.flatten(), quota).view_as(columns)
            used += quota
        drop, lost = 1 - keep, torch.empty_like(columns)
        for first in range(begin, end, inner):
            last = min(first + inner, end)
            for j in range(first, last):
                if pattern is not None and (j - begin) % pattern.of == 0:
                    group = slice(j, j + pattern.of)
                    prices = (_lost(W, floor, group) / pivots[group]).abs_()
                    keep[j - begin : j - begin + pattern.of] = indicate_planes(prices, pattern.keep)
                    torch.sub(1, keep[j - begin : j - begin + pattern.of], out=drop[j - begin : j - begin + pattern.of])
                torch.mul(_lost(W, floor, j), drop[j - begin], out=lost[j - begin])
                W[j + 1 : last].addr_(steps[j, j + 1 : last], lost[j - begin], alpha=-1)
            W[last:end].addmm_(steps[first:last, last:end].mT, lost[first - begin : last - begin], alpha=-1)
        if floor is None:
            torch.mul(columns, keep, out=S[begin:end])
        else:
            S[begin:end] = torch.where(keep.bool(), columns, torch.copysign(floor[begin:end], columns))
        W[end:].addmm_(steps[begin:end, end:].mT, lost, alpha=-1)
    return S.mT.contiguous()


def _lost(W: Tensor, floor: Tensor | None, columns: slice | int) -> Tensor:
    """What the weights of `columns`, the rows of the transposed `W`, lose if they are not kept."""
    return W[columns] if floor is None else W[columns] - torch.copysign(floor[columns], W[columns])
