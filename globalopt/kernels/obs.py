"""Prune weights by the optimal brain surgeon, column by column (SparseGPT, arXiv:2301.00774, algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from globalopt.kernels.projection import indicate_planes, indicate_top
from globalopt.values.layer import NM

INNER = 32  # columns that are pruned before the rest of their block is updated


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
    """Prune a weight column by column by the optimal brain surgeon: minimise `tr((W - S) G (W - S)ᵀ)` over sparse `S`.

    Columns are pruned from left to right. Pruning `w_j` moves the weights to its right by `-(w_j / R_jj) R_j`, the
    optimal correction when everything to its left is fixed, and raises the error by its saliency `(w_j / R_jj)²`. The
    weights with the largest saliencies are kept. Saliencies are those of the corrected weights, at the beginning of
    each `column_block`, or under a pattern of each group.

    Departures from the published code: the counts of the blocks add up to `nnz` exactly, in proportion to their columns
    that are not zero, so that no count is spent on dead inputs. With `layer_wide`, blocks compete: each keeps those of
    its weights that are among the best of all columns still to come. With a `floor`, a weight that is not kept becomes
    the floor with the weight's own sign instead of zero, and the difference takes the place of `w_j` above.

    Args:
        W: (d_out, d_in), not modified; zero columns stay zero.
        R: (d_in, d_in) upper triangular with `Rᵀ R = G^-1` (`obs_factor`).
        nnz: weights to keep, 0 <= nnz <= numel; ignored under a pattern.
        pattern: N:M pattern of `S`; None is unstructured.
        column_block: columns per block, rounded down to whole groups (at least one) under a pattern.
        layer_wide: whether the counts of the blocks follow the saliencies of the whole layer.
        floor: (d_out, d_in) magnitudes >= 0 of the weights that are not kept; None is 0.
    Returns:
        (d_out, d_in) with at most `nnz` entries that differ from the floor, or following `pattern`.

    >>> from globalopt.kernels.cholesky import damped_cholesky, obs_factor
    >>> G = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)  # two correlated inputs
    >>> R = obs_factor(damped_cholesky(G.flip(0, 1), 0.0).factor)
    >>> W = torch.ones(1, 2, dtype=torch.float64)
    >>> obs_prune(W, R, nnz=1).round(decimals=4).tolist()  # the weight that is kept makes up for the other
    [[0.0, 1.9]]
    """
    d_out, d_in = W.shape
    if pattern is not None:
        column_block = max(1, column_block // pattern.of) * pattern.of
    # Work on the transpose: a column of W is then contiguous.
    W = W.mT.clone(memory_format=torch.contiguous_format)
    floor = None if floor is None else floor.mT.contiguous()
    S = torch.zeros_like(W)
    pivots = R.diagonal()[:, None]
    # Changing column j by -e moves the later columns by -e times row j of these.
    steps = R / pivots
    nonzero_columns = (W != 0).any(1).cumsum(0)
    # A few columns at a time stay in the cache; the rest of their block is corrected in one product.
    inner = INNER if pattern is None else max(1, INNER // pattern.of) * pattern.of
    used = 0
    for begin in range(0, d_in, column_block):
        end = min(begin + column_block, d_in)
        columns = W[begin:end]
        if pattern is not None:
            keep = torch.empty_like(columns)
        elif layer_wide:
            saliencies = (_error(W, floor, slice(begin, d_in)) / pivots[begin:]).abs_()
            keep = indicate_top(saliencies.flatten(), nnz - used).view(-1, d_out)[: end - begin]
            used += int(keep.count_nonzero())
        else:
            share = nnz * int(nonzero_columns[end - 1]) // max(1, int(nonzero_columns[-1]))
            quota = min(share - used, columns.numel())
            saliencies = (_error(W, floor, slice(begin, end)) / pivots[begin:end]).abs_()
            keep = indicate_top(saliencies.flatten(), quota).view_as(columns)
            used += quota
        drop, errors = 1 - keep, torch.empty_like(columns)
        for first in range(begin, end, inner):
            last = min(first + inner, end)
            for j in range(first, last):
                if pattern is not None and (j - begin) % pattern.of == 0:
                    group = slice(j, j + pattern.of)
                    saliencies = (_error(W, floor, group) / pivots[group]).abs_()
                    keep[j - begin : j - begin + pattern.of] = indicate_planes(saliencies, pattern.keep)
                    torch.sub(1, keep[j - begin : j - begin + pattern.of], out=drop[j - begin : j - begin + pattern.of])
                torch.mul(_error(W, floor, j), drop[j - begin], out=errors[j - begin])
                W[j + 1 : last].addr_(steps[j, j + 1 : last], errors[j - begin], alpha=-1)
            W[last:end].addmm_(steps[first:last, last:end].mT, errors[first - begin : last - begin], alpha=-1)
        if floor is None:
            torch.mul(columns, keep, out=S[begin:end])
        else:
            S[begin:end] = torch.where(keep.bool(), columns, torch.copysign(floor[begin:end], columns))
        W[end:].addmm_(steps[begin:end, end:].mT, errors, alpha=-1)
    return S.mT.contiguous()


def _error(W: Tensor, floor: Tensor | None, columns: slice | int) -> Tensor:
    """Compute how much the weights of `columns`, rows of the transposed `W`, change if they are not kept."""
    return W[columns] if floor is None else W[columns] - torch.copysign(floor[columns], W[columns])
