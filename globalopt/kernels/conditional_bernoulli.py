"""Sample independent Bernoulli variables conditioned on their sum, and compute their marginals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def log_partition(log_weights: Tensor, count: int) -> Tensor:
    """Compute the log partition function of every suffix of the variables and every number of ones.

        R(i, j) = sum over z_i..z_n-1 with j ones of prod w^z
        R(i, j) = R(i + 1, j) + w_i R(i + 1, j - 1),   R(n, 0) = 1

    These are the elementary symmetric polynomials of the weights; the recursion runs in log space (Chen and Liu 1997,
    method 2).

    Args:
        log_weights: (n,) float64, finite.
        count: 0 <= count <= n.
    Returns:
        (n + 1, count + 1) `log R`; `-inf` where fewer than `j` variables remain.
    Raises:
        ValueError: `count` is out of its range.

    >>> weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    >>> round(log_partition(weights.log(), count=2)[0, 2].exp().item(), 6)  # 1 x 2 + 1 x 3 + 2 x 3
    11.0
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
    """Represent the conditional Bernoulli distribution `pi(z) = prod w_i^z_i 1[sum z = count] / R`.

    It is an exponential family, with scores `d log pi / d log w = z - mu`.

    Args:
        include: (n, count + 1) the probability of `z_i = 1` given that `j` of the variables `i..n-1` must be one:
            `w_i R(i + 1, j - 1) / R(i, j)`, and 0 for `j = 0`. It is exactly 1 where all remaining variables must be
            one, so that every sample has the right sum.

    >>> weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    >>> law = ConditionalBernoulli.of(weights.log(), count=2)
    >>> [round(11 * p, 6) for p in law.inclusion().tolist()]  # the pairs have probabilities 2, 3 and 6 of 11
    [5.0, 8.0, 9.0]
    >>> law.sample(4, torch.Generator().manual_seed(0)).sum(1).tolist()
    [2, 2, 2, 2]
    """

    include: Tensor

    @classmethod
    def of(cls, log_weights: Tensor, count: int) -> ConditionalBernoulli:
        """Make the distribution of log weights (n,) float64, in O(n count) time and memory."""
        table = log_partition(log_weights, count)
        include = torch.zeros_like(table[:-1])
        include[:, 1:] = (table[1:, :-1] + log_weights[:, None] - table[:-1, 1:]).exp()
        # Where fewer variables remain than must be one, both partition functions are 0: -inf less -inf is NaN.
        return cls(include.nan_to_num_(0.0))

    @property
    def count(self) -> int:
        """Return the sum that the distribution is conditioned on."""
        return self.include.shape[1] - 1

    def inclusion(self) -> Tensor:
        """Compute the marginals `mu_i = P(z_i = 1)`, (n,).

        The distribution of the number of ones still to come is passed from each variable to the next.
        """
        # remaining[j] is the probability that j of the variables from here on must be one.
        remaining = self.include.new_zeros(self.count + 1)
        remaining[-1] = 1.0
        mu = torch.empty_like(self.include[:, 0])
        for i, include in enumerate(self.include):
            chosen = remaining * include
            mu[i] = chosen.sum()
            remaining = remaining - chosen
            remaining[:-1] += chosen[1:]
        return mu

    def sample(self, samples: int, generator: torch.Generator) -> Tensor:
        """Draw exact, independent samples (samples, n) bool, each row with `count` ones."""
        n = len(self.include)
        uniform = torch.rand(n, samples, dtype=self.include.dtype, generator=generator)
        remaining = torch.full((samples,), self.count)
        z = torch.empty(n, samples, dtype=torch.bool)
        for i, include in enumerate(self.include):
            z[i] = uniform[i] < include[remaining]
            remaining = remaining - z[i].long()
        return z.T
