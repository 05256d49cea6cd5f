"""Select the weights to keep: masks with an exact count, in which equal scores are ordered by index."""

from __future__ import annotations

import math
from itertools import combinations

import torch
from torch import Tensor

from globalopt.values.layer import NM

SAMPLE_STRIDE = 61  # prime, so that a strided sample has entries of every column of a matrix
ROUGH_FROM = 256 * SAMPLE_STRIDE  # with fewer scores, counts would be off by more than a tenth

SELECTED_AT_ONCE = 2**20  # entries of the rows whose thresholds are found together


def keep_top(scores: Tensor, count: int) -> Tensor:
    """Select the `count` largest scores along the last dimension; equal scores are ordered by index, lowest first.

    Args:
        scores: (..., n), no NaN.
        count: 0 <= count <= n.
    Returns:
        (..., n) bool with exactly `count` true along the last dimension.

    >>> keep_top(torch.tensor([2.0, 5.0, 2.0, 1.0]), 2).tolist()
    [True, True, False, False]
    """
    return indicate_top(scores, count).bool()


def indicate_top(scores: Tensor, count: int) -> Tensor:
    """Select as `keep_top` does, and return 0 and 1 in the dtype of the scores, float32 or float64.

    The threshold is found by a selection, not by a sort. Comparisons with a float result, and products with them, are
    vectorised on the CPU; those with a bool result, and a `where`, are several times slower.

    >>> indicate_top(torch.tensor([2.0, 5.0, 2.0, 1.0]), 2).tolist()
    [1.0, 1.0, 0.0, 0.0]
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
    """Select approximately the `count` largest of many scores (n,), by the threshold of a sample.

    This costs a tenth of `indicate_top`. The count is off by about `sqrt(SAMPLE_STRIDE count)` entries, and by more
    where scores are equal. Few scores are selected exactly.

    >>> scores = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    >>> abs(int(indicate_roughly(scores, 30_000).sum()) - 30_000) < 3000
    True
    """
    if count == len(scores) or len(scores) < ROUGH_FROM:
        return indicate_top(scores, count)
    sample = scores[::SAMPLE_STRIDE]
    below = len(sample) - round(count / len(scores) * len(sample))
    threshold = sample.kthvalue(min(len(sample), below + 1)).values
    return torch.ge(scores, threshold, out=torch.empty_like(scores))


def _largest(scores: Tensor, count: int) -> Tensor:
    """Find the `count`-th largest of `scores` (n,).

    A sample brackets the threshold, and the selection runs inside of the bracket only.
    """
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
    # There are few scores, or the threshold lies outside the bracket.
    return scores.kthvalue(size - count + 1).values


def _largest_of_rows(scores: Tensor, count: int) -> Tensor:
    """Find the `count`-th largest of each row of `scores` (..., n), as (..., 1), a few rows at a time.

    `kthvalue` copies its input and makes indices of twice its size, so that all rows at once would need much memory.
    """
    size = scores.shape[-1]
    rows = scores.reshape(-1, size).split(max(1, SELECTED_AT_ONCE // size))
    return torch.cat([some.kthvalue(size - count + 1).values for some in rows]).view(*scores.shape[:-1], 1)


def _count(indicator: Tensor) -> int:
    """Count the ones of an indicator; a float32 sum is exact only up to 2^24."""
    return int(indicator.sum() if indicator.numel() <= 2**24 else indicator.count_nonzero())


def keep_per_row(scores: Tensor, count: int) -> Tensor:
    """Select the largest scores of each row, `count` in all.

    Every row gets `count // d_out`; the remainder goes, one each, to the rows whose next score is largest.

    Args:
        scores: (d_out, d_in), no NaN.
        count: 0 <= count <= d_out * d_in.

    >>> keep_per_row(torch.tensor([[9.0, 8.0, 1.0], [3.0, 2.0, 1.0]]), 3).int().tolist()
    [[1, 1, 0], [1, 0, 0]]
    """
    each, remainder = divmod(count, scores.shape[0])
    mask = keep_top(scores, each)
    if remainder:
        following = keep_top(scores, each + 1) & ~mask
        winners = keep_top(scores[following], remainder)
        mask |= following & winners[:, None]
    return mask


def keep_nm(scores: Tensor, pattern: NM) -> Tensor:
    """Select the `keep` largest of every `of` consecutive scores of a row; equal scores are ordered by index.

    Args:
        scores: (d_out, d_in) with `d_in` a multiple of `pattern.of`, no NaN.
        pattern: the N:M pattern.

    >>> keep_nm(torch.tensor([[4.0, 1.0, 3.0, 2.0, 0.1, 0.2, 0.3, 0.4]]), NM(2, 4)).int().tolist()
    [[1, 0, 1, 0, 0, 0, 1, 1]]
    """
    return indicate_nm(scores, pattern).bool()


def indicate_nm(scores: Tensor, pattern: NM) -> Tensor:
    """Select as `keep_nm` does, and return 0 and 1 in the dtype of the scores.

    >>> indicate_nm(torch.tensor([[4.0, 1.0, 3.0, 2.0]]), NM(2, 4)).tolist()
    [[1.0, 0.0, 1.0, 0.0]]
    """
    rows, columns = scores.shape
    # The members of a group lie in separate planes, so that each comparison runs over contiguous memory.
    planes = scores.reshape(rows, -1, pattern.of).mT.contiguous()
    return indicate_planes(planes, pattern.keep).mT.reshape(rows, columns)


def plane_order(columns: int, pattern: NM, device: torch.device) -> Tensor:
    """List the columns (columns,) by planes: the first of every group, then the second of every group, and so on.

    With columns in this order, the planes of a matrix are contiguous, and comparing them copies nothing: the copies of
    `indicate_nm` cost several times as much as its comparisons.

    >>> plane_order(8, NM(2, 4), torch.device("cpu")).tolist()
    [0, 4, 1, 5, 2, 6, 3, 7]
    """
    return torch.arange(columns, device=device).view(-1, pattern.of).mT.reshape(-1)


def indicate_planes(planes: Tensor, keep: int) -> Tensor:
    """Select the `keep` largest along the second to last dimension of `planes` (..., of, n), as 0 and 1 in their dtype.

    An entry is kept if fewer than `keep` others precede it; of two equal entries the earlier precedes. Every pair is
    compared once, and nothing is sorted.

    >>> indicate_planes(torch.tensor([[4.0], [1.0], [3.0], [2.0]]), keep=2).flatten().tolist()
    [1.0, 0.0, 1.0, 0.0]
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
    # An entry of `kept` is now the number of members that precede this one, less the number of members behind it.
    room = torch.arange(of, dtype=planes.dtype, device=planes.device) + (keep - of + 1)
    return kept.lt_(room[:, None])


def _first(earlier: Tensor, later: Tensor) -> Tensor:
    """Indicate by 0 and 1 where the earlier of two members precedes the later one."""
    return torch.ge(earlier, later, out=torch.empty_like(later))


def keep_weights(scores: Tensor, nnz: int, pattern: NM | None = None, per_row: bool = False) -> Tensor:
    """Select the weights that a target keeps: by its `pattern`, or `nnz` of the layer, or as many of every row.

    Args:
        scores: (d_out, d_in), no NaN.
        nnz: 0 <= nnz <= d_out * d_in; ignored under a pattern, which fixes the count.
        pattern: N:M pattern, or None.
        per_row: whether every row keeps the same number (`keep_per_row`).

    >>> scores = torch.tensor([[9.0, 8.0], [3.0, 2.0]])
    >>> keep_weights(scores, 2).int().tolist(), keep_weights(scores, 2, per_row=True).int().tolist()
    ([[1, 1], [0, 0]], [[1, 0], [1, 0]])
    """
    if pattern is not None:
        return keep_nm(scores, pattern)
    if per_row:
        return keep_per_row(scores, nnz)
    return keep_top(scores.flatten(), nnz).view_as(scores)
