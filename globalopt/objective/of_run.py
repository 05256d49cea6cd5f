"""The objective of a run: candidates from its spans and fits, asked of the model, remembered in its journal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from torch import Tensor

from globalopt.models.walk import BlockRunner
from globalopt.objective.candidates import FittedLayer, span_weight
from globalopt.objective.journal import RecordedObjective, Selection
from globalopt.objective.kl_to_dense import LAZY_SHARE, Materialise, ModelObjective, TargetObjective
from globalopt.protocols import Candidate
from globalopt.runs.files import read_json, write_json
from globalopt.runs.folder import Run
from globalopt.values.budget import Target
from globalopt.values.layer import LayerSpec
from globalopt.values.problem import Problem
from globalopt.values.results import Search
from globalopt.values.span import Mask

CANDIDATES = ("auto", "fit", "span")

FITS_AT_ONCE = 2**31
"""Bytes of fits and spans each that are held in memory; the rest is read again when it is needed."""


class SearchObjective(RecordedObjective):
    """A `RecordedObjective` whose model is prepared when the first question comes that the journal cannot answer.

    Args:
        start: makes the runner on the selection text.
        candidates: "fit", "span", or "auto": fits where the analysis of the run made some.
    """

    def __init__(
        self,
        start: Callable[[], BlockRunner],
        selection: Selection,
        run: Run,
        problem: Problem,
        candidates: str,
        limit: int,
        advance: Callable[[str], None],
    ) -> None:
        specs = {spec.name: spec for spec in problem.specs}
        fitted = all(run.fits_path(spec).exists() for spec in problem.specs)
        self.candidates = "fit" if fitted and candidates != "span" else "span"
        self._start = start
        self._run = run
        self._problem = problem
        self._model: TargetObjective | None = None
        super().__init__(
            self._answer,
            lambda name: run.read_span(specs[name]),
            selection,
            problem,
            limit,
            run.study_path,
            advance,
        )

    def close(self) -> None:
        """Put the dense weights back into the model."""
        if self._model is not None:
            self._model.close()

    def facts(self, loss: float) -> Search:
        """What the search was and what it spent; `loss` is that of the chosen allocation."""
        teacher = read_json(self._run.teacher_path)
        return Search(
            self.tokens, self.limit, self.candidates, teacher["top"], teacher["tail"], loss, tuple(self.evaluations)
        )

    def _answer(self, candidates: Sequence[Candidate], chunks: Sequence[int]) -> Tensor:
        if self._model is None:
            model = ModelObjective(self._start())
            self._model = TargetObjective(model, self._materialise(model))
            write_json(self._run.teacher_path, {"top": model.top, "tail": model.tail})
        return self._model.losses(candidates, chunks)

    def _materialise(self, model: ModelObjective) -> Materialise:
        surfaces = {surface.spec.name: surface for surface in self._problem.surfaces}
        largest = max(spec.numel for spec in self._problem.specs)
        held = max(1, FITS_AT_ONCE // (16 * largest * (LAZY_SHARE if model.lazy else 1)))
        read_span = lru_cache(held)(self._run.read_span)

        @lru_cache(held)
        def fits(spec: LayerSpec) -> FittedLayer:
            return FittedLayer(surfaces[spec.name], *self._run.read_fits(spec), self._run.read_overlap(spec))

        def weight(spec: LayerSpec, kept: Target | Mask) -> Tensor:
            if self.candidates == "span" or isinstance(kept, Mask):
                return span_weight(read_span(spec), kept)
            return fits(spec).weight(model.dense(spec.name), kept)

        return weight
