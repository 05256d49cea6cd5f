"""Corrections of predicted losses: how far a share moves a layer, what is kept of the rounds, and cliffs."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from allocators import Knapsack
from globalopt.analysis.corrections import ALONE, CLIFF, GAIN, ROUNDS, correct, log_ratios
from globalopt.values.attribution import Attribution
from globalopt.values.budget import Budget, Target
from globalopt.values.corrections import NEARBY, NO_CORRECTIONS, Corrections
from globalopt.values.layer import LayerSpec
from globalopt.values.problem import Allocation, Problem
from globalopt.values.surface import ErrorSurface
from tests.command import assert_alike
from tests.surfaces import problem

WINDOWS = 6

Targets = Mapping[str, Target]


def allocate(posed: Problem) -> Allocation:
    return Knapsack(exact=False).allocate(posed)


class Model:
    """Losses of a model that is not there: of every layer its prediction times a factor, of windows that differ.

    Args:
        factors: of the layers; 1 for those that are not named.
        spread: of the losses of windows about their mean.
        cliff: a layer and a fraction kept below which it ruins the model; then shares say nothing.
    """

    def __init__(
        self, posed: Problem, factors: Mapping[str, float], spread: float = 0.0, cliff: tuple[str, float] | None = None
    ) -> None:
        self.surfaces = {surface.spec.name: surface for surface in posed.surfaces}
        self.factors, self.cliff = factors, cliff
        generator = torch.Generator().manual_seed(5)
        drawn = torch.randn(WINDOWS, generator=generator, dtype=torch.float64) * spread
        self.scales = drawn.exp() / drawn.exp().mean()
        self.asked: list[Targets] = []
        self.apart: list[Targets] = []

    def loss_of(self, name: str, target: Target) -> float:
        found = self.factors.get(name, 1.0) * self.surfaces[name].predict(target)
        return found * 1000 if self._fallen({name: target}) else found

    def attribute(self, targets: Targets) -> Attribution:
        self.asked.append(dict(targets))
        shares = {name: self.loss_of(name, target) * self.scales for name, target in targets.items()}
        if self._fallen(targets):
            # The shares of a ruined model: the culprit's is the largest, the others are of any size.
            chance = random.Random(len(self.asked))
            ruin = max(float(share.mean()) for share in shares.values())
            shares = {n: s if self._fallen({n: targets[n]}) else s * 0 + ruin * chance.uniform(-0.5, 0.5)
                      for n, s in shares.items()}  # fmt: skip
            return Attribution(ruin * self.scales, shares)
        return Attribution(torch.stack(list(shares.values())).sum(0), shares)

    def alone(self, targets: Targets) -> dict[str, float]:
        self.apart.append(dict(targets))
        return {name: self.loss_of(name, target) for name, target in targets.items()}

    def true(self, targets: Targets) -> float:
        return sum(self.loss_of(name, target) for name, target in targets.items())

    def _fallen(self, targets: Targets) -> bool:
        if self.cliff is None or self.cliff[0] not in targets:
            return False
        spec = self.surfaces[self.cliff[0]].spec
        return targets[self.cliff[0]].params(spec) < self.cliff[1] * spec.numel


def factors_of(posed: Problem, seed: int, bend: float = 1.0) -> dict[str, float]:
    chance = random.Random(seed)
    return {spec.name: math.exp(bend * chance.gauss(0, 1)) for spec in posed.specs}


def rounds_of(posed: Problem, model: Model, **options) -> list[Corrections]:
    return list(correct(posed, allocate, model.attribute, model.alone, **options))


# ------------------------------------------------------------------------------------------------- rounds


@pytest.mark.parametrize("seed", range(4))
def test_a_model_that_follows_its_predictions_but_for_factors_is_found(seed):
    posed = problem(0.4, seed=seed, layers=8)
    factors = factors_of(posed, seed)
    model = Model(posed, factors)
    *_, found = rounds_of(posed, model)
    before, after = allocate(posed).targets, allocate(found.apply(posed)).targets
    best = allocate(posed.scaled(factors)).targets
    gained = model.true(before) - model.true(after)
    assert gained >= 0.75 * (model.true(before) - model.true(best))
    # What is predicted then is what is measured.
    corrected = found.apply(posed)
    usual = [factors[name] for name in after if after[name] != Target.dense(model.surfaces[name].spec)]
    assert corrected.predicted(after) == pytest.approx(model.true(after), rel=0.35)
    assert max(usual) / min(usual) > 2
    assert not model.apart


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("chaos", [False, True], ids=["noisy", "without order"])
def test_the_best_allocation_that_was_measured_is_kept(seed, chaos):
    posed = problem(0.3, seed=seed, layers=8)
    model = Model(posed, factors_of(posed, seed, 1.5), spread=0.5)
    measured: list[float] = []

    def attribute(targets: Targets) -> Attribution:
        found = model.attribute(targets)
        if chaos:
            # A loss that has nothing to do with the shares: at times it goes up, at times down.
            scale = random.Random(repr(sorted(targets.items()))).uniform(0.5, 2.5)
            found = Attribution(found.losses * scale, found.shares)
        measured.append(float(found.losses.mean()))
        return found

    yielded = list(correct(posed, allocate, attribute, model.alone))
    assert len(yielded) == len(measured) == len(model.asked) <= ROUNDS
    for turn, found in enumerate(yielded):
        assert list(found.losses) == measured[: turn + 1]
        # The corrections lead to the allocation of the least loss so far, the first of equal ones.
        least = measured.index(min(found.losses))
        assert allocate(found.apply(posed)).targets == model.asked[least]
    best = [min(found.losses) for found in yielded]
    assert best == sorted(best, reverse=True)
    assert model.asked[0] == allocate(posed).targets


def test_no_further_round_is_made_when_nothing_is_gained():
    posed = problem(0.4, layers=8)
    asked = rounds_of(posed, Model(posed, {}))
    # As predicted: the second round finds the same.
    assert len(asked) == 2
    assert asked[-1].losses[1] == pytest.approx(asked[-1].losses[0])
    many = rounds_of(posed, Model(posed, factors_of(posed, 3)))
    gains = [1 - b / a for a, b in zip(many[-1].losses, many[-1].losses[1:], strict=False)]
    assert all(gain > GAIN for gain in gains[:-1])


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_no_more_rounds_than_asked_for(rounds):
    posed = problem(0.3, layers=8)
    model = Model(posed, factors_of(posed, 1, 2.0))
    found = rounds_of(posed, model, rounds=rounds)
    assert len(found) == len(model.asked) <= rounds
    if rounds == 1:
        # Measured, and nothing is learned of it that could be kept without measuring again.
        assert found[-1].points == {}
        assert len(found[-1].losses) == 1


def test_it_is_the_same_every_time():
    posed = problem(0.3, layers=8)
    one, other = (rounds_of(posed, Model(posed, factors_of(posed, 1, 2.0), spread=0.3))[-1] for _ in range(2))
    assert_alike(dict(one.points), dict(other.points))
    assert_alike(one.losses, other.losses)


def test_a_second_budget_begins_from_the_corrections_of_the_first():
    high, low = problem(0.6, layers=8), problem(0.3, layers=8)
    factors = factors_of(high, 2, 1.5)
    *_, first = rounds_of(high, Model(high, factors))
    assert first.points
    model = Model(low, factors)
    *_, second = rounds_of(low, model, known=first)
    assert model.asked[0] == allocate(first.apply(low)).targets
    assert model.asked[0] != allocate(low).targets
    # Losses are those of the second budget alone; what the first found elsewhere in a layer is still there.
    assert len(second.losses) == len(model.asked)
    tried = [dict(targets) for targets in model.asked[:-1]]
    for spec in low.specs:
        seen = [targets[spec.name].params(spec) / spec.numel for targets in tried]
        far = [point for point in first.points[spec.name] if all(abs(point[0] - kept) > NEARBY for kept in seen)]
        assert set(far) <= set(second.points[spec.name])
    *_, afresh = rounds_of(low, Model(low, factors))
    assert min(second.losses) <= 1.05 * min(afresh.losses)


# ------------------------------------------------------------------------------------------------- cliffs


def cliff_case() -> tuple[Problem, str, float]:
    """A problem, a layer, and a fraction kept a little above what it is first given."""
    posed = problem(0.3, layers=12)
    targets = allocate(posed).targets
    kept = {spec.name: targets[spec.name].params(spec) / spec.numel for spec in posed.specs}
    name = min((name for name in kept if kept[name] > 0.05), key=kept.__getitem__)
    return posed, name, kept[name] + 0.05


def test_a_step_off_a_cliff_is_taken_back_by_the_layer_that_fell_alone():
    posed, name, edge = cliff_case()
    model = Model(posed, {}, cliff=(name, edge))
    yielded = rounds_of(posed, model)
    assert model._fallen(model.asked[0])
    # The few layers of the largest shares are replaced alone, the one that fell among them, at their own targets.
    (apart,) = model.apart[:1]
    assert name in apart
    assert len(apart) <= ALONE < len(posed.specs)
    assert all(model.asked[0][one] == target for one, target in apart.items())
    # Nothing is said of the others by a model in ruins.
    second = yielded[1]
    assert not model._fallen(model.asked[1])
    assert set(second.points) == set(apart)
    *_, found = yielded
    assert found.losses[0] > 10 * min(found.losses)
    targets = allocate(found.apply(posed)).targets
    assert not model._fallen(targets)
    assert found.points[name][0][1] > 3
    # The neighbours that were measured too are as predicted.
    ratios = [log for one, points in second.points.items() if one != name for _, log in points]
    assert all(abs(ratio) < 0.1 for ratio in ratios)


def test_in_the_last_round_nothing_is_measured_that_is_not_used():
    posed, name, edge = cliff_case()
    model = Model(posed, {}, cliff=(name, edge))
    assert len(rounds_of(posed, model, rounds=1)) == 1
    assert not model.apart


def test_a_cliff_does_not_end_the_rounds_and_is_told_by_the_least_loss_so_far():
    posed = problem(0.3, layers=12)
    model = Model(posed, {})
    first = allocate(posed).targets
    turns = iter((1.0, CLIFF * 1.1, 0.5, 0.5, 0.5, 0.5))

    def attribute(targets: Targets) -> Attribution:
        found, scale = model.attribute(targets), next(turns)
        return Attribution(torch.full((WINDOWS,), scale * posed.predicted(first), dtype=torch.float64), found.shares)

    yielded = list(correct(posed, allocate, attribute, model.alone))
    assert len(yielded) == 4
    assert len(model.apart) == 1
    assert model.apart[0].items() <= model.asked[1].items()


# ------------------------------------------------------------------------------------------------- log ratios


def shares_of(posed: Problem, targets: Targets, factors: Mapping[str, float], noise: Tensor) -> dict[str, Tensor]:
    return {
        s.spec.name: factors.get(s.spec.name, 1.0) * s.predict(targets[s.spec.name]) * (1 + noise)
        for s in posed.surfaces
    }


@pytest.fixture
def half() -> tuple[Problem, dict[str, Target]]:
    posed = problem(0.5, layers=9)
    return posed, {spec.name: Target(0, spec.numel // 2) for spec in posed.specs}


STILL = torch.zeros(WINDOWS, dtype=torch.float64)
NOISY = torch.tensor([3.0, -3.0, 2.0, -2.0, 1.0, -1.0], dtype=torch.float64)


def test_all_layers_off_by_one_factor_are_off_by_it_exactly(half):
    posed, targets = half
    for factor in (0.01, 1.0, 7.0):
        ratios, usual = log_ratios(posed, targets, shares_of(posed, targets, dict.fromkeys(targets, factor), STILL))
        assert usual == pytest.approx(math.log(factor))
        assert list(ratios.values()) == pytest.approx([math.log(factor)] * len(targets), abs=0.01)


@pytest.mark.parametrize("factor", [0.1, 0.5, 1.5, 3.0, 100.0])
def test_a_layer_that_is_far_off_is_hardly_held_back_and_noise_stays_with_the_others(half, factor):
    posed, targets = half
    first = posed.specs[0].name
    certain, usual = log_ratios(posed, targets, shares_of(posed, targets, {first: factor}, STILL))
    noisy, _ = log_ratios(posed, targets, shares_of(posed, targets, {first: factor}, NOISY))
    assert usual == pytest.approx(0.0, abs=1e-9)
    assert certain[first] == pytest.approx(math.log(factor), abs=0.05)
    # Between the others and what the windows say, and nearer to the others the less these agree.
    low, high = sorted((0.0, math.log(factor)))
    assert low - 0.01 <= noisy[first] <= high + 0.01
    assert abs(noisy[first]) < abs(certain[first]) - 0.01
    assert all(ratio == pytest.approx(0.0, abs=0.01) for name, ratio in certain.items() if name != first)


def test_ratios_ascend_with_shares_and_follow_the_scale_of_all(half):
    posed, targets = half
    factors = {spec.name: math.exp(0.4 * (i - 4)) for i, spec in enumerate(posed.specs)}
    ratios, usual = log_ratios(posed, targets, shares_of(posed, targets, factors, 0.2 * NOISY))
    assert list(ratios.values()) == sorted(ratios.values())
    doubled = {name: 2 * factor for name, factor in factors.items()}
    others, twice = log_ratios(posed, targets, shares_of(posed, targets, doubled, 0.2 * NOISY))
    assert twice - usual == pytest.approx(math.log(2))
    for name, ratio in ratios.items():
        assert others[name] - ratio == pytest.approx(math.log(2), abs=0.011)


def test_it_is_the_mode_of_the_posterior(half):
    """Against the formula, on a grid of its own."""
    posed, targets = half
    factors = {spec.name: math.exp(0.5 * (i - 4)) for i, spec in enumerate(posed.specs)}
    shares = shares_of(posed, targets, factors, 0.4 * NOISY)
    ratios, usual = log_ratios(posed, targets, shares)
    levels = torch.linspace(-5, 9, 14001, dtype=torch.float64)
    means = [shares[s.spec.name] / s.predict(targets[s.spec.name]) for s in posed.surfaces]
    typical = float(torch.stack([one.std() for one in means]).median()) / WINDOWS**0.5
    for surface in posed.surfaces:
        name = surface.spec.name
        one = shares[name] / surface.predict(targets[name])
        spread, mean = float(one.std()) / WINDOWS**0.5, float(one.mean())
        # Noise in proportion to the level, and at least what is usual of all layers.
        error = (max(0.05, spread / mean) * levels.exp()).clamp_min(min(spread, typical))
        student = torch.distributions.StudentT(3.0, usual, 0.5).log_prob(levels)
        normal = torch.distributions.Normal(levels.exp(), error).log_prob(one.mean())
        assert ratios[name] == pytest.approx(float(levels[(student + normal).argmax()]), abs=0.01)


def test_negative_shares_and_layers_that_lose_nothing_have_ratios_too(half):
    posed, targets = half
    first, second = (spec.name for spec in posed.specs[:2])
    targets = {**targets, second: Target.dense(posed.specs[1])}
    shares = shares_of(posed, targets, {first: -1.0}, STILL)
    ratios, usual = log_ratios(posed, targets, shares)
    assert ratios[second] == usual
    assert math.isfinite(ratios[first])
    assert ratios[first] < -2
    all_dense = {spec.name: Target.dense(spec) for spec in posed.specs}
    nothing, none = log_ratios(posed, all_dense, {name: torch.zeros(WINDOWS) for name in all_dense})
    assert set(nothing.values()) == {none} == {0.0}
    one_window, _ = log_ratios(posed, targets, {name: share[:1] for name, share in shares.items()})
    assert all(map(math.isfinite, one_window.values()))


# ------------------------------------------------------------------------------------------------- corrections

SPEC = LayerSpec("up", 0, "in", "up", 10, 10)
OTHER = LayerSpec("down", 0, "up", "down", 10, 10)


def two_layers() -> Problem:
    targets = tuple(Target(0, nnz) for nnz in (0, 20, 40, 60, 80, 100))
    surfaces = tuple(ErrorSurface(spec, targets, tuple(1 - t.nnz / 100 for t in targets)) for spec in (SPEC, OTHER))
    return Problem(surfaces, Budget.fraction(0.5, [SPEC, OTHER]))


def test_logarithms_of_factors_are_linear_between_points_and_constant_outside():
    posed = two_layers()
    found = Corrections({"up": ((0.2, math.log(4.0)), (0.6, math.log(16.0)))}).apply(posed)
    expected = {0: 4.0, 20: 4.0 * 0.8, 40: 8.0 * 0.6, 60: 16.0 * 0.4, 80: 16.0 * 0.2, 100: 0.0}
    assert [found.surfaces[0].predict(Target(0, n)) for n in expected] == pytest.approx(list(expected.values()))
    assert found.surfaces[1] == posed.surfaces[1]
    assert found.budget == posed.budget
    assert NO_CORRECTIONS.apply(posed).surfaces == posed.surfaces


def test_a_ratio_replaces_those_nearby_and_leaves_those_far_off():
    posed = two_layers()
    known = Corrections({"up": ((0.2, 1.0), (0.41, 2.0), (0.8, 3.0))}, losses=(0.5,))
    found = known.with_ratios(posed, {"up": Target(0, 40), "down": Target(0, 60)}, {"up": -1.0, "down": 0.25})
    assert found.points == {"up": ((0.2, 1.0), (0.4, -1.0), (0.8, 3.0)), "down": ((0.6, 0.25),)}
    assert found.losses == (0.5,)
    assert known.points == {"up": ((0.2, 1.0), (0.41, 2.0), (0.8, 3.0))}, "not changed itself"
    # A layer without a ratio stays as it is.
    assert (
        known.with_ratios(posed, {"up": Target(0, 40), "down": Target(0, 60)}, {"down": 0.25}).points["up"]
        == (known.points["up"])
    )
