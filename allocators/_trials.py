"""The loop that all searches on the true loss share: counting, racing, nominees, and the verdict on them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from globalopt.errors import UsageError
from globalopt.protocols import Candidate, Objective
from globalopt.types import Mask, Problem, Target

FINALISTS = 4
"""Latest nominees that are judged on the whole selection text, beside all starts."""


class OutOfTokens(Exception):
    """The search has spent what it may; what remains is kept for the verdict."""


class Trials:
    """One search: asks the objective within its limit, and judges what was nominated.

    The starts are nominated first, so that the verdict is never worse than the best of them on the selection text.

    Args:
        problem: every start must be within its budget.
        objective: what is asked.
        starts: allocations to begin with, at least one.
    """

    def __init__(self, problem: Problem, objective: Objective | None, starts: Sequence[Mapping[str, Target]]) -> None:
        if not starts:
            raise ValueError("A search needs a start.")
        self.problem = problem
        self.objective = present(objective)
        self._starts = [dict(start) for start in starts]
        self._nominees: list[dict[str, Target]] = []
        self._judged: set[frozenset[tuple[str, Target | Mask]]] = set()

    @property
    def all_chunks(self) -> range:
        """Every chunk of the selection text."""
        return range(self.objective.chunks)

    @property
    def left(self) -> int:
        """Tokens that may be spent before the verdict, which judges all starts and `FINALISTS` nominees everywhere.

        What was asked about everywhere already is judged for nothing.
        """
        finalists = self._nominees[-FINALISTS:]
        known = sum(_key(nominee) in self._judged for nominee in finalists)
        unknown = sum(_key(start) not in self._judged for start in self._starts)
        verdict = (unknown + FINALISTS - known) * self.objective.chunks * self.objective.chunk_tokens
        return self.objective.limit - self.objective.tokens - verdict

    def losses(self, candidates: Sequence[Candidate], chunks: Sequence[int]) -> Tensor:
        """(candidates, windows) losses on `chunks`.

        Raises:
            OutOfTokens: they may cost more than is left.
        """
        if len(candidates) * len(chunks) * self.objective.chunk_tokens > self.left:
            raise OutOfTokens
        losses = self.objective.losses(candidates, chunks)
        if len(set(chunks)) == self.objective.chunks:
            self._judged.update(_key(candidate) for candidate in candidates)
        return losses

    def nominate(self, targets: Mapping[str, Target]) -> None:
        """Put `targets` forward for the verdict; of more than `FINALISTS` the latest are heard."""
        nominee = dict(targets)
        if nominee in self._nominees:
            self._nominees.remove(nominee)
        self._nominees.append(nominee)

    def verdict(self) -> dict[str, Target]:
        """The start or nominee of least mean loss on the whole selection text; of equal ones the first.

        It may also be asked for on the way: judging the same ones again costs nothing.
        """
        heard = [*self._starts]
        heard += [nominee for nominee in self._nominees[-FINALISTS:] if nominee not in heard]
        means = self.objective.losses(heard, self.all_chunks).mean(1)
        self._judged.update(map(_key, heard))
        return heard[int(torch.argmin(means))]


def _key(candidate: Candidate) -> frozenset[tuple[str, Target | Mask]]:
    return frozenset(candidate.items())


def present(objective: Objective | None) -> Objective:
    """The objective; `UsageError` where there is none."""
    if objective is None:
        raise UsageError("This allocator asks the model; give it an objective, or choose one that does not.")
    return objective


def t_statistic(differences: Tensor) -> float:
    """`mean / (sd / sqrt n)` of paired differences (n,): how many standard errors they are from zero."""
    n = len(differences)
    deviation = float(differences.std()) if n > 1 else 0.0
    mean = float(differences.mean())
    if deviation == 0.0:
        return 0.0 if mean == 0 else math.copysign(math.inf, mean)
    return mean / (deviation / math.sqrt(n))
