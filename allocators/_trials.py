"""The loop that all searches on the true loss share: counting, racing, nominees, and the verdict on them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from globalopt.errors import UsageError
from globalopt.protocols import Candidate, Objective
from globalopt.values.budget import Target
from globalopt.values.problem import Problem
from globalopt.values.span import Mask

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
        self._asked: set[tuple[frozenset[tuple[str, Target | Mask]], int]] = set()

    @property
    def all_chunks(self) -> range:
        """Every chunk of the selection text."""
        return range(self.objective.chunks)

    @property
    def left(self) -> int:
        """Tokens that may be spent before the verdict, which judges all starts and `FINALISTS` nominees everywhere."""
        finalists = self._nominees[-FINALISTS:]
        known = self._cost([*self._starts, *finalists], self.all_chunks)
        unknown = (FINALISTS - len(finalists)) * self.objective.chunks * self.objective.chunk_tokens
        return self.objective.limit - self.objective.tokens - known - unknown

    def losses(self, candidates: Sequence[Candidate], chunks: Sequence[int]) -> Tensor:
        """(candidates, windows) losses on `chunks`.

        Raises:
            OutOfTokens: they may cost more than is left.
        """
        if self._cost(candidates, chunks) > max(0, self.left):
            raise OutOfTokens
        return self._ask(candidates, chunks)

    def _cost(self, candidates: Sequence[Candidate], chunks: Sequence[int]) -> int:
        """Tokens of what was not asked before, at most."""
        new = {(_key(candidate), chunk) for candidate in candidates for chunk in chunks} - self._asked
        return len(new) * self.objective.chunk_tokens

    def _ask(self, candidates: Sequence[Candidate], chunks: Sequence[int]) -> Tensor:
        losses = self.objective.losses(candidates, chunks)
        self._asked.update((_key(candidate), chunk) for candidate in candidates for chunk in chunks)
        return losses

    def judge(self, candidates: Sequence[Candidate]) -> Tensor:
        """(candidates, windows) losses on the whole selection text, whatever is left: for starts and the verdict."""
        return self._ask(candidates, self.all_chunks)

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
        return heard[int(torch.argmin(self.judge(heard).mean(1)))]


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
