"""An objective without a model: the surfaces' own errors, bent and noisy, so that a search has something to find."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from globalopt.protocols import Candidate
from globalopt.values.problem import Problem
from globalopt.values.span import Mask

CHUNK = 4


@dataclass
class BentObjective:
    """Windows' losses `scale_n (sum_l m_l error_l)^power`: the multipliers `m_l` are what the surfaces do not know.

    Args:
        bend: spread of the log multipliers, by a seed; 0 keeps the surfaces' order.
        noise: relative spread between windows, the same for all candidates.
        limit: of tokens; a window has 10.
    """

    problem: Problem
    bend: float = 0.5
    noise: float = 0.2
    chunks: int = 6
    limit: int = 200_000
    power: float = 0.9
    asked: int = 0
    tokens: int = 0
    _known: dict[tuple[int, frozenset], Tensor] = field(default_factory=dict)

    @property
    def chunk_tokens(self) -> int:
        return CHUNK * 10

    @cached_property
    def multipliers(self) -> dict[str, float]:
        generator = torch.Generator().manual_seed(7)
        names = sorted(spec.name for spec in self.problem.specs)
        drawn = torch.randn(len(names), generator=generator) * self.bend
        return {name: math.exp(float(x)) for name, x in zip(names, drawn, strict=True)}

    @cached_property
    def scales(self) -> Tensor:
        generator = torch.Generator().manual_seed(8)
        return (torch.randn(self.chunks, CHUNK, generator=generator) * self.noise).exp().double()

    def true(self, candidate: Candidate) -> float:
        """The loss without noise."""
        total = 0.0
        for surface in self.problem.surfaces:
            kept = candidate[surface.spec.name]
            # Components of a span are in no storage of their own.
            target = replace(kept.target(), storage=surface.storages[0]) if isinstance(kept, Mask) else kept
            total += self.multipliers[surface.spec.name] * surface.predict(target)
        return total**self.power

    def losses(self, candidates: Sequence[Candidate], chunks: Sequence[int]) -> Tensor:
        self.asked += 1
        rows = []
        for candidate in candidates:
            row = []
            for chunk in chunks:
                key = (chunk, frozenset((name, _key(kept)) for name, kept in candidate.items()))
                if key not in self._known:
                    self.tokens += self.chunk_tokens
                    self._known[key] = self.scales[chunk] * self.true(candidate)
                row.append(self._known[key])
            rows.append(torch.cat(row))
        return torch.stack(rows)


def _key(kept: object) -> object:
    if isinstance(kept, Mask):
        return kept.directions.numpy().tobytes() + kept.entries.numpy().tobytes()
    return kept
