"""The true loss of an allocation: KL to the dense model on the selection text, for candidates made without fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from globalopt.errors import NumericalError, UsageError
from globalopt.kernels.top_kl import TOP, Teacher
from globalopt.models.walk import BlockRunner
from globalopt.protocols import Candidate
from globalopt.values.budget import Target
from globalopt.values.layer import LayerSpec
from globalopt.values.span import Mask

WEIGHTS_AT_ONCE = 2**31
"""Bytes of candidates' weights that are held, so that they need not be made again for every chunk."""

LAZY_SHARE = 16
"""Lazy models hold this part of what others hold: memory is what is short."""

Materialise = Callable[[LayerSpec, Target | Mask], Tensor]
"""The weight (d_out, d_in) that stands for what a layer keeps."""


class ModelObjective:
    """Losses of candidates on the windows of a runner's batches, each batch a chunk.

    The candidates of a call are run in an order in which neighbours share as many leading blocks as possible; blocks
    before the first layer that changed are not run again.

    While it is in use, the model's layers hold candidates; `close` puts the dense weights back.
    """

    def __init__(self, runner: BlockRunner, materialise: Materialise, top: int = TOP) -> None:
        """Keep the dense weights (but those of a lazy model), and the dense model's predictions on every chunk.

        Raises:
            UsageError: a batch is padded.
        """
        if any(batch.real is not None for batch in runner.batches):
            raise UsageError("A search asks about whole windows; give text without padding.")
        self.top = top
        self._runner = runner
        self._specs = runner.layers.specs
        largest = max(spec.numel for spec in self._specs)
        held = WEIGHTS_AT_ONCE // (4 * largest * (LAZY_SHARE if runner.layers.lazy is not None else 1))
        self._weight = lru_cache(max(1, held))(materialise)
        self._dense = runner.layers.originals()
        self._placed: dict[str, Target | Mask] = {}
        self._teachers = [Teacher.of(self._logits(chunk, self._states(chunk)[-1]), top) for chunk in range(self.chunks)]

    @property
    def chunks(self) -> int:
        return len(self._runner)

    @property
    def chunk_tokens(self) -> int:
        return max(batch.tokens for batch in self._runner.batches)

    @property
    def tail(self) -> float:
        """Mean probability of what the kept predictions leave out."""
        return float(torch.cat([teacher.tail.flatten() for teacher in self._teachers]).double().mean())

    def losses(self, candidates: Sequence[Candidate], chunks: Sequence[int]) -> Tensor:
        """(candidates, windows of the chunks) float64; see `Objective.losses`.

        Raises:
            NumericalError: a loss is not finite.
        """
        order = sorted(range(len(candidates)), key=lambda i: self._order(candidates[i]))
        columns = []
        for chunk in chunks:
            column: dict[int, Tensor] = {}
            states: list[Tensor] = []
            for i in order:
                states = self._states(chunk, states[: self._place(candidates[i]) + 1])
                column[i] = self._teachers[chunk].kl(self._logits(chunk, states[-1]))
                if not bool(torch.isfinite(column[i]).all()):
                    raise NumericalError(f"The loss of a candidate on selection chunk {chunk} is not finite.")
            columns.append(torch.stack([column[i] for i in range(len(candidates))]))
        return torch.cat(columns, dim=1)

    def close(self) -> None:
        """Put the dense weights back."""
        for name in self._placed:
            self._runner.layers.restore(name, self._dense)
        self._placed = {}
        self._weight.cache_clear()

    def dense(self, name: str) -> Tensor:
        """(d_out, d_in) float32, the weight of a layer before the search."""
        return self._dense[name]

    def _order(self, candidate: Candidate) -> tuple[tuple[int, ...], ...]:
        return tuple(_key(candidate[spec.name]) for spec in self._specs)

    def _place(self, candidate: Candidate) -> int:
        """Put the candidate's layers into the model; the first block that changed, or the number of blocks."""
        first = len(self._runner.layers.blocks)
        for spec in self._specs:
            kept = candidate[spec.name]
            if self._placed.get(spec.name) != kept:
                self._runner.layers.place(spec.name, partial(self._weight, spec, kept))
                self._placed[spec.name] = kept
                first = min(first, spec.block)
        return first

    @torch.no_grad()
    def _states(self, chunk: int, known: Sequence[Tensor] = ()) -> list[Tensor]:
        """Hidden states before every block and after the last, from those of the first blocks that are `known`."""
        states = list(known) or [self._runner.first(chunk)]
        for block in range(len(states) - 1, len(self._runner.layers.blocks)):
            states.append(self._runner.run(block, chunk, states[-1]))
        return states

    @torch.no_grad()
    def _logits(self, chunk: int, hidden: Tensor) -> Tensor:
        return self._runner.logits(chunk, hidden)[:, :-1]


def _key(kept: Target | Mask) -> tuple[int, ...]:
    """An order of what a layer may keep in which equal ones are neighbours."""
    if isinstance(kept, Mask):
        return (id(kept),)
    return kept.rank, kept.nnz
