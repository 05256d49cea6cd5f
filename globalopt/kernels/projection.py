"""Which weights to keep: masks with an exact count, ties broken by index."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from globalopt.types import NM

SAMPLE_STRIDE = 61  # prime, so that a strided sample meets every column of a matrix


def keep_top(scores: Tensor, count: int) -> Tensor:
    """Mask of the `count` largest scores along the last dimension; equal scores go by index, lowest first.

    Args:
        scores: (..., n), no NaN.
        count: 0 <= count <= n.
    Returns:
        (..., n) bool with exactly `count` true along the last dimension.
    """
    return indicate_top(scores, count).bool()


def indicate_top(scores: Tensor, count: int) -> Tensor:
    """`keep_top` as 0 and 1 in the scores' dtype, float32 or float64.

    A selection of the threshold, not a sort. Comparisons with a float result, and products with them, are vectorised
    on the CPU; those with a bool result, and a `where`, are several times slower.
    """
    size = scores.shape[-1]
    if count == 0:
        return torch.zeros_like(scores)
    if count == size:
        return torch.ones_like(scores)
    threshold = _largest(scores, count)[None] if scores.ndim == 1 else scores.kthvalue(size - count + 1, -1, True)[0]
    kept = torch.ge(scores, threshold, out=torch.empty_like(scores))
    if _count(kept) == count * (scores.numel() // size):
        return kept
    above, tied = scores > threshold, scores == threshold
    first = tied & (tied.cumsum(-1) <= count - above.sum(-1, keepdim=True))
    return (above | first).to(scores.dtype)


def _largest(scores: Tensor, count: int) -> Tensor:
    """The `count`-th largest of `scores` (n,): a sample brackets it, and the selection runs inside the bracket only."""
    size = len(scores)
    if size >= 64 * SAMPLE_STRIDE:
        sample = scores[::SAMPLE_STRIDE].contiguous()
        margin = 2 * math.isqrt(len(sample))
        middle = len(sample) - count // SAMPLE_STRIDE
        low = sample.kthvalue(max(1, middle - margin)).values
        high = sample.kthvalue(max(1, min(len(sample), middle + margin))).values
        within = count - _count(torch.gt(scores, high, out=torch.empty_like(scores)))
        inside = torch.ge(scores, low, out=torch.empty_like(scores))
        bracket = scores[inside.mul_(torch.le(scores, high, out=torch.empty_like(scores))).bool()]
        if 1 <= within <= len(bracket):
            return bracket.kthvalue(len(bracket) - within + 1).values
    # Small, or the sample misled.
    return scores.kthvalue(size - count + 1).values


def _count(indicator: Tensor) -> int:
    """How many are 1; a float32 sum is exact up to 2^24 only."""
    return int(indicator.sum() if indicator.numel() <= 2**24 else indicator.count_nonzero())


def keep_per_row(scores: Tensor, count: int) -> Tensor:
    """Mask of the largest scores of each row, `count` in all.

    Rows get `count // d_out` each; the remainder goes, one each, to the rows whose next score is largest.

    Args:
        scores: (d_out, d_in), no NaN.
        count: 0 <= count <= d_out * d_in.
    """
    each, remainder = divmod(count, scores.shape[0])
    mask = keep_top(scores, each)
    if remainder:
        following = keep_top(scores, each + 1) & ~mask
        winners = keep_top(scores[following], remainder)
        mask |= following & winners[:, None]
    return mask


def keep_nm(scores: Tensor, pattern: NM) -> Tensor:
    """Mask of the `keep` largest scores of every `of` consecutive ones of a row; equal scores go by index.

    Args:
        scores: (d_out, d_in) with `d_in` a multiple of `pattern.of`, no NaN.
    """
    return indicate_nm(scores, pattern).bool()


def indicate_nm(scores: Tensor, pattern: NM) -> Tensor:
    """`keep_nm` as 0 and 1 in the scores' dtype."""
    # Members of a group in separate planes, so that each comparison runs over contiguous memory.
    planes = scores.reshape(scores.shape[0], -1, pattern.of).permute(2, 0, 1).contiguous()
    return indicate_planes(planes, pattern.keep).permute(1, 2, 0).reshape(scores.shape)


def indicate_planes(planes: Tensor, keep: int) -> Tensor:
    """0 and 1 for the `keep` largest along the first dimension, (of, ...), of few entries; equal ones go by index.

    An entry is kept if fewer than `keep` come before it: every pair is compared once, nothing is sorted.
    """
    of = len(planes)
    if of == 1:
        return torch.full_like(planes, float(keep > 0))
    # How many come before a member: the earlier ones not below it, and all later ones but those it is not below.
    ahead = torch.empty_like(planes)
    torch.sum(torch.ge(planes[0], planes[1:], out=ahead[1:]), 0, out=ahead[0]).neg_()
    for member in range(1, of - 1):
        later = planes[member + 1 :]
        first = torch.ge(planes[member], later, out=torch.empty_like(later))
        ahead[member + 1 :].add_(first)
        ahead[member].sub_(first.sum(0))
    room = torch.arange(of, dtype=planes.dtype, device=planes.device) + (keep - of + 1)
    return ahead.lt_(room.view(-1, *[1] * (planes.ndim - 1)))


def keep_weights(scores: Tensor, nnz: int, pattern: NM | None = None, per_row: bool = False) -> Tensor:
    """Mask of the weights a target keeps: by `pattern` if there is one, else `nnz` per layer or shared by the rows.

    Args:
        scores: (d_out, d_in), no NaN.
        nnz: 0 <= nnz <= d_out * d_in; a pattern's count follows from its shape, and `nnz` is not read.
    """
    if pattern is not None:
        return keep_nm(scores, pattern)
    if per_row:
        return keep_per_row(scores, nnz)
    return keep_top(scores.flatten(), nnz).view_as(scores)
