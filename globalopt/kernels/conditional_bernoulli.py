"""Independent Bernoulli variables on the condition that exactly so many of them are one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def log_partition(log_weights: Tensor, count: int) -> Tensor:
    """`log R(i, j)`, `R(i, j) = sum over z_i..z_n-1 with j ones of prod w^z`, for every suffix and count.

        R(i, j) = R(i + 1, j) + w_i R(i + 1, j - 1),   R(n, 0) = 1

    the elementary symmetric polynomials of the weights, in log space (Chen and Liu 1997, method 2).

    Args:
        log_weights: (n,) float64, finite.
        count: 0 <= count <= n.
    Returns:
        (n + 1, count + 1); `-inf` where fewer than `j` variables are left.
    """
    n = len(log_weights)
    if not 0 <= count <= n:
        raise ValueError(f"{count} of {n} variables cannot be one.")
    table = log_weights.new_full((n + 1, count + 1), -torch.inf)
    table[:, 0] = 0.0
    for i in range(n - 1, -1, -1):
        torch.logaddexp(table[i + 1, 1:], table[i + 1, :-1] + log_weights[i], out=table[i, 1:])
    return table


@dataclass(frozen=True, eq=False)
class ConditionalBernoulli:
    """`pi(z) = prod w_i^z_i 1[sum z = count] / R`, the exponential family with scores `d log pi / d log w = z - mu`.

    Args:
        include: (n, count + 1) the probability of `z_i = 1` when `j` of the variables `i..n-1` must be one:
            `w_i R(i + 1, j - 1) / R(i, j)`, 0 for `j = 0`. Exactly 1 where all that are left must be one, so that every
            sample has the count.
    """

    include: Tensor

    @classmethod
    def of(cls, log_weights: Tensor, count: int) -> ConditionalBernoulli:
        """The distribution of `(n,)` float64 log weights; time and memory O(n count)."""
        table = log_partition(log_weights, count)
        include = torch.zeros_like(table[:-1])
        include[:, 1:] = (table[1:, :-1] + log_weights[:, None] - table[:-1, 1:]).exp()
        # No sum is left where fewer variables remain than must be one: -inf less -inf.
        return cls(include.nan_to_num_(0.0))

    @property
    def count(self) -> int:
        return self.include.shape[1] - 1

    def inclusion(self) -> Tensor:
        """(n,) `mu_i = P(z_i = 1)`, from the distribution of how many ones are left at each variable."""
        left = self.include.new_zeros(self.count + 1)
        left[-1] = 1.0
        mu = torch.empty_like(self.include[:, 0])
        for i, include in enumerate(self.include):
            taken = left * include
            mu[i] = taken.sum()
            left = left - taken
            left[:-1] += taken[1:]
        return mu

    def sample(self, samples: int, generator: torch.Generator) -> Tensor:
        """(samples, n) bool, exact and independent, each row with `count` ones."""
        n = len(self.include)
        uniform = torch.rand(n, samples, dtype=self.include.dtype, generator=generator)
        left = torch.full((samples,), self.count)
        z = torch.empty(n, samples, dtype=torch.bool)
        for i, include in enumerate(self.include):
            z[i] = uniform[i] < include[left]
            left = left - z[i].long()
        return z.T
