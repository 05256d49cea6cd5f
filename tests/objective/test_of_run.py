"""The objective of an analysed model: one journal for all budgets, and a model that is prepared only when needed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from globalopt.analysis.grid import Options
from globalopt.analysis.spans import compute_span
from globalopt.errors import UsageError
from globalopt.models.batch import Batch
from globalopt.models.block_runner import BlockRunner
from globalopt.models.finding import find_layers
from globalopt.models.layers import ModelLayers
from globalopt.objective.candidates import AnchoredLayer, span_weight
from globalopt.objective.journal import Selection
from globalopt.objective.kl_to_dense import ModelObjective
from globalopt.objective.of_run import SearchObjective
from globalopt.values.budget import Budget, Target
from globalopt.values.problem import Problem
from globalopt.values.span import Mask
from globalopt.values.surface import ErrorSurface
from tests.tiny_models import tiny_ids, tiny_model

WINDOWS, TOKENS = 4, 10


def batches() -> list[Batch]:
    return [Batch(ids) for ids in tiny_ids(WINDOWS, TOKENS).split(2)]


def posed(layers: ModelLayers, kept: float) -> Problem:
    surfaces = []
    for spec in layers.specs:
        targets = Options.of(spec, spec.max_rank, None).targets
        surfaces.append(ErrorSurface(spec, targets, tuple(1 - t.params(spec) / spec.numel for t in targets)))
    spans = {spec.name: compute_span(layers.weight(spec.name), scaling="none") for spec in layers.specs}
    return Problem(tuple(surfaces), Budget.fraction(kept, layers.specs), spans=spans.__getitem__)


def fitted(surface: ErrorSurface, weight: Tensor) -> AnchoredLayer:
    """Residuals that drop a part of every entry of a weight of ones."""
    spec = surface.spec
    anchors = tuple(Target(0, spec.numel * step // 4) for step in (1, 2, 3))
    residuals = torch.stack([torch.full((spec.d_out, spec.d_in), 0.1 * (3 - i)) for i in range(3)])
    return AnchoredLayer(surface, (anchors,), residuals, torch.ones(3, 3, dtype=torch.float64))


class Prepared:
    """Makes runners, and counts them."""

    def __init__(self, layers: ModelLayers) -> None:
        self.layers = layers
        self.count = 0

    def __call__(self) -> BlockRunner:
        self.count += 1
        return BlockRunner(self.layers, batches())


@pytest.fixture
def layers() -> ModelLayers:
    return find_layers(tiny_model("llama"), allow_low_coverage=True)


def objective(start, problem: Problem, folder: Path, fits=None) -> SearchObjective:
    selection = Selection((2, 2), TOKENS)
    return SearchObjective(start, selection, problem, fits, 10**6, folder / "study.log", folder / "teacher.json")


def half(problem: Problem) -> dict[str, Target]:
    return {spec.name: Target(0, spec.numel // 2) for spec in problem.specs}


@pytest.mark.parametrize("fits", [None, fitted])
def test_losses_are_those_of_the_candidates(layers, tmp_path, fits):
    problem = posed(layers, 0.5)
    found = objective(Prepared(layers), problem, tmp_path, fits)
    losses = found.losses([half(problem)], [0, 1])
    found.close()
    surfaces = {surface.spec.name: surface for surface in problem.surfaces}
    weights = {
        name: span_weight(problem.span(name), target)
        if fits is None
        else fitted(surfaces[name], layers.weight(name)).weight(layers.weight(name), target)
        for name, target in half(problem).items()
    }
    model = ModelObjective(BlockRunner(layers, batches()))
    assert torch.equal(losses, model.losses_of([weights], [0, 1]))
    assert found.candidates == ("span" if fits is None else "anchors")
    assert found.search_record(0.5).top == model.top


def test_masks_are_cut_from_the_span_whatever_the_candidates(layers, tmp_path):
    problem = posed(layers, 0.5)
    spans = {spec.name: problem.span(spec.name) for spec in problem.specs}
    whole = {
        n: Mask(torch.ones(len(s.s), dtype=torch.bool), torch.ones_like(s.S, dtype=torch.bool))
        for n, s in spans.items()
    }
    found = objective(Prepared(layers), problem, tmp_path, fitted)
    assert float(found.losses([whole], [0]).abs().max()) < 1e-5


def test_spans_are_those_of_the_dense_weights_while_the_model_holds_candidates(layers, tmp_path):
    problem = posed(layers, 0.5)
    spans = {spec.name: problem.span(spec.name) for spec in problem.specs}
    reading = replace(problem, spans=lambda name: spans[name].basis.span(layers.weight(name)))
    files = (tmp_path / "study.log", tmp_path / "teacher.json")
    start, selection = Prepared(layers), Selection((2, 2), TOKENS)
    found = SearchObjective(
        start, selection, reading, None, 10**6, *files, split=lambda name, weight: spans[name].basis.span(weight)
    )
    assert start.count == 0
    zero = {spec.name: Target.zero() for spec in problem.specs}
    losses = [found.losses([candidate], [0]) for candidate in (half(problem), zero, half(problem))]
    name = problem.specs[0].name
    assert not torch.equal(reading.span(name).S, spans[name].S)
    assert torch.equal(found.span(name).S, spans[name].S)
    assert torch.equal(losses[0], losses[2])


@pytest.mark.parametrize("fits", [None, fitted])
def test_the_weights_of_a_candidate_are_those_whose_loss_is_measured(layers, tmp_path, fits):
    problem = posed(layers, 0.5)
    found = objective(Prepared(layers), problem, tmp_path, fits)
    losses = found.losses([half(problem)], [0, 1])
    model, weights = found.weights(half(problem))
    assert list(weights) == [spec.name for spec in problem.specs]
    assert torch.allclose(model.losses_of([weights], [0, 1]), losses, rtol=1e-4, atol=1e-8)
    # One layer by itself; asking for weights spends no tokens.
    name = problem.specs[0].name
    alone = model.losses_of([{name: weights[name]}], [0, 1])
    assert float(alone.mean()) < float(losses.mean())
    assert found.tokens == WINDOWS * TOKENS
    found.close()


def test_another_budget_is_answered_by_the_same_journal(layers, tmp_path):
    first, second = posed(layers, 0.5), posed(layers, 0.3)
    start = Prepared(layers)
    losses = objective(start, first, tmp_path).losses([half(first)], [0, 1])
    assert start.count == 1
    again = objective(start, second, tmp_path)
    assert torch.equal(again.losses([half(first)], [0, 1]), losses)
    assert again.search_record(0.5).tokens == WINDOWS * TOKENS
    assert start.count == 1
    # Candidates of another kind are others, although their targets are the same.
    objective(start, second, tmp_path, fitted).losses([half(first)], [0, 1])
    assert start.count == 2


def test_the_metadata_of_the_predictions_are_made_again_where_they_are_lost(layers, tmp_path):
    problem = posed(layers, 0.5)
    objective(Prepared(layers), problem, tmp_path).losses([half(problem)], [0])
    (tmp_path / "teacher.json").unlink()
    start = Prepared(layers)
    again = objective(start, problem, tmp_path)
    again.losses([half(problem)], [0])
    assert start.count == 0
    assert again.search_record(0.5).top > 0
    assert start.count == 1


def test_without_spans_there_are_no_candidates_of_them(layers, tmp_path):
    problem = replace(posed(layers, 0.5), spans=None)
    with pytest.raises(UsageError, match="spans"):
        objective(Prepared(layers), problem, tmp_path).losses([half(problem)], [0])
