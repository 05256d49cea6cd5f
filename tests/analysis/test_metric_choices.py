"""Error metrics of layers: one whose output Gram misleads is found by its share, and nothing else is solved again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from globalopt.analysis.collect import write_grams, write_output_grams
from globalopt.analysis.layer_analysis import LayerAnalysis
from globalopt.analysis.metric_choices import CONTRADICTED, KEPT, choose_metrics, probed_target
from globalopt.models.batch import Batch
from globalopt.models.block_runner import BlockRunner
from globalopt.models.finding import find_layers
from globalopt.models.layers import ModelLayers
from globalopt.objective.kl_to_dense import ModelObjective
from globalopt.runs.artefacts import METRIC_CHOICE, OUTPUT_GRAM
from globalopt.runs.records import AnchorSolutions, MetricChoice
from globalopt.runs.workspace import Workspace
from globalopt.values.budget import Limits, Target
from globalopt.values.decomposition import Decomposition, Solution
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.metric import Gram, Metric
from solvers import get_solver
from tests.objective.test_kl_to_dense import kl
from tests.tiny_models import tiny_ids, tiny_model

IDS = tiny_ids(4, 12)

ROWS = ((0.1, 0.3, 0.6), (0.2, 0.5))
"""Kept fractions of the solutions, in rows as those of anchors; the second row is never looked at."""


def targets_of(spec: LayerSpec) -> tuple[tuple[Target, ...], ...]:
    first, second = ROWS
    return (
        tuple(Target(0, int(kept * spec.numel)) for kept in first),
        tuple(Target(1, int(kept * spec.numel)) for kept in second),
    )


@dataclass(frozen=True)
class Stub:
    """A probe solver that changes a weight by a part of itself, and remembers what it was asked."""

    size: float
    asked: list[tuple[Tensor, Metric, tuple[Target, ...]]] = field(default_factory=list)

    def prepare(self, weight: Tensor, metric: Metric) -> tuple[Tensor, Metric]:
        return weight, metric

    def solve_path(self, state: tuple[Tensor, Metric], targets: Sequence[Target]) -> list[Solution]:
        weight, metric = state
        self.asked.append((weight, metric, tuple(targets)))
        return [Solution(value_of(weight * (1 - self.size)), 0.0) for _ in targets]


def value_of(weight: Tensor) -> Decomposition:
    return Decomposition(weight, weight.new_zeros(len(weight), 0), weight.new_zeros(0, weight.shape[1]))


def loss(layers: ModelLayers, weights: Mapping[str, Tensor]) -> float:
    """KL of the model with these layers replaced, measured on the whole model."""
    with torch.no_grad():
        dense = layers.model(input_ids=IDS).logits[:, :-1]
        before = {name: layers.weight(name) for name in weights}
        for name, weight in weights.items():
            layers.set_weight(name, weight)
        found = layers.model(input_ids=IDS).logits[:, :-1]
        for name, weight in before.items():
            layers.set_weight(name, weight)
    return float(kl(dense, found).mean())


class Case:
    """A model whose output Grams predict the loss of every layer's solutions, but for those that are made to mislead.

    Args:
        misled: by layer number, how many times too low the output Gram says that the losses are.
        sizes: by layer number, how much of its weight the solutions change, where it is not a hundredth.
    """

    def __init__(self, folder, misled: Mapping[int, float], sizes: Mapping[int, float] = {}) -> None:
        self.layers = find_layers(tiny_model("llama"), allow_low_coverage=True)
        self.specs = self.layers.specs
        self.runner = BlockRunner(self.layers, [Batch(ids) for ids in IDS.split(2)])
        self.work = Workspace(folder)
        self.analysis = LayerAnalysis(self.layers, self.work, weighted=True)
        write_grams(self.runner, self.work)
        self.changed = {}
        for i, spec in enumerate(self.specs):
            weight, size = self.layers.weight(spec.name), sizes.get(i, 0.01)
            generator = torch.Generator().manual_seed(i)
            noise = torch.randn(weight.shape, generator=generator)
            self.changed[spec] = weight - size * noise * weight.norm() / noise.norm()
            alone = loss(self.layers, {spec.name: self.changed[spec]})
            identity = Gram(torch.eye(spec.d_out), 1)
            unscaled = Metric(self.analysis.plain_metric(spec).inputs, identity).error(weight - self.changed[spec])
            scale = 2 * alone / unscaled / misled.get(i, 1.0)
            self.work.put(OUTPUT_GRAM, spec, Gram(scale * torch.eye(spec.d_out), 1))
        self.read: list[LayerSpec] = []

    def solutions(self, spec: LayerSpec) -> AnchorSolutions:
        self.read.append(spec)
        rows = targets_of(spec)
        return AnchorSolutions(rows, (value_of(self.changed[spec]),) * sum(map(len, rows)))

    def choose(self, probe: Any, each: Callable[[], None] = lambda: None) -> dict[LayerSpec, MetricChoice]:
        self.model = ModelObjective(self.runner)
        self.groups: list[Sequence[Mapping[str, Any]]] = []
        losses_of = self.model.losses_of

        def counting(replacements, chunks):
            self.groups.append(replacements)
            return losses_of(replacements, chunks)

        self.model.losses_of = counting
        found = {}
        for spec, choice in choose_metrics(self.analysis, self.model, self.specs, self.solutions, probe):
            each()
            found[spec] = choice
        return found


def test_where_losses_are_as_predicted_nothing_is_solved(tmp_path):
    case, probe = Case(tmp_path, {}), Stub(0.01)
    found = case.choose(probe)
    assert list(found) == list(case.specs)
    assert set(found.values()) == {MetricChoice()}
    assert probe.asked == []


@pytest.mark.parametrize(("size", "uses"), [(0.01, False), (0.5, True)], ids=["plain is better", "plain is worse"])
def test_the_layer_that_is_misled_is_found_and_solved_without_its_output_gram(tmp_path, size, uses):
    number = 3
    case, probe = Case(tmp_path, {number: 100.0}, {number: 0.1}), Stub(size)
    found = case.choose(probe)
    blind = case.specs[number]
    assert [spec for spec, choice in found.items() if choice.checked] == [blind]
    # One layer is solved, by its input Gram alone, at the targets that were checked.
    ((weight, metric, targets),) = probe.asked
    assert torch.equal(weight, case.layers.weight(blind.name))
    assert metric.outputs is None
    assert targets == targets_of(blind)[0][:2]
    choice = found[blind]
    assert choice.uses_output_gram is uses
    assert tuple(checked.target for checked in choice.checked) == targets
    weighted = loss(case.layers, {blind.name: case.changed[blind]})
    plain = loss(case.layers, {blind.name: weight * (1 - size)})
    for checked in choice.checked:
        assert checked.predicted == pytest.approx(weighted / 100, rel=1e-3)
        assert checked.weighted == pytest.approx(weighted, rel=1e-2)
        assert checked.plain == pytest.approx(plain, rel=1e-2)
    assert choice.losses == pytest.approx(dict.fromkeys(targets, weighted if uses else plain), rel=1e-2)
    # It is replaced alone, and hardly any other.
    names = [sorted(group) for groups in case.groups for group in groups]
    assert all(len(group) == 1 for group in names)
    assert [blind.name] in names
    assert len({name for group in names for name in group}) <= len(case.specs) // 2


def test_where_all_layers_lose_more_than_predicted_none_is_doubted(tmp_path):
    case, probe = Case(tmp_path, dict.fromkeys(range(14), 0.9 * CONTRADICTED)), Stub(0.01)
    assert set(case.choose(probe).values()) == {MetricChoice()}
    # Predictions that are too low everywhere are nothing that one layer's metric is to blame for.
    other = Case(tmp_path / "low", dict.fromkeys(range(14), 10.0))
    assert set(other.choose(probe).values()) == {MetricChoice()}
    assert probe.asked == []


def test_the_model_is_dense_at_every_choice_and_solutions_are_read_when_they_are_needed(tmp_path):
    case = Case(tmp_path, {3: 100.0}, {3: 0.1})
    dense = {spec.name: case.layers.weight(spec.name) for spec in case.specs}
    seen = []

    def each() -> None:
        assert all(torch.equal(case.layers.weight(name), weight) for name, weight in dense.items())
        seen.append(1)

    case.choose(Stub(0.01), each)
    assert len(seen) == len(case.specs)


@pytest.mark.parametrize("pattern", [None, NM(2, 4)], ids=str)
def test_with_a_solver_the_layer_whose_output_gram_is_blind_gets_the_plain_metric(tmp_path, pattern):
    layers = find_layers(tiny_model("llama"), allow_low_coverage=True)
    runner, work = BlockRunner(layers, [Batch(IDS)]), Workspace(tmp_path)
    write_output_grams(runner, work, layers.specs, seed=1)
    blind = layers.specs[4]
    A = torch.full((blind.d_out,), 1e-9)
    A[0] = 1e-3
    work.put(OUTPUT_GRAM, blind, Gram(torch.diag(A), 48))
    analysis, solver = LayerAnalysis(layers, work, pattern, weighted=True), get_solver("3basil", {"steps": "10"})

    def solutions(spec: LayerSpec) -> AnchorSolutions:
        target, weight = probed_target(spec, pattern), layers.weight(spec.name)
        if spec != blind:
            return AnchorSolutions(((target,),), (value_of(1.01 * weight),))
        state = solver.prepare(weight, analysis.loss_metric(spec))
        return AnchorSolutions(((target,),), (solver.solve(state, target).value,))

    found = dict(choose_metrics(analysis, ModelObjective(runner), layers.specs, solutions, solver))
    choice = found[blind]
    assert not choice.uses_output_gram
    (checked,) = choice.checked
    target = probed_target(blind, pattern)
    weight = layers.weight(blind.name)
    metrics = (analysis.loss_metric(blind), analysis.plain_metric(blind))
    for measured, metric in zip((checked.weighted, checked.plain), metrics, strict=True):
        solved = solver.solve(solver.prepare(weight, metric), target).value.dense()
        assert measured == pytest.approx(loss(layers, {blind.name: solved}), rel=1e-2, abs=1e-6)
    work.put(METRIC_CHOICE, blind, choice)
    assert analysis.plain(blind)


def test_what_is_probed_without_anchors_can_be_served():
    spec = LayerSpec("up", 0, "in", "up", 16, 32)
    assert probed_target(spec) == Target(0, int(KEPT * 512))
    assert probed_target(spec, NM(2, 4)) == Target(0, 256, NM(2, 4))
    factors = probed_target(spec, None, Limits(sparse=False))
    assert (factors.rank, factors.nnz) == (2, 0)
    assert probed_target(LayerSpec("up", 0, "in", "up", 2, 2), None, Limits(sparse=False)).rank == 1
