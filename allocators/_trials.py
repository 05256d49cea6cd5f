"""The part that all searches on the loss of the model share: counting tokens, nominees, and the verdict on them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from globalopt.errors import UsageError
from globalopt.protocols import Candidate, Objective
from globalopt.values.budget import Target
from globalopt.values.problem import Problem
from globalopt.values.span import Mask

FINALISTS = 4
"""Number of the latest nominees that are evaluated on the whole selection text, beside all starts."""


_Key = frozenset[tuple[str, Target | Mask]]


class OutOfTokens(Exception):
    """Raised where a search has spent its tokens; the rest is kept for the verdict."""


class Trials:
    """One search: it evaluates the objective within its limit, and chooses among the nominees.

    The starts are nominated first, so that the verdict is never worse than the best of them on the selection text.

    Args:
        problem: every start must be within its budget.
        objective: evaluates the losses.
        starts: allocations to begin with, at least one.
    """

    def __init__(self, problem: Problem, objective: Objective | None, starts: Sequence[Mapping[str, Target]]) -> None:
        if not starts:
            raise ValueError("A search needs a start.")
        self.problem = problem
        self.objective = present(objective)
        self._starts = [_Known.of(start) for start in starts]
        self._nominees: list[_Known] = []
        self._evaluated: set[tuple[_Key, int]] = set()

    @property
    def all_chunks(self) -> range:
        """Every chunk of the selection text."""
        return range(self.objective.chunks)

    @property
    def left(self) -> int:
        """Tokens that may be spent before the verdict on all starts and `FINALISTS` nominees."""
        finalists = self._nominees[-FINALISTS:]
        known = self._cost([known.key for known in (*self._starts, *finalists)], self.all_chunks)
        unknown = (FINALISTS - len(finalists)) * self.objective.chunks * self.objective.chunk_tokens
        return self.objective.limit - self.objective.tokens - known - unknown

    def losses(self, candidates: Sequence[Candidate], chunks: Sequence[int]) -> Tensor:
        """Evaluate the losses (candidates, windows) on `chunks`.

        Raises:
            OutOfTokens: they may cost more tokens than remain.
        """
        keys = [_key(candidate) for candidate in candidates]
        if self._cost(keys, chunks) > max(0, self.left):
            raise OutOfTokens
        return self._evaluate(candidates, keys, chunks)

    def _cost(self, keys: Sequence[_Key], chunks: Sequence[int]) -> int:
        """Return the most tokens that the candidates not evaluated before cost."""
        new = {(key, chunk) for key in keys for chunk in chunks} - self._evaluated
        return len(new) * self.objective.chunk_tokens

    def _evaluate(self, candidates: Sequence[Candidate], keys: Sequence[_Key], chunks: Sequence[int]) -> Tensor:
        losses = self.objective.losses(candidates, chunks)
        self._evaluated.update((key, chunk) for key in keys for chunk in chunks)
        return losses

    def judge(self, candidates: Sequence[Candidate]) -> Tensor:
        """Evaluate the losses (candidates, windows) of starts and finalists on the whole text, also beyond `left`."""
        return self._evaluate(candidates, [_key(candidate) for candidate in candidates], self.all_chunks)

    def nominate(self, targets: Mapping[str, Target]) -> None:
        """Nominate `targets` for the verdict; of more than `FINALISTS` nominees the latest are evaluated."""
        nominee = _Known.of(targets)
        if nominee in self._nominees:
            self._nominees.remove(nominee)
        self._nominees.append(nominee)

    def verdict(self) -> dict[str, Target]:
        """Return the start or nominee of least mean loss on the whole selection text; of equal ones the first.

        It may also be called on the way: evaluating the same candidates again costs nothing.
        """
        finalists = [*self._starts]
        finalists += [nominee for nominee in self._nominees[-FINALISTS:] if nominee not in finalists]
        return finalists[int(torch.argmin(self.judge([known.targets for known in finalists]).mean(1)))].targets


def _key(candidate: Candidate) -> _Key:
    return frozenset(candidate.items())


@dataclass(frozen=True)
class _Known:
    """Hold targets and their key, which is as large as they are and should be made once."""

    key: _Key
    targets: dict[str, Target] = field(compare=False)

    @classmethod
    def of(cls, targets: Mapping[str, Target]) -> _Known:
        return cls(_key(targets), dict(targets))


def present(objective: Objective | None) -> Objective:
    """Return the objective; `UsageError` where there is none."""
    if objective is None:
        raise UsageError("This allocator evaluates the model; give it an objective, or choose one that does not.")
    return objective


def t_statistic(differences: Tensor) -> float:
    """Compute the paired t statistic `mean / (sd / sqrt n)` of differences (n,)."""
    n = len(differences)
    deviation = float(differences.std()) if n > 1 else 0.0
    mean = float(differences.mean())
    if deviation == 0.0:
        return 0.0 if mean == 0 else math.copysign(math.inf, mean)
    return mean / (deviation / math.sqrt(n))
