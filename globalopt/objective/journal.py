"""An objective with a memory: what was asked is kept in a journal, so that a search that was killed goes on.

A search is a function of its seed and of the losses it was told. One that starts again asks the same questions, is
answered from the journal up to where it was killed, and ends as if it had not been.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from globalopt.errors import ArtefactError
from globalopt.protocols import Candidate
from globalopt.values.budget import Target
from globalopt.values.problem import Problem
from globalopt.values.results import Evaluation
from globalopt.values.span import Mask, Span

if TYPE_CHECKING:
    from optuna import Study

EVALUATIONS = "evaluations"

Ask = Callable[[Sequence[Candidate], Sequence[int]], Tensor]
"""`losses` of an objective."""


@dataclass(frozen=True, eq=False)
class Selection:
    """The text a search asks about: windows of `seqlen` tokens, `sizes` of them in each chunk."""

    sizes: tuple[int, ...]
    seqlen: int


class RecordedObjective:
    """Asks `ask` what was never asked before, and counts the tokens.

    A loss is known by candidate and chunk. Its tokens count when it is first asked for in this process, whether the
    journal or the model answers, so that a resumed search spends as an undisturbed one does.

    Args:
        ask: answers on the model; called only for what is not in the journal.
        span: reads a layer's span.
        selection: how the chunks are made up.
        problem: predicts the losses that evaluations are set beside.
        limit: tokens a search may spend.
        journal: file of the journal; None keeps it in memory.
        advance: called with a detail per candidate and chunk that was asked of the model or read.
    """

    def __init__(
        self,
        ask: Ask,
        span: Callable[[str], Span],
        selection: Selection,
        problem: Problem,
        limit: int,
        journal: Path | None = None,
        advance: Callable[[str], None] = lambda detail: None,
    ) -> None:
        self.span = span
        self.limit = limit
        self.tokens = 0
        self.evaluations: list[Evaluation] = []
        self._ask = ask
        self._selection = selection
        self._problem = problem
        self._advance = advance
        self._journal = journal
        self._counted: set[tuple[str, int]] = set()
        self._best = float("inf")
        self._study = _open_study(journal)
        self._known: dict[tuple[str, int], list[float]] = {}
        for trial in self._study.get_trials(deepcopy=False):
            for digest, by_chunk in trial.user_attrs["losses"].items():
                self._known.update({(digest, int(chunk)): losses for chunk, losses in by_chunk.items()})

    @property
    def chunks(self) -> int:
        return len(self._selection.sizes)

    @property
    def chunk_tokens(self) -> int:
        return max(self._selection.sizes) * self._selection.seqlen

    @property
    def study(self) -> str | None:
        return None if self._journal is None else str(self._journal)

    def losses(self, candidates: Sequence[Candidate], chunks: Sequence[int]) -> Tensor:
        """(candidates, windows of the chunks) float64; see `Objective.losses`."""
        digests = [_digest(candidate) for candidate in candidates]
        # By candidate, as what is missing differs between candidates; those that lack the same are asked together.
        missing: dict[tuple[int, ...], dict[str, Candidate]] = {}
        for digest, candidate in zip(digests, candidates, strict=True):
            lacking = tuple(chunk for chunk in chunks if (digest, chunk) not in self._known)
            if lacking:
                missing.setdefault(lacking, {})[digest] = candidate
        for lacking, asked in missing.items():
            self._learn(list(asked), self._ask(list(asked.values()), lacking), lacking)
        rows = []
        for digest, candidate in zip(digests, candidates, strict=True):
            row = [self._known[digest, chunk] for chunk in chunks]
            rows.append(torch.tensor([loss for losses in row for loss in losses], dtype=torch.float64))
            self._count(digest, candidate, chunks, rows[-1])
        return torch.stack(rows)

    def _learn(self, digests: Sequence[str], losses: Tensor, chunks: Sequence[int]) -> None:
        """Keep `losses` (candidates, windows) in memory and in the journal."""
        parts = losses.split([self._selection.sizes[chunk] for chunk in chunks], dim=1)
        learned = {
            digest: {chunk: part[i].tolist() for chunk, part in zip(chunks, parts, strict=True)}
            for i, digest in enumerate(digests)
        }
        self._known.update(
            {(digest, chunk): row for digest, by_chunk in learned.items() for chunk, row in by_chunk.items()}
        )
        _append(self._study, float(losses.mean(1).min()), learned)

    def _count(self, digest: str, candidate: Candidate, chunks: Sequence[int], losses: Tensor) -> None:
        """Spend tokens for what is new to this process, and set the candidate down beside what was predicted."""
        new = [chunk for chunk in chunks if (digest, chunk) not in self._counted]
        if not new:
            return
        self._counted.update((digest, chunk) for chunk in new)
        self.tokens += sum(self._selection.sizes[chunk] for chunk in new) * self._selection.seqlen
        targets = {name: kept.target() if isinstance(kept, Mask) else kept for name, kept in candidate.items()}
        predicted = self._problem.predicted(targets)
        everywhere = all((digest, chunk) in self._counted for chunk in range(self.chunks))
        if everywhere:
            # Also where it was asked for in stages, of which this call is the last.
            losses = torch.tensor(
                [loss for chunk in range(self.chunks) for loss in self._known[digest, chunk]], dtype=torch.float64
            )
        mean = float(losses.mean())
        self.evaluations.append(Evaluation(self.tokens, mean, len(losses), everywhere, predicted))
        if everywhere:
            self._best = min(self._best, mean)
        for _ in new:
            self._advance("" if self._best == float("inf") else f"best loss {self._best:.5g}")


def _digest(candidate: Candidate) -> str:
    """A hash of what every layer keeps."""
    sha = hashlib.sha256()
    for name in sorted(candidate):
        kept = candidate[name]
        if isinstance(kept, Target):
            sha.update(json.dumps([name, kept.rank, kept.nnz, str(kept.pattern), kept.signs]).encode())
        else:
            sha.update(name.encode() + kept.directions.numpy().tobytes() + kept.entries.numpy().tobytes())
    return sha.hexdigest()[:32]


def _open_study(journal: Path | None) -> Study:
    import optuna
    from optuna.storages import InMemoryStorage, JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if journal is None:
        return optuna.create_study(storage=InMemoryStorage(), study_name=EVALUATIONS)
    try:
        journal.parent.mkdir(parents=True, exist_ok=True)
        storage = JournalStorage(JournalFileBackend(str(journal)))
        return optuna.create_study(storage=storage, study_name=EVALUATIONS, load_if_exists=True)
    except (OSError, ValueError, KeyError) as cause:
        raise ArtefactError(f"{journal} is no journal of a search ({cause}). Delete it and run again.") from None


def _append(study: Study, value: float, losses: dict[str, dict[int, list[float]]]) -> None:
    from optuna.trial import create_trial

    try:
        study.add_trial(create_trial(value=value, user_attrs={"losses": losses}))
    except OSError as cause:
        raise ArtefactError(
            f"The journal of the search cannot be written ({cause.strerror or cause}). Free space and run the same "
            "command again; it goes on from there."
        ) from cause
