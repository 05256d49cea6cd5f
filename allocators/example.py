"""A small problem and an objective that needs no model: for examples, and for the first trials of an allocator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from globalopt.protocols import Candidate
from globalopt.values.budget import Budget, Target
from globalopt.values.layer import LayerSpec
from globalopt.values.problem import Problem, Profile
from globalopt.values.span import Mask, Span
from globalopt.values.surface import ErrorSurface

CHUNKS, WINDOWS, SEQLEN = 8, 4, 10
"""Chunks of the example's text, windows of a chunk, and tokens of a window."""

TRUE_MULTIPLIERS = {"q_proj": 0.5, "up_proj": 2.0}
"""Factors of the true over the predicted errors, by kind of layer."""


def example_problem(kept: float = 0.5) -> Problem:
    """Make a problem of four layers in two blocks, with profiles and spans.

    The error of a layer that keeps `nnz` entries beside a rank is `importance (1 - nnz / numel)² 0.8^rank`.

    Args:
        kept: fraction of the parameters in the budget.

    >>> problem = example_problem(kept=0.5)
    >>> [spec.name for spec in problem.specs]
    ['blocks.0.q_proj', 'blocks.0.up_proj', 'blocks.1.q_proj', 'blocks.1.up_proj']
    >>> problem.budget.limit, problem.budget.total
    (192, 384)
    >>> round(problem.surfaces[0].predict(Target(0, 32)), 3)  # half of the entries of the first layer
    0.05
    """
    importances = {("q_proj", 0): 0.2, ("up_proj", 0): 1.0, ("q_proj", 1): 3.0, ("up_proj", 1): 0.4}
    surfaces = []
    for (kind, block), importance in importances.items():
        name = f"blocks.{block}.{kind}"
        spec = LayerSpec(name, block, name, kind, 8 if kind == "q_proj" else 16, 8)
        targets = [Target(rank, spec.numel * step // 8) for rank in range(3) for step in range(9)]
        targets = [t for t in targets if t.params(spec) <= spec.numel]
        errors = [importance * (1 - t.nnz / spec.numel) ** 2 * 0.8**t.rank for t in targets]
        surfaces.append(ErrorSurface(spec, tuple(targets), tuple(errors)))
    specs = {surface.spec.name: surface.spec for surface in surfaces}
    profiles = {
        name: Profile(dict.fromkeys((3, 5, 7, 10), 0.01 * (i + 1)), alpha=3.0 + i) for i, name in enumerate(specs)
    }

    def span(name: str) -> Span:
        """Two directions of a random weight, and the entries of what these leave."""
        generator = torch.Generator().manual_seed(len(name))
        W = torch.randn(specs[name].d_out, specs[name].d_in, generator=generator)
        U, s, Vh = (part[..., :2] if i < 2 else part[:2] for i, part in enumerate(torch.linalg.svd(W)))
        return Span(U, s, Vh, W - (U * s) @ Vh, torch.ones(W.shape[1]), torch.ones(len(W), 1))

    budget = Budget.fraction(kept, list(specs.values()))
    return Problem(tuple(surfaces), budget, profiles=profiles, spans=span)


@dataclass
class ExampleObjective:
    """Compute losses from a problem's surfaces, with factors that the surfaces do not know.

        loss = (1 + window / 10) sum over layers of TRUE_MULTIPLIERS[kind] error

    Args:
        problem: gives the errors.
        limit: tokens that may be spent.
        tokens: tokens spent so far.

    >>> problem = example_problem()
    >>> objective = ExampleObjective(problem)
    >>> dense = {spec.name: Target.dense(spec) for spec in problem.specs}
    >>> half = {spec.name: Target(0, spec.numel // 2) for spec in problem.specs}
    >>> losses = objective.losses([dense, half], chunks=[0, 3])
    >>> losses.shape, float(losses[0].max()), round(float(losses[1, 0]), 3)
    (torch.Size([2, 8]), 0.0, 1.1)
    >>> objective.tokens
    160
    """

    problem: Problem
    limit: int = 50_000
    tokens: int = 0
    _known: dict[tuple[int, frozenset[tuple[str, Target | Mask]]], Tensor] = field(default_factory=dict, repr=False)

    @property
    def chunks(self) -> int:
        """The number of chunks."""
        return CHUNKS

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a chunk."""
        return WINDOWS * SEQLEN

    def losses(self, candidates: Sequence[Candidate], chunks: Sequence[int]) -> Tensor:
        """Compute the losses (candidates, windows of the chunks) float64; those computed before cost nothing."""
        return torch.stack([torch.cat([self._loss(each, chunk) for chunk in chunks]) for each in candidates])

    def true(self, candidate: Candidate) -> float:
        """Compute the sum of the true errors."""
        targets: Mapping[str, Target] = {n: k.target() if isinstance(k, Mask) else k for n, k in candidate.items()}
        factors = {spec.name: TRUE_MULTIPLIERS[spec.kind] for spec in self.problem.specs}
        return sum(factors[s.spec.name] * s.predict(targets[s.spec.name]) for s in self.problem.surfaces)

    def _loss(self, candidate: Candidate, chunk: int) -> Tensor:
        key = chunk, frozenset(candidate.items())
        if key not in self._known:
            self.tokens += self.chunk_tokens
            windows = torch.arange(WINDOWS * chunk, WINDOWS * (chunk + 1), dtype=torch.float64)
            self._known[key] = (1 + windows / 10) * self.true(candidate)
        return self._known[key]
