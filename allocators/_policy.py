"""A policy over allocations of one exact cost, and estimators of its gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from allocators._groups import Groups
from globalopt.kernels.conditional_bernoulli import ConditionalBernoulli

BISECTIONS = 60
STEEPEST = 9.0
"""Largest fall of the logit from a group to the next; 2 % of the draws then have one group more or less of a stack.

All parts of all layers vary at once: if each varied by a group, the loss of all samples would be far above the start's.
"""


class Draws(NamedTuple):
    """Samples of a policy and its moments.

    Args:
        counts: (samples, stacks) groups kept.
        scores: (samples, stacks) float64, `d log pi / d offsets = counts - E[counts]`.
        variance: (stacks,) `sum of mu (1 - mu)`, the diagonal of the Fisher information.
    """

    counts: Tensor
    scores: Tensor
    variance: Tensor


@dataclass(frozen=True, eq=False)
class Policy:
    """`pi(z) ∝ prod w_i^z_i 1[sum z = count]` over all groups, `log w_i = offset of its stack - slope x place in it`.

    Only the number of groups kept of a stack matters, so one offset per stack is learned: the gradient by it is the sum
    of the gradients by the logits of its groups, which differ by noise alone.

    Args:
        offsets: (stacks,) float64.
        ramp: (groups,) float64, the falling part of the logits.
        stack: (groups,) int64, the stack of each.
        count: groups kept of all.
    """

    offsets: Tensor
    ramp: Tensor
    stack: Tensor
    count: int

    @classmethod
    def around(cls, groups: Groups, spread: float) -> Policy:
        """Make the policy whose stacks keep the start's counts on average, and whose most probable counts they are.

        With the slope `(group / (spread x dense price))²` per group the number kept has a standard deviation of about
        `spread` of the layer: `sum p (1 - p) ~ 1 / slope`. On average every stack keeps and drops at least half of that
        and half a group, so that it can grow from nothing.
        """
        sizes = torch.tensor([stack.size for stack in groups.stacks])
        wide = torch.tensor([spread * stack.dense for stack in groups.stacks], dtype=torch.float64)
        slope = ((groups.price / wide) ** 2).clamp_max(STEEPEST)
        stack = torch.repeat_interleave(sizes)
        place = torch.cat([torch.arange(size, dtype=torch.float64) + 0.5 for size in sizes.tolist()])
        ramp = -slope[stack] * place
        least = (wide / (2 * groups.price)).clamp_min(0.5).minimum(sizes / 2)
        wanted = groups.start.double().maximum(least).minimum(sizes - least)
        low, high = torch.full_like(slope, -50.0), slope * sizes + 50.0
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            few = _per_stack((middle[stack] + ramp).sigmoid(), stack, len(sizes)) < wanted
            low, high = torch.where(few, middle, low), torch.where(few, high, middle)
        return cls(low, ramp, stack, int(groups.start.sum()))

    @property
    def free(self) -> bool:
        """Whether there is more than one allocation to choose from."""
        return 0 < self.count < len(self.ramp)

    def draw(self, samples: int, generator: torch.Generator) -> Draws:
        """Draw `samples` independent allocations."""
        law = ConditionalBernoulli.of(self._logits, self.count)
        mu = law.inclusion()
        z = law.sample(samples, generator).double()
        size = len(self.offsets)
        counts = _per_stack(z, self.stack, size)
        scores = counts - _per_stack(mu, self.stack, size)
        return Draws(counts.long(), scores, _per_stack(mu * (1 - mu), self.stack, size))

    def most_probable(self) -> Tensor:
        """Return the counts (stacks,) of the `count` largest logits, of equal ones the first."""
        z = torch.zeros_like(self.ramp)
        z[self._logits.argsort(descending=True, stable=True)[: self.count]] = 1.0
        return _per_stack(z, self.stack, len(self.offsets)).long()

    def moved(self, step: Tensor) -> Policy:
        """Return the policy with `step` (stacks,) added to the offsets."""
        return replace(self, offsets=self.offsets + step)

    @property
    def _logits(self) -> Tensor:
        return self.offsets[self.stack] + self.ramp


def _per_stack(values: Tensor, stack: Tensor, size: int) -> Tensor:
    """Compute (..., groups) -> (..., stacks) sums."""
    return values.new_zeros(*values.shape[:-1], size).index_add_(-1, stack, values)


class Control(NamedTuple):
    """Describe the surrogate J as control variate: `E[f] = E[f - alpha J] + alpha E[J]`.

    Args:
        alpha: fitted on other samples than it is used on, so that no estimate is biased.
        predicted: (samples,) J of the samples.
        gradient: (stacks,) an estimate of the gradient of `E[J]`, from samples of which only J is computed.
    """

    alpha: float
    predicted: Tensor
    gradient: Tensor


def gradient_samples(
    scores: Tensor, losses: Tensor, baseline: float | None = None, control: Control | None = None
) -> Tensor:
    """Estimate the gradient of `E[f]` by the offsets without bias: (samples, stacks), one estimate per sample.

        (f_k - alpha J_k - b_k) score_k + alpha (gradient of E[J])

    with `b_k` the mean of `f - alpha J` over the other samples (leave one out; Kool et al. 2019), or `baseline`.

    Args:
        scores: (samples, stacks) of a policy's draws; at least two samples without `baseline`.
        losses: (samples,) `f`, all on the same text.
        baseline: the mean of `f - alpha J` before these samples.
        control: the control variate; None for none.
    """
    rest = losses if control is None else losses - control.alpha * control.predicted
    level = (rest.sum() - rest) / (len(rest) - 1) if baseline is None else baseline
    estimates = (rest - level)[:, None] * scores
    return estimates if control is None else estimates + control.alpha * control.gradient


def step_within(gradient: Tensor, variance: Tensor, natural: bool, divergence: float) -> Tensor:
    """Compute the step (stacks,) down the gradient at which `KL(new || old) ~ 1/2 sum variance step²` is `divergence`.

    Args:
        gradient: (stacks,) of the expected loss.
        variance: (stacks,) the diagonal of the Fisher information; the natural gradient divides by it, and by no less
            than a quarter, one undecided group.
        natural: whether it does.
    """
    direction = -gradient / variance.clamp_min(0.25) if natural else -gradient
    length = float((variance * direction**2).sum())
    return direction * math.sqrt(2 * divergence / length) if length > 0 else torch.zeros_like(direction)
