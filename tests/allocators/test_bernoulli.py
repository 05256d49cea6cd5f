"""Facts special to the policy gradients: estimators against enumeration, exact prices, CAP's parts."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from allocators import Knapsack, Uniform, get_allocator
from allocators._groups import Groups
from allocators._policy import Control, Policy, gradient_samples, step_within
from allocators._trials import Trials
from allocators.bernoulli import Bernoulli, History
from allocators.cap import Components, project_to_budget, search
from globalopt.errors import UsageError
from globalopt.values.budget import Target
from globalopt.values.layer import NM
from globalopt.values.span import Mask
from tests.objectives import BentObjective
from tests.surfaces import problem


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def grouped(p, groups):
    return Groups(p, Knapsack().allocate(p).targets, groups)


def losses_of(groups, objective, counts):
    """The noiseless loss of every row of counts."""
    distinct, which = counts.unique(dim=0, return_inverse=True)
    losses = [objective.true(groups.targets(row)) for row in distinct]
    return torch.tensor(losses, dtype=torch.float64)[which]


def expectation(policy, values):
    """Slow twin: the mean of `values(counts)` over all subsets, differentiable by the offsets."""
    size = len(policy.offsets)
    subsets = list(itertools.combinations(range(len(policy.ramp)), policy.count))
    z = torch.zeros(len(subsets), len(policy.ramp), dtype=torch.float64)
    for row, chosen in enumerate(subsets):
        z[row, list(chosen)] = 1.0
    counts = torch.zeros(len(subsets), size, dtype=torch.float64).index_add_(1, policy.stack, z)
    probability = (z @ (policy.offsets[policy.stack] + policy.ramp)).softmax(0)
    return probability @ values(counts.long())


# Groups


@pytest.mark.parametrize("pattern", [None, NM(2, 4)])
@pytest.mark.parametrize("accounting", ["params", "bytes"])
@pytest.mark.parametrize("size", [40, 3000])
def test_every_choice_of_so_many_groups_meets_the_budget(size, accounting, pattern):
    p = problem(0.65, accounting=accounting, pattern=pattern)
    groups = grouped(p, size)
    policy = Policy.around(groups, spread=0.1)
    for counts in policy.draw(40, generator()).counts:
        assert int(counts.sum()) == int(groups.start.sum())
        targets = groups.targets(counts)
        for surface in p.surfaces:
            target = targets[surface.spec.name].check(surface.spec)
            assert target.pattern == pattern
            assert target.rank <= max(t.rank for t in surface.targets)
        assert p.used(targets) <= p.budget.limit


def test_in_parameters_the_price_is_exact():
    p = problem(0.4)
    groups = grouped(p, 60)
    tops = torch.tensor([stack.size for stack in groups.stacks])
    interior = 0
    for counts in Policy.around(groups, spread=0.1).draw(60, generator()).counts:
        targets = groups.targets(counts)
        paying = all(t.nnz < s.numel for s in p.specs for t in [targets[s.name]])
        if paying and bool((counts[groups.start > 0] > 0).all() and (counts < tops).all()):
            interior += 1
            assert p.used(targets) == p.budget.limit
    assert interior


@pytest.mark.parametrize("accounting", ["params", "bytes"])
@pytest.mark.parametrize("kept", [0.3, 0.6, 1.0])
def test_the_counts_of_the_start_are_the_start(kept, accounting):
    p = problem(kept, accounting=accounting)
    start = Knapsack().allocate(p).targets
    groups = Groups(p, start, 100)
    assert groups.targets(groups.start) == dict(start)
    assert torch.equal(Policy.around(groups, spread=0.05).most_probable(), groups.start)


def test_predicted_is_the_problems():
    p = problem(0.4)
    groups = grouped(p, 50)
    counts = Policy.around(groups, spread=0.1).draw(20, generator()).counts
    expected = [p.predicted(groups.targets(row)) for row in counts]
    torch.testing.assert_close(groups.predicted(counts), torch.tensor(expected, dtype=torch.float64))


def test_spread_is_the_deviation_of_what_a_part_keeps():
    p = problem(0.5, layers=12)
    groups = Groups(p, Uniform().allocate(p).targets, 1000)
    draws = Policy.around(groups, spread=0.05).draw(400, generator())
    wanted = torch.tensor([0.05 * stack.dense / groups.price for stack in groups.stacks])
    inside = torch.tensor([stack.axis == "nnz" and 0.2 < stack.start / stack.size < 0.8 for stack in groups.stacks])
    assert inside.sum() > 6
    ratio = draws.counts.double().std(0)[inside] / wanted[inside]
    assert ((ratio > 0.7) & (ratio < 1.2)).all()


# Estimators


@pytest.fixture(scope="module")
def small():
    """A problem of so few groups that all choices can be listed."""
    p = problem(0.5, layers=2)
    groups = grouped(p, 14)
    policy = Policy.around(groups, spread=0.2)
    return groups, policy, BentObjective(p, bend=1.0)


def test_scores_are_the_gradient_of_the_log_probability(small):
    _, policy, _ = small
    draws = policy.draw(4000, generator())
    assert float(draws.scores.sum(1).abs().max()) < 1e-9
    assert float(draws.scores.mean(0).abs().max()) < 0.1


@pytest.mark.parametrize("variant", ["leave-one-out", "moving-average", "control", "moving-average and control"])
def test_all_estimators_have_the_gradient_as_their_mean(small, variant):
    groups, policy, objective = small
    learned = replace(policy, offsets=policy.offsets.clone().requires_grad_())
    (exact,) = torch.autograd.grad(
        expectation(learned, lambda counts: losses_of(groups, objective, counts)), learned.offsets
    )
    (of_surrogate,) = torch.autograd.grad(expectation(learned, groups.predicted), learned.offsets)
    updates, samples = 2000, 3
    draws = policy.draw(updates * samples, generator(1))
    losses = losses_of(groups, objective, draws.counts)
    predicted = groups.predicted(draws.counts)
    level = 0.9 * float(losses.mean()) if "moving-average" in variant else None
    estimates = []
    for rows in torch.arange(updates * samples).split(samples):
        control = Control(0.8, predicted[rows], of_surrogate) if "control" in variant else None
        estimates.append(gradient_samples(draws.scores[rows], losses[rows], level, control).mean(0))
    estimates = torch.stack(estimates)
    error = estimates.std(0) / updates**0.5
    assert ((estimates.mean(0) - exact).abs() < 4.5 * error + 1e-12).all()
    assert float((exact.abs() / error).max()) > 20


def test_each_remedy_lowers_the_variance():
    p = problem(0.4, layers=8)
    groups = grouped(p, 200)
    policy = Policy.around(groups, spread=0.15)
    objective = BentObjective(p)
    draws = policy.draw(800, generator())
    losses = losses_of(groups, objective, draws.counts)
    predicted = groups.predicted(draws.counts)
    past = slice(0, 400)
    deviation = predicted[past] - predicted[past].mean()
    alpha = float((losses[past] - losses[past].mean()) @ deviation / (deviation @ deviation))
    free = gradient_samples(draws.scores[past], predicted[past]).mean(0)
    scores, losses, predicted = draws.scores[400:], losses[400:], predicted[400:]

    def variance(baseline, control=None):
        return float(gradient_samples(scores, losses, baseline, control).var(0).sum())

    bare, leave_one_out = variance(0.0), variance(None)
    controlled = variance(None, Control(alpha, predicted, free))
    assert leave_one_out < 0.1 * bare
    assert controlled < 0.4 * leave_one_out


def test_the_search_uses_the_slope_it_has_learnt(small, monkeypatch):
    """Its control variate takes away most of the variance, exactly that of the best slope of all earlier samples."""
    groups, policy, objective = small
    history = History()
    past = policy.draw(400, generator())
    losses, predicted = losses_of(groups, objective, past.counts), groups.predicted(past.counts)
    for rows in torch.arange(400).split(8):
        history.add(losses[rows], predicted[rows])
    within = [(x - x.view(-1, 8).mean(1).repeat_interleave(8)) for x in (losses, predicted)]
    assert history.alpha == pytest.approx(float(within[0] @ within[1] / (within[1] @ within[1])))
    assert history.alpha > 0.5
    draws = policy.draw(800, generator(1))
    losses, predicted = losses_of(groups, objective, draws.counts), groups.predicted(draws.counts)
    free = gradient_samples(past.scores, groups.predicted(past.counts)).mean(0)
    plain = gradient_samples(draws.scores, losses).var(0).sum()
    controlled = gradient_samples(draws.scores, losses, None, Control(history.alpha, predicted, free)).var(0).sum()
    # What is left is the variance of the part of the loss that the prediction does not explain.
    explained = float(torch.corrcoef(torch.stack([losses, predicted]))[0, 1] ** 2)
    assert controlled < 1.5 * (1 - explained) * plain
    # The search gives this slope, and the first update none.
    used: list[float] = []

    def spied(scores, losses, baseline=None, control=None):
        if control is not None:
            used.append(control.alpha)
        return gradient_samples(scores, losses, baseline, control)

    monkeypatch.setattr("allocators.bernoulli.gradient_samples", spied)
    Bernoulli(groups=14, spread=0.2, updates=12).allocate(groups.problem, objective)
    assert len(used) == 11
    assert min(used) > 0.5 * history.alpha


@pytest.mark.parametrize("natural", [True, False])
def test_step_is_as_long_as_the_trust_region(natural):
    gradient = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    variance = torch.tensor([0.1, 3.0, 1.0], dtype=torch.float64)
    step = step_within(gradient, variance, natural, divergence=0.3)
    assert float((variance * step**2).sum()) / 2 == pytest.approx(0.3)
    assert float(step @ gradient) < 0
    assert not step_within(torch.zeros_like(gradient), variance, natural, 0.3).any()


# The search


@pytest.mark.parametrize(
    ("options", "share"),
    [({}, 0.92), ({"natural": "false"}, 0.95), ({"control_variate": "false", "baseline": "moving-average"}, 0.99)],
)
def test_better_than_its_start_where_the_surfaces_mislead(options, share):
    p = problem(0.4, layers=12)
    objective = BentObjective(p, bend=1.0)
    start = objective.true(Knapsack().allocate(p).targets)
    # A dozen layers in few groups: what each may try is wide.
    wide = {"groups": "150", "spread": "0.15", "updates": "30"}
    found = get_allocator("bernoulli", {**wide, **options}).allocate(p, objective)
    assert objective.true(found.targets) < share * start
    assert found.used == p.budget.limit


@pytest.mark.parametrize("preset", ["default", "cap"])
def test_stops_where_the_tokens_end(preset):
    p = problem(0.4)
    objective = BentObjective(p, limit=3000)
    get_allocator("bernoulli", {"groups": "100", "preset": preset, "updates": "500"}).allocate(p, objective)
    assert objective.tokens <= 3000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": "1"}, "at least 2"),
        ({"trust": "0"}, "trust"),
        ({"groups": "0"}, "groups"),
        ({"preset": "best"}, "one of cap, default"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UsageError, match=message):
        get_allocator("bernoulli", options)


# CAP


def projection_by_sorting(s, price, limit):
    """Slow twin: between the breakpoints of `nu` the cost is linear, so the right piece is solved in closed form."""
    if float(s.clamp(0, 1) @ price) <= limit:
        return s.clamp(0, 1)
    points = sorted({0.0, *(s / price).tolist(), *((s - 1) / price).tolist()})
    for low, high in itertools.pairwise(point for point in points if point >= 0):
        if float((s - high * price).clamp(0, 1) @ price) <= limit:
            inner = s - (low + high) / 2 * price
            free = (inner > 0) & (inner < 1)
            fixed = float(price[inner >= 1].sum())
            nu = (float(s[free] @ price[free]) + fixed - limit) / float(price[free] @ price[free])
            return (s - nu * price).clamp(0, 1)
    raise AssertionError


@pytest.mark.parametrize("seed", range(6))
def test_projection_against_its_twin(seed):
    s = torch.rand(40, dtype=torch.float64, generator=generator(seed)) * 2 - 0.3
    price = torch.where(torch.rand(40, generator=generator(seed + 9)) < 0.3, 7.0, 1.0).double()
    limit = 5.0 + 3 * seed
    found = project_to_budget(s, price, limit)
    torch.testing.assert_close(found, projection_by_sorting(s, price, limit), atol=1e-9, rtol=0)
    assert float(found @ price) <= limit


def test_projection_leaves_what_fits_and_may_leave_nothing():
    s = torch.tensor([0.2, 1.4, -0.1])
    price = torch.tensor([1.0, 2.0, 5.0])
    assert torch.equal(project_to_budget(s, price, 10.0), torch.tensor([0.2, 1.0, 0.0]))
    assert not project_to_budget(s, price, 0.0).any()


@pytest.mark.parametrize("accounting", ["params", "bytes"])
def test_cap_starts_at_the_budget_and_asks_about_components(accounting):
    p = problem(0.4, accounting=accounting)
    components = Components(p)
    s = components.initial()
    assert float(s.double() @ components.price.double()) == pytest.approx(p.budget.limit, rel=1e-4)
    candidate = components.candidate(torch.rand(len(s), generator=generator()) < s)
    assert list(candidate) == sorted(spec.name for spec in p.specs)
    for spec in p.specs:
        kept = candidate[spec.name]
        assert isinstance(kept, Mask)
        assert kept.entries.shape == (spec.d_out, spec.d_in)


def test_cap_rounds_to_the_largest_probabilities_that_fit():
    p = problem(0.4)
    components = Components(p)
    s = components.initial()
    targets = components.rounded(s)
    left = p.budget.limit - p.used(targets)
    assert 0 <= left < max(spec.d_out + spec.d_in for spec in p.specs)
    # All of one layer's components first: it is dense, and pays no more than that.
    first = p.specs[0]
    favoured = s * 0.5
    size = len(p.span(first.name).s) + first.numel
    favoured[:size] = 1.0
    assert components.rounded(favoured)[first.name] == Target.dense(first)


def test_cap_under_a_pattern_chooses_directions_alone():
    p = problem(0.7, pattern=NM(2, 4))
    components = Components(p)
    s = components.initial()
    candidate = components.candidate(s > 0)
    for spec in p.specs:
        kept = candidate[spec.name]
        assert isinstance(kept, Target)
        assert kept.check(spec).params(spec) <= spec.numel
    assert p.used(components.rounded(s)) <= p.budget.limit


def test_cap_learns_when_it_is_given_the_updates():
    p = problem(0.4, layers=8)
    objective = BentObjective(p)
    trials = Trials(p, objective, [Knapsack().allocate(p).targets])
    three = search(trials, updates=3, samples=1, learning_rate=0.05, batch=6)
    many = search(trials, updates=50, samples=8, learning_rate=0.05, batch=6)
    assert objective.true(many) < 0.8 * objective.true(three)
