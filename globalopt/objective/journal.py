"""An objective with a memory: every loss is kept in a journal, so that a search that was killed goes on.

A search is a function of its seed and of the losses it was told. A search that starts again evaluates the same
candidates, is answered from the journal up to where it was killed, and ends as if it had not been.

A loss is a function of the model, the selection text, how candidates are made, and the candidate. It depends neither on
the budget nor on the allocator, so that all searches on one analysis may share a journal, also at the same time.
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
from globalopt.values.search_record import Evaluation
from globalopt.values.span import Mask

if TYPE_CHECKING:
    from optuna import Study

EVALUATIONS = "evaluations"
"""The name of the study, in Optuna's sense, in which the losses are kept."""

LossFunction = Callable[[Sequence[Candidate], Sequence[int]], Tensor]
"""`losses` of an objective."""


@dataclass(frozen=True, eq=False)
class Selection:
    """Describe the sizes of the selection text: windows of `seqlen` tokens, `sizes` of them in each chunk.

    >>> Selection(sizes=(4, 4, 2), seqlen=128).chunk_tokens
    512
    """

    sizes: tuple[int, ...]
    seqlen: int

    @property
    def chunk_tokens(self) -> int:
        """Tokens of the largest chunk."""
        return max(self.sizes) * self.seqlen


class RecordedObjective:
    """Evaluate the losses that no one has evaluated before, and count the tokens.

    A loss is known by candidate and chunk. Its tokens count when it is first requested of this object, whether the
    journal or the model answers, so that a resumed search spends as many as an undisturbed one.

    Several of these may share a journal at the same time, in one process or in many. Each reads the losses that the
    others have added before it evaluates anything. Of two losses of one candidate, all take the one that was written
    first.

    Args:
        evaluate: computes losses on the model; called only for those that are not in the journal.
        selection: the sizes of the chunks.
        problem: predicts the losses that the evaluations are set beside.
        limit: tokens a search may spend.
        journal: file of the journal, made if it is not there; None keeps the losses in memory.
        advance: called with a detail for every candidate and chunk whose tokens are counted.
        kind: the kind of candidates; losses of another kind or another selection in the same journal are not used.

    Raises:
        ArtefactError: the journal is none.

    >>> from allocators.example import ExampleObjective, example_problem
    >>> problem = example_problem(kept=0.5)
    >>> model = ExampleObjective(problem)
    >>> selection = Selection((4, 4), 10)
    >>> candidate = {spec.name: Target(0, spec.numel // 2) for spec in problem.specs}
    >>> first = RecordedObjective(model.losses, selection, problem, limit=1000, journal=Path("journal.log"))
    >>> losses = first.losses([candidate], chunks=[0, 1])
    >>> losses.shape, first.tokens, model.tokens
    (torch.Size([1, 8]), 80, 80)

    Another search is answered by the journal; its own tokens are counted all the same:

    >>> second = RecordedObjective(model.losses, selection, problem, limit=1000, journal=Path("journal.log"))
    >>> torch.equal(second.losses([candidate], chunks=[0, 1]), losses), second.tokens, model.tokens
    (True, 80, 80)
    """

    def __init__(
        self,
        evaluate: LossFunction,
        selection: Selection,
        problem: Problem,
        limit: int,
        journal: Path | None = None,
        advance: Callable[[str], None] = lambda detail: None,
        kind: str = "",
    ) -> None:
        self.limit = limit
        self.tokens = 0
        self.evaluations: list[Evaluation] = []
        self._evaluate = evaluate
        self._selection = selection
        self._problem = problem
        self._advance = advance
        self._salt = json.dumps([kind, selection.sizes, selection.seqlen]).encode()
        self._counted: set[tuple[str, int]] = set()
        self._best = float("inf")
        self._study = _open_study(journal)
        self._read = 0
        self._known: dict[tuple[str, int], list[float]] = {}

    @property
    def chunks(self) -> int:
        """The number of chunks."""
        return len(self._selection.sizes)

    @property
    def chunk_tokens(self) -> int:
        """Tokens of the largest chunk."""
        return self._selection.chunk_tokens

    def losses(self, candidates: Sequence[Candidate], chunks: Sequence[int]) -> Tensor:
        """Return the losses (candidates, windows of the chunks) float64; see `Objective.losses`.

        Raises:
            ArtefactError: the journal cannot be written.
        """
        digests = [self._digest(candidate) for candidate in candidates]
        if any((digest, chunk) not in self._known for digest in digests for chunk in chunks):
            self._refresh()
        # By candidate, as what is missing differs between candidates; those that lack the same go together.
        missing: dict[tuple[int, ...], dict[str, Candidate]] = {}
        for digest, candidate in zip(digests, candidates, strict=True):
            lacking = tuple(chunk for chunk in chunks if (digest, chunk) not in self._known)
            if lacking:
                missing.setdefault(lacking, {})[digest] = candidate
        for lacking, new in missing.items():
            self._learn(list(new), self._evaluate(list(new.values()), lacking), lacking)
        rows = []
        for digest, candidate in zip(digests, candidates, strict=True):
            row = [self._known[digest, chunk] for chunk in chunks]
            rows.append(torch.tensor([loss for losses in row for loss in losses], dtype=torch.float64))
            self._count(digest, candidate, chunks, rows[-1])
        return torch.stack(rows)

    def _refresh(self) -> None:
        """Read the losses added to the journal since the last time; of several for one candidate the first is kept."""
        trials = self._study.get_trials(deepcopy=False)
        for trial in trials[self._read :]:
            for digest, by_chunk in trial.user_attrs.get("losses", {}).items():
                for chunk, losses in by_chunk.items():
                    self._known.setdefault((digest, int(chunk)), losses)
        self._read = len(trials)

    def _learn(self, digests: Sequence[str], losses: Tensor, chunks: Sequence[int]) -> None:
        """Write `losses` (candidates, windows) to the journal, and read them from there."""
        parts = losses.split([self._selection.sizes[chunk] for chunk in chunks], dim=1)
        learned = {
            digest: {chunk: part[i].tolist() for chunk, part in zip(chunks, parts, strict=True)}
            for i, digest in enumerate(digests)
        }
        _append(self._study, float(losses.mean(1).min()), learned)
        self._refresh()

    def _count(self, digest: str, candidate: Candidate, chunks: Sequence[int], losses: Tensor) -> None:
        """Count the tokens of what is new to this object, and note the loss beside the predicted one."""
        new = [chunk for chunk in chunks if (digest, chunk) not in self._counted]
        if not new:
            return
        self._counted.update((digest, chunk) for chunk in new)
        self.tokens += sum(self._selection.sizes[chunk] for chunk in new) * self._selection.seqlen
        targets = {name: kept.target() if isinstance(kept, Mask) else kept for name, kept in candidate.items()}
        predicted = self._problem.predicted(targets)
        everywhere = all((digest, chunk) in self._counted for chunk in range(self.chunks))
        if everywhere:
            # Also where it was evaluated in stages, of which this call is the last.
            losses = torch.tensor(
                [loss for chunk in range(self.chunks) for loss in self._known[digest, chunk]], dtype=torch.float64
            )
        mean = float(losses.mean())
        self.evaluations.append(Evaluation(self.tokens, mean, len(losses), everywhere, predicted))
        if everywhere:
            self._best = min(self._best, mean)
        for _ in new:
            self._advance("" if self._best == float("inf") else f"best loss {self._best:.5g}")

    def _digest(self, candidate: Candidate) -> str:
        """Return a hash of what every layer keeps, of the kind of candidates and of the selection."""
        sha = hashlib.sha256(self._salt)
        for name in sorted(candidate):
            kept = candidate[name]
            if isinstance(kept, Target):
                words = [name, kept.rank, kept.nnz, str(kept.pattern), kept.signs]
                if not kept.storage.plain:
                    words.append(str(kept.storage))
                sha.update(json.dumps(words).encode())
            else:
                sha.update(name.encode() + kept.directions.numpy().tobytes() + kept.entries.numpy().tobytes())
        return sha.hexdigest()[:32]


