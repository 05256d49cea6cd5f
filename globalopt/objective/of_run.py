"""The objective of an analysed model: candidates made from its spans or anchor solutions, and a journal of losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from globalopt.machine import ranks
from globalopt.machine.team import Team
from globalopt.models.block_runner import BlockRunner
from globalopt.objective.candidates import AnchoredLayer, span_weight
from globalopt.objective.journal import RecordedObjective, Selection
from globalopt.objective.kl_to_dense import LAZY_SHARE, Materialise, ModelObjective, TargetObjective, Weight
from globalopt.protocols import Candidate
from globalopt.runs.files import read_json, write_json
from globalopt.values.budget import Target
from globalopt.values.layer import LayerSpec
from globalopt.values.problem import Problem
from globalopt.values.search_record import Search
from globalopt.values.span import Mask, Span
from globalopt.values.surface import ErrorSurface

CANDIDATES = ("auto", "anchors", "span")

ANCHORS_AT_ONCE = 2**31
"""Bytes of anchor solutions and spans each that are held in memory; the rest is read again when it is needed."""


class SearchObjective(RecordedObjective):
    """Evaluate candidates made from anchor solutions or spans, on a model that is prepared when it is first needed.

    A search that is answered by its journal alone never touches the model. With several processes the writer searches,
    within `team.run`; the others compute what it asks for.

    Args:
        start: makes the runner on the selection text.
        selection: the sizes of its chunks.
        problem: its spans make the candidates where there are no anchor solutions, and those of masks.
        fitted: makes the candidates of a layer from its surface, its dense weight and its anchor solutions; None where
            candidates are cut from the spans.
        limit: tokens a search may spend.
        journal: file of the journal; None keeps the losses in memory.
        teacher: file in which the metadata of the dense model's predictions are kept beside the journal, or None.
        advance: called with a detail for every candidate and chunk whose tokens are counted.
        beside: problem whose predictions are recorded beside the evaluations; None is `problem`.
        split: makes the span of a layer from its dense weight, where the spans of the problem read the model, which may
            hold candidates; None where they do not.
        rough: as in `ModelObjective`.

    >>> import torch
    >>> from globalopt.analysis.spans import compute_span
    >>> from globalopt.models.batch import Batch
    >>> from globalopt.models.finding import find_layers
    >>> from globalopt.reference.tiny import tiny_llama
    >>> from globalopt.values.budget import Budget
    >>> layers = find_layers(tiny_llama(), allow_low_coverage=True)
    >>> surfaces = [ErrorSurface(s, (Target.zero(), Target.dense(s)), (1.0, 0.0)) for s in layers.specs]
    >>> spans = {spec.name: compute_span(layers.weight(spec.name), scaling="none") for spec in layers.specs}
    >>> budget = Budget.fraction(0.5, layers.specs)
    >>> problem = Problem(tuple(surfaces), budget, spans=spans.__getitem__)
    >>> objective = SearchObjective(
    ...     start=lambda: BlockRunner(layers, [Batch(torch.arange(48).reshape(3, 16))]),
    ...     selection=Selection((3,), 16),
    ...     problem=problem,
    ...     fitted=None,
    ...     limit=1000,
    ...     journal=None,
    ...     teacher=Path("teacher.json"),
    ... )
    >>> candidate = {spec.name: Target(0, spec.numel // 2) for spec in layers.specs}
    >>> losses = objective.losses([candidate], chunks=[0])
    >>> losses.shape, objective.tokens, objective.candidates
    (torch.Size([1, 3]), 48, 'span')
    >>> objective.search_record(loss=float(losses.mean())).tokens
    48
    >>> objective.close()
    """

    def __init__(
        self,
        start: Callable[[], BlockRunner],
        selection: Selection,
        problem: Problem,
        fitted: Callable[[ErrorSurface, Tensor], AnchoredLayer] | None,
        limit: int,
        journal: Path | None,
        teacher: Path | None,
        advance: Callable[[str], None] = lambda detail: None,
        beside: Problem | None = None,
        split: Callable[[str, Tensor], Span] | None = None,
        rough: bool = False,
    ) -> None:
        self.candidates = "span" if fitted is None else "anchors"
        self._start = start
        self._teacher = teacher
        self._surfaces = {surface.spec.name: surface for surface in problem.surfaces}
        self._fitted = fitted
        self._span = problem.span
        self._split = split
        self._rough = rough
        self._dense: Callable[[str], Tensor] | None = None
        self._model: TargetObjective | None = None
        self.team = Team({"losses": self._losses, "predictions": self._predictions})
        super().__init__(
            lambda candidates, chunks: self.team.ask("losses", candidates, chunks),
            selection,
            beside or problem,
            limit,
            journal if ranks.writer() else None,
            advance,
            self.candidates,
        )

    def close(self) -> None:
        """Put the dense weights back into the model."""
        if self._model is not None:
            self._model.close()

    def span(self, name: str) -> Span:
        """Read the span of a layer, whatever the model holds now."""
        if self._split is None or self._dense is None:
            return self._span(name)
        return self._split(name, self._dense(name))

    def search_record(self, loss: float) -> Search:
        """Return the metadata of the search and the tokens it spent; `loss` is that of the chosen allocation."""
        if self._teacher is not None and self._teacher.exists():
            teacher = read_json(self._teacher)
            top, tail = teacher["top"], teacher["tail"]
        else:
            top, tail = self.team.ask("predictions")
        return Search(self.tokens, self.limit, self.candidates, top, tail, loss, tuple(self.evaluations))

    def weights(self, candidate: Candidate) -> tuple[ModelObjective, dict[str, Weight]]:
        """Return the model, and the weights of a candidate by layer name, for an attribution of its loss."""
        prepared = self._prepared()
        return prepared.model, prepared.weights(candidate)

    def _losses(self, candidates: Sequence[Candidate], chunks: Sequence[int]) -> Tensor:
        return self._prepared().losses(candidates, chunks)

    def _predictions(self) -> tuple[int, float]:
        """Return how many tokens of the dense model's predictions are kept, and the mean probability of the others."""
        model = self._prepared().model
        return model.top, model.tail

    def _prepared(self) -> TargetObjective:
        if self._model is None:
            model = ModelObjective(self._start(), rough=self._rough)
            self._dense = model.dense
            self._model = TargetObjective(model, self._materialise(model))
            if self._teacher is not None and ranks.writer():
                write_json(self._teacher, {"top": model.top, "tail": model.tail})
        return self._model

    def _materialise(self, model: ModelObjective) -> Materialise:
        largest = max(spec.numel for spec in model.specs)
        held = max(1, ANCHORS_AT_ONCE // (16 * largest * (LAZY_SHARE if model.lazy else 1)))
        read_span = lru_cache(held)(self.span)
        if self._fitted is None:
            return lambda spec, kept: span_weight(read_span(spec.name), kept)
        fitted, surfaces = self._fitted, self._surfaces

        @lru_cache(held)
        def layer(name: str) -> AnchoredLayer:
            return fitted(surfaces[name], model.dense(name))

        def weight(spec: LayerSpec, kept: Target | Mask) -> Tensor:
            if isinstance(kept, Mask):
                return span_weight(read_span(spec.name), kept)
            return layer(spec.name).weight(model.dense(spec.name), kept)

        return weight
