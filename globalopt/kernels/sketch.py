"""Inner products of gradients with everything a layer would lose, for many options at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PrefixSketch:
    """`q(n, j) = <G_n, D_j>` for nested dropped parts: option j drops all but the first `counts[j]` entries.

    The entries of one matrix are put in a fixed order (most important first) and dropped from the end, so that all
    options share one pass over the gradient: bucket sums, then suffix sums.

    Args:
        order: (numel,) int64, positions in the flattened matrix, most important first.
        values: (numel,) the dropped values in that order.
        bucket: entries per bucket; every count is a multiple of it, or numel.
        counts: ascending.
    """

    order: Tensor
    values: Tensor
    bucket: int
    counts: tuple[int, ...]

    @classmethod
    def make(cls, importance: Tensor, dropped: Tensor, bucket: int, counts: Sequence[int]) -> PrefixSketch:
        """Order the entries of `dropped` (d_out, d_in) by `importance` (same shape), ties by index."""
        numel = dropped.numel()
        if any(count % bucket and count != numel for count in counts):
            raise ValueError(f"Counts must be multiples of the bucket of {bucket} entries.")
        order = importance.flatten().argsort(descending=True, stable=True)
        return cls(order, dropped.flatten()[order], bucket, tuple(counts))

    def project(self, gradients: Tensor) -> Tensor:
        """(b, d_out, d_in) gradients -> (b, options) inner products with the dropped parts, float64."""
        ordered = gradients.flatten(1).index_select(1, self.order)
        short = -ordered.shape[1] % self.bucket
        # (buckets, b, bucket) x (buckets, bucket, 1): multiplies and sums in one pass.
        parts = torch.nn.functional.pad(ordered, (0, short)).unflatten(1, (-1, self.bucket)).transpose(0, 1)
        weights = torch.nn.functional.pad(self.values, (0, short)).view(-1, self.bucket, 1)
        buckets = torch.bmm(parts, weights).squeeze(2).mT.double()
        suffix = buckets.flip(1).cumsum(1).flip(1)
        suffix = torch.nn.functional.pad(suffix, (0, 1))
        at = torch.tensor([-(-count // self.bucket) for count in self.counts], device=suffix.device)
        return suffix[:, at]


@dataclass(frozen=True, eq=False)
class DenseSketch:
    """`q(n, j) = <G_n, D_j>` for unrelated dropped parts `D` (options, d_out, d_in)."""

    dropped: Tensor

    def project(self, gradients: Tensor) -> Tensor:
        """(b, d_out, d_in) gradients -> (b, options) inner products, float64."""
        return (gradients.flatten(1) @ self.dropped.flatten(1).mT).double()