def _open_study(journal: Path | None) -> Study:
    import optuna
    from optuna.storages import InMemoryStorage, JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if journal is None:
        return optuna.create_study(storage=InMemoryStorage(), study_name=EVALUATIONS)
    try:
        journal.parent.mkdir(parents=True, exist_ok=True)
        # The lock is a symbolic link to the journal: by a relative path Optuna would not find out how old it is.
        path = str(journal.absolute())
        lock = JournalFileSymlinkLock(path)
        if journal.exists():
            lock.acquire()
            try:
                _cut_torn_line(journal)
            finally:
                lock.release()
        storage = JournalStorage(JournalFileBackend(path, lock))
        return optuna.create_study(storage=storage, study_name=EVALUATIONS, load_if_exists=True)
    except (OSError, ValueError, KeyError) as cause:
        raise ArtefactError(f"{journal} is no journal of a search ({cause}). Delete it and run again.") from None


def _cut_torn_line(journal: Path) -> None:
    """Remove a last line without an end: its writer was killed, or the disk was full."""
    with journal.open("r+b") as file:
        text = file.read()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            file.truncate(whole)


def _append(study: Study, value: float, losses: dict[str, dict[int, list[float]]]) -> None:
    from optuna.trial import create_trial

    try:
        study.add_trial(create_trial(value=value, user_attrs={"losses": losses}))
    except OSError as cause:
        raise ArtefactError(
            f"The journal of the search cannot be written ({cause.strerror or cause}). Free space and run the same "
            "command again; it goes on from there."
        ) from cause
