"""Which weights to keep: masks with an exact count, ties broken by index."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from globalopt.types import NM

SAMPLE_STRIDE = 61  # prime, so that a strided sample meets every column of a matrix


def keep_top(scores: Tensor, count: int) -> Tensor:
    """Mask of the `count` largest scores along the last dimension; equal scores go by index, lowest first.

    A selection of the threshold, not a sort.

    Args:
        scores: (..., n), no NaN.
        count: 0 <= count <= n.
    Returns:
        (..., n) bool with exactly `count` true along the last dimension.
    """
    size = scores.shape[-1]
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if count == size:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = _largest(scores, count)[None] if scores.ndim == 1 else scores.kthvalue(size - count + 1, -1, True)[0]
    mask = scores >= threshold
    if int(mask.sum()) == count * (scores.numel() // size):
        return mask
    above = scores > threshold
    tied = mask & ~above
    return above | (tied & (tied.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


def _largest(scores: Tensor, count: int) -> Tensor:
    """The `count`-th largest of `scores` (n,): a sample brackets it, and the selection runs inside the bracket only."""
    size = len(scores)
    if size >= 64 * SAMPLE_STRIDE:
        sample = scores[::SAMPLE_STRIDE].sort(descending=True).values
        margin = 2 * math.isqrt(len(sample))
        middle = count // SAMPLE_STRIDE
        high, low = sample[max(0, middle - margin)], sample[min(len(sample) - 1, middle + margin)]
        within = count - int((scores > high).sum())
        bracket = scores[(scores >= low) & (scores <= high)]
        if 1 <= within <= len(bracket):
            return bracket.kthvalue(len(bracket) - within + 1).values
    # Small, or the sample misled.
    return scores.kthvalue(size - count + 1).values


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
    """Mask of the `keep` largest scores of every `of` consecutive ones of a row.

    An entry is kept if fewer than `keep` of its group come before it: every pair is compared once, nothing is sorted.

    Args:
        scores: (d_out, d_in) with `d_in` a multiple of `pattern.of`, no NaN.
    """
    # Members of a group in separate planes, so that each comparison runs over contiguous memory.
    planes = scores.reshape(scores.shape[0], -1, pattern.of).permute(2, 0, 1).contiguous()
    # How many come before a member: all later ones, less those it is not below, plus the earlier ones not below it.
    before = torch.empty_like(planes, dtype=torch.uint8)
    for member in range(pattern.of):
        before[member] = pattern.of - 1 - member
    for left in range(pattern.of):
        for right in range(left + 1, pattern.of):
            left_first = (planes[left] >= planes[right]).view(torch.uint8)
            before[right] += left_first
            before[left] -= left_first
    return (before < pattern.keep).permute(1, 2, 0).reshape(scores.shape)


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
