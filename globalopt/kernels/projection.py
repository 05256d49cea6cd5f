"""Which weights to keep: masks with an exact count, ties broken by index."""

from __future__ import annotations

import math
from itertools import combinations

import torch
from torch import Tensor

from globalopt.values.layer import NM

SAMPLE_STRIDE = 61  # prime, so that a strided sample meets every column of a matrix
ROUGH_FROM = 256 * SAMPLE_STRIDE  # a smaller sample would be off by more than a tenth of a count

SELECTED_AT_ONCE = 2**20  # entries


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
    threshold = _largest(scores, count)[None] if scores.ndim == 1 else _largest_of_rows(scores, count)
    kept = torch.ge(scores, threshold, out=torch.empty_like(scores))
    if _count(kept) == count * (scores.numel() // size):
        return kept
    above, tied = scores > threshold, scores == threshold
    first = tied & (tied.cumsum(-1) <= count - above.sum(-1, keepdim=True))
    return (above | first).to(scores.dtype)


def indicate_roughly(scores: Tensor, count: int) -> Tensor:
    """`indicate_top` of about `count` of many scores (n,): the threshold is that of a sample, at a tenth of the cost.

    Off by some `sqrt(SAMPLE_STRIDE count)` entries, and by more where scores are equal; of few scores exact.
    """
    if count == len(scores) or len(scores) < ROUGH_FROM:
        return indicate_top(scores, count)
    sample = scores[::SAMPLE_STRIDE]
    below = len(sample) - round(count / len(scores) * len(sample))
    threshold = sample.kthvalue(min(len(sample), below + 1)).values
    return torch.ge(scores, threshold, out=torch.empty_like(scores))


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


def _largest_of_rows(scores: Tensor, count: int) -> Tensor:
    """(..., 1) the `count`-th largest of each row of `scores` (..., n), a few rows at a time.

    A selection copies what it is asked about, and makes indices of twice its size.
    """
    size = scores.shape[-1]
    rows = scores.reshape(-1, size).split(max(1, SELECTED_AT_ONCE // size))
    return torch.cat([some.kthvalue(size - count + 1).values for some in rows]).view(*scores.shape[:-1], 1)


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
    rows, columns = scores.shape
    # Members of a group in separate planes, so that each comparison runs over contiguous memory.
    planes = scores.reshape(rows, -1, pattern.of).mT.contiguous()
    return indicate_planes(planes, pattern.keep).mT.reshape(rows, columns)


def plane_order(columns: int, pattern: NM, device: torch.device) -> Tensor:
    """(columns,) the columns in planes: the first of every group, then the second of every group, and so on.

    In that order the scores of a matrix are its planes as they lie, and comparing them copies nothing: the copies of
    `indicate_nm` cost several times what its comparisons do.
    """
    return torch.arange(columns, device=device).view(-1, pattern.of).mT.reshape(-1)


def indicate_planes(planes: Tensor, keep: int) -> Tensor:
    """0 and 1 for the `keep` largest along the second to last dimension, (..., of, n); equal ones go by index.

    An entry is kept if fewer than `keep` come before it, where an earlier one of the same size does. Every pair is
    compared once, nothing is sorted.
    """
    of = planes.shape[-2]
    members = planes.unbind(-2)
    kept = torch.empty_like(planes)
    if (keep, of) == (2, 4):
        # A member is kept if it loses to at most one of three: sums of comparisons, half the passes of counting.
        a, b, c, d = kept.unbind(-2)
        ab, ac, ad, bc, bd, cd = (_first(x, y) for x, y in combinations(members, 2))
        torch.gt(torch.add(bc, bd), ab, out=b)
        torch.le(torch.add(ac, bc), cd, out=c)
        torch.lt(cd.add_(ad).add_(bd), 2, out=d)
        torch.ge(ab.add_(ac).add_(ad), 2, out=a)
        return kept
    kept.zero_()
    for i, j in combinations(range(of), 2):
        first = _first(members[i], members[j])
        kept[..., j, :] += first
        kept[..., i, :] -= first
    # So far how many come before a member, less the number of those behind it that might.
    room = torch.arange(of, dtype=planes.dtype, device=planes.device) + (keep - of + 1)
    return kept.lt_(room[:, None])


def _first(earlier: Tensor, later: Tensor) -> Tensor:
    return torch.ge(earlier, later, out=torch.empty_like(later))


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
