"""Compute inner products of gradients with the parts of a weight that options drop, for many options at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PrefixSketch:
    """Compute `q(n, j) = <G_n, D_j>` for gradients `G_n` and nested dropped parts `D_j`.

    Option j drops all but its first `counts[j]` entries. The entries of one matrix are put in a fixed order (most
    important first) and dropped from the end, so that all options share one pass over the gradient: sums of buckets,
    then sums of suffixes.

    Args:
        order: (numel,) int64, positions in the flattened matrix, most important first.
        values: (numel,) the entries in that order.
        bucket: entries per bucket; every count is a multiple of it, or numel.
        counts: ascending numbers of kept entries, one per option.

    >>> W = torch.tensor([[4.0, 1.0], [3.0, 2.0]])
    >>> sketch = PrefixSketch.make(importance=W.abs(), dropped=W, bucket=1, counts=(0, 2, 4))
    >>> sketch.project(torch.ones(1, 2, 2)).tolist()  # drop all, the smaller two, none
    [[10.0, 3.0, 0.0]]
    """

    order: Tensor
    values: Tensor
    bucket: int
    counts: tuple[int, ...]

    @classmethod
    def make(cls, importance: Tensor, dropped: Tensor, bucket: int, counts: Sequence[int]) -> PrefixSketch:
        """Sort the entries of `dropped` (d_out, d_in) by descending `importance` (same shape), ties by index.

        Raises:
            ValueError: a count is neither a multiple of `bucket` nor the number of entries.
        """
        numel = dropped.numel()
        if any(count % bucket and count != numel for count in counts):
            raise ValueError(f"Counts must be multiples of the bucket of {bucket} entries.")
        order = importance.flatten().argsort(descending=True, stable=True)
        return cls(order, dropped.flatten()[order], bucket, tuple(counts))

    def project(self, gradients: Tensor) -> Tensor:
        """Compute the inner products (b, options) float64 of gradients (b, d_out, d_in) with the dropped parts."""
        ordered = gradients.flatten(1).index_select(1, self.order)
        short = -ordered.shape[1] % self.bucket
        # (buckets, b, bucket) x (buckets, bucket, 1): one pass multiplies and sums.
        parts = torch.nn.functional.pad(ordered, (0, short)).unflatten(1, (-1, self.bucket)).transpose(0, 1)
        weights = torch.nn.functional.pad(self.values, (0, short)).view(-1, self.bucket, 1)
        buckets = torch.bmm(parts, weights).squeeze(2).mT.double()
        suffix = buckets.flip(1).cumsum(1).flip(1)
        suffix = torch.nn.functional.pad(suffix, (0, 1))
        at = torch.tensor([-(-count // self.bucket) for count in self.counts], device=suffix.device)
        return suffix[:, at]


@dataclass(frozen=True, eq=False)
class DenseSketch:
    """Compute `q(n, j) = <G_n, D_j>` for gradients `G_n` and arbitrary dropped parts `D` (options, d_out, d_in).

    >>> dropped = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[0.0, 3.0], [0.0, 0.0]]])
    >>> DenseSketch(dropped).project(torch.ones(1, 2, 2)).tolist()
    [[3.0, 3.0]]
    """

    dropped: Tensor

    def project(self, gradients: Tensor) -> Tensor:
        """Compute the inner products (b, options) float64 of gradients (b, d_out, d_in) with the dropped parts."""
        return (gradients.flatten(1) @ self.dropped.flatten(1).mT).double()
