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
from globalopt.values.budget import Target
from globalopt.values.layer import LayerSpec
from globalopt.values.problem import Problem
from globalopt.values.span import Mask
from globalopt.values.storage import GROUP

WINDOW = 5
"""Losses that the moving-average baseline is the mean of, the latest included."""

SMOOTHING = 0.01
"""Added to `s (1 - s)` in the score; the paper names no value."""

BISECTIONS = 100


def search(trials: Trials, updates: int, samples: int, learning_rate: float, batch: int) -> dict[str, Target]:
    """Choose the numbers of directions and entries of every layer by CAP, within the budget.

    The part of the budget that rounding leaves is not spent here.

        s <- project(s - learning_rate mean_k (f_k - baseline) (m_k - s) / (s (1 - s) + SMOOTHING)),  m_k ~ Bernoulli(s)

    Args:
        trials: evaluates the losses `f_k`; its starts are not used.
        updates: iterations; fewer where the tokens end.
        samples: masks `m_k` per iteration.
        batch: chunks that they are evaluated on.

    >>> from allocators.example import ExampleObjective, example_problem
    >>> problem = example_problem(kept=0.5)
    >>> trials = Trials(problem, ExampleObjective(problem), [{spec.name: Target.zero() for spec in problem.specs}])
    >>> found = search(trials, updates=3, samples=1, learning_rate=0.05, batch=8)
    >>> problem.used(found) <= problem.budget.limit
    True
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
    """Project probabilities onto the budget: `argmin ||x - s||²  s.t.  0 <= x <= 1, price x <= limit`.

    The solution is `clip(s - nu price, 0, 1)`, with `nu` found by bisection.

    Args:
        s: (n,). price: (n,), positive. limit: >= 0.
    Returns:
        (n,) that meets the limit, summed in float64.

    >>> project_to_budget(torch.tensor([0.9, 0.5, 1.5]), torch.ones(3), limit=2.0)
    tensor([0.7000, 0.3000, 1.0000])
    """
    if _cost(s.clamp(0.0, 1.0), price) <= limit:
        return s.clamp(0.0, 1.0)
    nu = _bisect(lambda nu: _cost((s - nu * price).clamp(0.0, 1.0), price) <= limit, 0.0, float((s / price).max()))
    return (s - nu * price).clamp(0.0, 1.0)


def _cost(s: Tensor, price: Tensor) -> float:
    return float((s * price).sum(dtype=torch.float64))


def _bisect(holds: Callable[[float], bool], fails_at: float, holds_at: float) -> float:
    """Return a point next to the one at which `holds` changes, on the side where it is true."""
    for _ in range(BISECTIONS):
        middle = (fails_at + holds_at) / 2
        if holds(middle):
            holds_at = middle
        else:
            fails_at = middle
    return holds_at


@dataclass(frozen=True)
class _Part:
    """The places of the components of one layer: its directions from `start`, then its entries, if these are chosen."""

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
    """Describe the components of all layers' spans in one vector, layers in the order of their names.

    `magnitude` is a component's root energy per parameter against the layer's: `s_i / sqrt(d_out + d_in)` for a
    direction, `|S_ij|` for an entry, over the root mean square of them all, in the span's coordinates. `price` is in
    the budget's unit; in bytes it leaves out the index of `S`. Entries where `S` is zero have magnitude 0 and are never
    kept. Under a pattern the entries are fixed, and a layer has at most the directions that cost as much as the entries
    it drops; without sparse parts there are no entries. Counts of directions are rounded down to the problem's limits.

    >>> from allocators.example import example_problem
    >>> components = Components(example_problem(kept=0.5))
    >>> s = components.initial()
    >>> s.shape, components.limit, round(float(s @ components.price))
    (torch.Size([392]), 192.0, 192)
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        budget, pattern = problem.budget, problem.pattern
        self._parts: list[_Part] = []
        magnitude: list[Tensor] = []
        price: list[Tensor] = []
        start = 0
        for surface in sorted(problem.surfaces, key=lambda surface: surface.spec.name):
            spec, (storage,) = surface.spec, surface.storages
            span = problem.span(spec.name)
            bare = Target(0, pattern.nnz(spec) if pattern else 0, pattern, storage=storage)
            room = (spec.numel - bare.nnz) // (spec.d_out + spec.d_in) if pattern else span.max_rank
            directions = problem.limits.floor(min(span.max_rank, room))
            entries = spec.numel if problem.axis == "nnz" else 0
            part = _Part(spec, bare, start, directions, entries)
            energy = float((span.s.double() ** 2).sum() + (span.S.double() ** 2).sum())
            parts = (span.s[:directions] / (spec.d_out + spec.d_in) ** 0.5, span.S.flatten()[:entries].abs())
            magnitude.append(torch.cat(parts).float().cpu() / max(energy / spec.numel, 1e-30) ** 0.5)
            per_rank = float(budget.cost(replace(bare, rank=1), spec) - budget.cost(bare, spec))
            per_entry = 1.0 if budget.accounting == "params" else storage.value_bytes(GROUP) / GROUP
            price += [torch.full((directions,), per_rank), torch.full((entries,), per_entry)]
            self._parts.append(part)
            start = part.end
        self.magnitude = torch.cat(magnitude)
        self.price = torch.cat(price)
        self.limit = float(budget.limit - problem.used({part.spec.name: part.bare for part in self._parts}))

    def initial(self) -> Tensor:
        """Compute the start (n,), `clip(c magnitude, 0, 1)` with the `c` whose expected price is the limit."""
        held = (self.magnitude > 0).float()
        if _cost(held, self.price) <= self.limit:
            return held
        high = 1.0
        while _cost((high * self.magnitude).clamp_max(1.0), self.price) <= self.limit:
            high *= 2
        c = _bisect(lambda c: _cost((c * self.magnitude).clamp_max(1.0), self.price) <= self.limit, high, 0.0)
        return (c * self.magnitude).clamp_max(1.0)

    def candidate(self, mask: Tensor) -> Candidate:
        """Make the candidate with the components of `mask` (n,) bool; under a pattern with as many directions."""
        return {part.spec.name: self._kept(part, mask) for part in self._parts}

    def rounded(self, s: Tensor) -> dict[str, Target]:
        """Count the components of largest `s`, of equal ones those of largest magnitude, up to the exact budget.

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
            return replace(Target.dense(part.spec), storage=part.bare.storage)
        return target
