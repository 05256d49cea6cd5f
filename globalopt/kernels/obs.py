"""Optimal-brain-surgeon pruning, column by column (SparseGPT, arXiv:2301.00774, algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from globalopt.kernels.projection import keep_nm, keep_top
from globalopt.types import NM


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
    live = (W != 0).any(1).cumsum(0)
    used = 0
    for begin in range(0, d_in, column_block):
        end = min(begin + column_block, d_in)
        columns, local = W[begin:end], R[begin:end, begin:end]
        if pattern is not None:
            keep = torch.empty_like(columns, dtype=torch.bool)
        elif layer_wide:
            prices = (_lost(W, floor, slice(begin, d_in)) / pivots[begin:]).abs()
            keep = keep_top(prices.flatten(), nnz - used).view(-1, d_out)[: end - begin]
            used += int(keep.sum())
        else:
            quota = min(nnz * int(live[end - 1]) // max(1, int(live[-1])) - used, columns.numel())
            prices = (_lost(W, floor, slice(begin, end)) / pivots[begin:end]).abs()
            keep = keep_top(prices.flatten(), quota).view_as(columns)
            used += quota
        errors = torch.empty_like(columns)
        for j in range(end - begin):
            if pattern is not None and j % pattern.of == 0:
                group = slice(begin + j, begin + j + pattern.of)
                prices = (_lost(W, floor, group) / pivots[group]).abs()
                keep[j : j + pattern.of] = keep_nm(prices.mT, pattern).mT
            errors[j] = _lost(W, floor, begin + j).masked_fill(keep[j], 0.0) / local[j, j]
            columns[j + 1 :].addr_(local[j, j + 1 :], errors[j], alpha=-1)
        rest = torch.zeros_like(columns) if floor is None else torch.copysign(floor[begin:end], columns)
        S[begin:end] = torch.where(keep, columns, rest)
        W[end:].addmm_(R[begin:end, end:].mT, errors, alpha=-1)
    return S.mT.contiguous()


def _lost(W: Tensor, floor: Tensor | None, columns: slice | int) -> Tensor:
    """What the weights of `columns`, the rows of the transposed `W`, lose if they are not kept."""
    return W[columns] if floor is None else W[columns] - torch.copysign(floor[columns], W[columns])
