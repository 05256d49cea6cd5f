"""CAP's policy gradient: a Bernoulli variable per singular direction and per sparse entry (arXiv:2505.03801)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from allocators._trials import OutOfTokens, Trials
from globalopt.protocols import Candidate
from globalopt.values.budget import BYTES_PER_VALUE, Target
from globalopt.values.layer import LayerSpec
from globalopt.values.problem import Problem
from globalopt.values.span import Mask

WINDOW = 5
"""Losses that the moving-average baseline is the mean of, the latest included."""

SMOOTHING = 0.01
"""Added to `s (1 - s)` in the score; the paper names no value."""

BISECTIONS = 100


def search(trials: Trials, updates: int, samples: int, learning_rate: float, batch: int) -> dict[str, Target]:
    """As many directions and entries per layer as CAP keeps: within the budget, what rounding leaves not yet spent.

        s <- project(s - learning_rate mean_k (f_k - baseline) (m_k - s) / (s (1 - s) + SMOOTHING)),  m_k ~ Bernoulli(s)

    Args:
        trials: asked for the losses `f_k`; its starts are not used.
        updates: iterations; fewer where the tokens run out.
        samples: masks `m_k` per iteration.
        batch: chunks that they are asked on.
    """
    components = Components(trials.problem)
    s = components.initial()
    generator = torch.Generator().manual_seed(trials.problem.seed)
    window: deque[float] = deque(maxlen=WINDOW)
    for _ in range(updates):
        masks = torch.rand(samples, len(s), generator=generator) < s
        chunks = torch.randperm(len(trials.all_chunks), generator=generator)[:batch].tolist()
        try:
            losses = trials.losses([components.candidate(mask) for mask in masks], chunks).mean(1).tolist()
        except OutOfTokens:
            break
        window.extend(losses)
        baseline = sum(window) / len(window)
        gradient = torch.zeros_like(s)
        for mask, loss in zip(masks, losses, strict=True):
            gradient += (loss - baseline) * (mask.float() - s) / (s * (1 - s) + SMOOTHING) / samples
        s = project_to_budget(s - learning_rate * gradient, components.price, components.limit)
    return components.rounded(s)


def project_to_budget(s: Tensor, price: Tensor, limit: float) -> Tensor:
    """`argmin ||x - s||²  s.t.  0 <= x <= 1, price x <= limit`, which is `clip(s - nu price, 0, 1)`; nu by bisection.

    Args:
        s: (n,). price: (n,), positive. limit: >= 0.
    Returns:
        (n,) that meets the limit, summed in float64.
    """
    if _cost(s.clamp(0.0, 1.0), price) <= limit:
        return s.clamp(0.0, 1.0)
    nu = _bisect(lambda nu: _cost((s - nu * price).clamp(0.0, 1.0), price) <= limit, 0.0, float((s / price).max()))
    return (s - nu * price).clamp(0.0, 1.0)


def _cost(s: Tensor, price: Tensor) -> float:
    return float((s * price).sum(dtype=torch.float64))


def _bisect(holds: Callable[[float], bool], fails_at: float, holds_at: float) -> float:
    """A point next to where `holds` begins to, on the side where it does."""
    for _ in range(BISECTIONS):
        middle = (fails_at + holds_at) / 2
        if holds(middle):
            holds_at = middle
        else:
            fails_at = middle
    return holds_at


@dataclass(frozen=True)
class _Part:
    """Where the components of one layer lie: its directions from `start`, then its entries, if they are variables."""

    spec: LayerSpec
    bare: Target
    start: int
    directions: int
    entries: int

    @property
    def middle(self) -> int:
        return self.start + self.directions

    @property
    def end(self) -> int:
        return self.middle + self.entries


class Components:
    """The components of all layers' spans in one vector, layers in the order of their names.

    `magnitude` is a component's root energy per parameter against the layer's: `s_i / sqrt(d_out + d_in)` for a
    direction, `|S_ij|` for an entry, over the root mean square of them all, in the span's coordinates. `price` is in
    the budget's unit; in bytes it leaves out the index of `S`. Entries where `S` is zero have magnitude 0 and are never
    kept. Under a pattern the entries are fixed, and a layer has no more directions than make up what it drops; without
    sparse parts there are none. Counts of directions are rounded down to the problem's limits.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        budget, pattern = problem.budget, problem.pattern
        self._parts: list[_Part] = []
        magnitude: list[Tensor] = []
        price: list[Tensor] = []
        start = 0
        for spec in sorted(problem.specs, key=lambda spec: spec.name):
            span = problem.span(spec.name)
            bare = Target(0, pattern.nnz(spec) if pattern else 0, pattern)
            room = (spec.numel - bare.nnz) // (spec.d_out + spec.d_in) if pattern else span.max_rank
            directions = problem.limits.floor(min(span.max_rank, room))
            entries = spec.numel if problem.axis == "nnz" else 0
            part = _Part(spec, bare, start, directions, entries)
            energy = float((span.s.double() ** 2).sum() + (span.S.double() ** 2).sum())
            parts = (span.s[:directions] / (spec.d_out + spec.d_in) ** 0.5, span.S.flatten()[:entries].abs())
            magnitude.append(torch.cat(parts).float().cpu() / max(energy / spec.numel, 1e-30) ** 0.5)
            per_rank = float(budget.cost(replace(bare, rank=1), spec) - budget.cost(bare, spec))
            per_entry = 1.0 if budget.accounting == "params" else float(BYTES_PER_VALUE)
            price += [torch.full((directions,), per_rank), torch.full((entries,), per_entry)]
            self._parts.append(part)
            start = part.end
        self.magnitude = torch.cat(magnitude)
        self.price = torch.cat(price)
        self.limit = float(budget.limit - problem.used({part.spec.name: part.bare for part in self._parts}))

    def initial(self) -> Tensor:
        """(n,) `clip(c magnitude, 0, 1)` with the `c` at which the expected price is the limit; all ones below it."""
        held = (self.magnitude > 0).float()
        if _cost(held, self.price) <= self.limit:
            return held
        high = 1.0
        while _cost((high * self.magnitude).clamp_max(1.0), self.price) <= self.limit:
            high *= 2
        c = _bisect(lambda c: _cost((c * self.magnitude).clamp_max(1.0), self.price) <= self.limit, high, 0.0)
        return (c * self.magnitude).clamp_max(1.0)

    def candidate(self, mask: Tensor) -> Candidate:
        """The components of `mask` (n,) bool, by layer; under a pattern as many directions as it has."""
        return {part.spec.name: self._kept(part, mask) for part in self._parts}

    def rounded(self, s: Tensor) -> dict[str, Target]:
        """The counts of the components of largest `s`, of equal ones by magnitude, as many as the exact budget takes.

        A layer whose components cost as much as it does is dense.
        """
        order = np.lexsort((-self.magnitude.numpy(), -s.numpy()))
        order = order[self.magnitude.numpy()[order] > 0]
        ends = [end for part in self._parts for end in (part.middle, part.end)]
        kind = np.searchsorted(np.array(ends), order, side="right")

        def targets(components: int) -> dict[str, Target]:
            counts = np.bincount(kind[:components], minlength=len(ends)).reshape(-1, 2).tolist()
            return {p.spec.name: self._target(p, *count) for p, count in zip(self._parts, counts, strict=True)}

        limit = self._problem.budget.limit
        if self._problem.used(targets(len(order))) <= limit:
            return targets(len(order))
        low, high = 0, len(order)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._problem.used(targets(middle)) <= limit else (low, middle)
        return targets(low)

    def _kept(self, part: _Part, mask: Tensor) -> Target | Mask:
        directions = mask[part.start : part.middle]
        if self._problem.axis == "rank":
            return self._target(part, int(directions.sum()), 0)
        entries = mask[part.middle : part.end].reshape(part.spec.d_out, part.spec.d_in)
        return Mask(directions, entries)

    def _target(self, part: _Part, directions: int, entries: int) -> Target:
        rank = self._problem.limits.floor(directions)
        target = replace(part.bare, rank=rank, nnz=part.bare.nnz + entries)
        if part.bare.pattern is None and target.params(part.spec) >= part.spec.numel:
            return Target.dense(part.spec)
        return target
