"""The values refuse what they must not hold, and count what they should."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from globalopt.errors import BudgetError, CalibrationError, NumericalError, UnknownNameError, UsageError
from globalopt.values import metric
from globalopt.values.budget import Budget, Target
from globalopt.values.decomposition import Decomposition, Solution
from globalopt.values.layer import NM, LayerSpec, Shape
from globalopt.values.metric import Gram, Metric
from globalopt.values.problem import Allocation, Problem
from globalopt.values.surface import ErrorSurface

SPEC = LayerSpec("a", 0, "a", "a", 8, 16)


@pytest.mark.parametrize(("keep", "of"), [(0, 4), (4, 4), (5, 4)])
def test_patterns_keep_some_but_not_all(keep, of):
    with pytest.raises(UsageError):
        NM(keep, of)


def test_pattern_texts():
    assert NM.parse("2:4") == NM(2, 4)
    assert str(NM(2, 8)) == "2:8"
    assert NM.parse("unstructured") is None
    with pytest.raises(UnknownNameError, match="did you mean 'unstructured'"):
        NM.parse("unstructred")
    with pytest.raises(UsageError, match="d_in = 16"):
        NM(2, 3).nnz(SPEC)


def test_parameter_counts():
    assert Target(3, 20).params(SPEC) == 3 * 24 + 20
    assert Target(1, 0, signs=True).params(SPEC) == 24 + 128 // 16
    assert Target.dense(SPEC).params(SPEC) == 128
    assert Target.zero().params(SPEC) == 0


def test_byte_counts():
    # A full or empty S needs no index; a pattern 2 bits per value; free positions a bitmap, or columns if few.
    assert Target.dense(SPEC).bytes(SPEC) == 256
    assert Target.zero().bytes(SPEC) == 0
    assert Target(0, 64, NM(2, 4)).bytes(SPEC) == 2 * 64 + 64 // 4
    assert Target(0, 64).bytes(SPEC) == 2 * 64 + 128 // 8
    wide = LayerSpec("w", 0, "w", "w", 2, 4096)
    assert Target(0, 5).bytes(wide) == 2 * 5 + 2 * 5 + 4 * 3
    assert Target(2, 0).bytes(SPEC) == 2 * 2 * 24


@pytest.mark.parametrize(
    ("target", "match"),
    [(Target(9, 0), "largest rank 8"), (Target(0, 129), "128 weights"), (Target(0, 60, NM(2, 4)), "means 64")],
)
def test_targets_that_do_not_fit(target, match):
    with pytest.raises(UsageError, match=match):
        target.check(SPEC)


@pytest.mark.parametrize("target", [Target(3, 20), Target(0, 64, NM(2, 4)), Target(1, 9, signs=True), Target(0, 128)])
def test_a_shape_counts_as_the_layer_of_that_shape(target):
    shape = Shape(SPEC.d_out, SPEC.d_in)
    assert (shape.numel, shape.max_rank) == (SPEC.numel, SPEC.max_rank)
    assert target.check(shape) is target
    assert (target.params(shape), target.bytes(shape)) == (target.params(SPEC), target.bytes(SPEC))
    assert Target.dense(shape) == Target.dense(SPEC)


def test_messages_name_a_layer_or_its_shape():
    for layer, name in ((SPEC, "Layer a"), (Shape(8, 16), "Layer of 8 x 16")):
        for target in (Target(9, 0), Target(0, 129), Target(0, 60, NM(2, 4)), Target(0, 10, NM(2, 3))):
            with pytest.raises(UsageError, match=f"^{name}"):
                target.check(layer)
    with pytest.raises(UsageError, match=r"^Layer of 0 x 16 has shape 0 x 16"):
        Shape(0, 16)


@pytest.mark.parametrize("kept", [0, -0.1, 1.5, float("nan")])
def test_budget_fraction_range(kept):
    with pytest.raises(UsageError, match=r"in \(0, 1\]"):
        Budget.fraction(kept, [SPEC])


def test_budget_in_bytes():
    budget = Budget.fraction(0.5, [SPEC], "bytes")
    assert (budget.limit, budget.total) == (128, 256)
    assert budget.cost(Target(0, 10), SPEC) == Target(0, 10).bytes(SPEC)
    with pytest.raises(UnknownNameError):
        Budget.fraction(0.5, [SPEC], "bits")


@pytest.mark.parametrize("accounting", ["params", "bytes"])
@pytest.mark.parametrize("limit", [0, 1, 40, 97, 128, 200, 256])
def test_growing_takes_the_last_affordable_value(accounting, limit):
    """Against trying every value."""
    budget = Budget(128, 256, accounting)
    for axis, start in (("nnz", Target(0, 0)), ("nnz", Target(1, 0)), ("rank", Target(0, 10))):
        top = 127 if axis == "nnz" else 8
        tried = [replace(start, **{axis: value}) for value in range(top + 1)]
        affordable = [target for target in tried if budget.cost(target, SPEC) <= limit]
        assert budget.grow(start, SPEC, axis, top, limit) == (affordable or [start])[-1]
        thirds = [target for target in affordable if (getattr(target, axis) - getattr(start, axis)) % 3 == 0]
        assert budget.grow(start, SPEC, axis, top, limit, step=3) == (thirds or [start])[-1]


@pytest.mark.parametrize(
    ("matrix", "match"),
    [
        (torch.ones(2, 3), "square"),
        (torch.tensor([[1.0, 0.5], [0.2, 1.0]]), "symmetric"),
        (torch.tensor([[1.0, torch.nan], [torch.nan, 1.0]]), "finite"),
        (torch.diag(torch.tensor([1.0, -1.0])), "negative"),
    ],
)
def test_grams_are_second_moments(matrix, match):
    with pytest.raises(CalibrationError, match=match):
        Gram(matrix, 10)


def test_damping_makes_a_new_gram():
    gram = Gram(torch.diag(torch.tensor([1.0, 3.0])), 5)
    damped = gram.damped(0.1)
    assert torch.equal(gram.matrix, torch.diag(torch.tensor([1.0, 3.0])))
    torch.testing.assert_close(damped.matrix, torch.diag(torch.tensor([1.2, 3.2])))


def test_metric_error_is_the_trace(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(50, 16, generator=generator)
    g = torch.randn(40, 8, generator=generator)
    E = torch.randn(8, 16, generator=generator)
    G, A = Gram(X.mT @ X / 50, 50), Gram(g.mT @ g / 40, 40)
    assert Metric(G).error(E) == pytest.approx(float((X @ E.mT).square().sum(1).mean()), rel=1e-5)
    assert Metric(G, A).error(E) == pytest.approx(float(torch.trace(A.matrix @ E @ G.matrix @ E.mT)), rel=1e-5)
    whole = Metric(G, A).error(E)
    monkeypatch.setattr(metric, "ENTRIES_AT_ONCE", 2 * len(G.matrix))
    # Products of other shapes are summed in another order, and the error is a sum of terms of both signs.
    assert Metric(G, A).error(E) == pytest.approx(whole, rel=1e-5)


def test_decomposition_applies_and_counts():
    S = torch.zeros(8, 16)
    S[0, :3] = 1
    value = Decomposition(S, torch.ones(8, 2), torch.ones(2, 16))
    assert (value.rank, value.nnz) == (2, 3)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(value.matvec(x), x @ value.dense().mT)
    assert value.fits(Target(2, 3))
    assert not value.fits(Target(1, 3))
    assert not value.fits(Target(2, 64, NM(2, 4)))
    with pytest.raises(NumericalError, match="not finite"):
        Decomposition(S * torch.nan, torch.ones(8, 0), torch.ones(0, 16))
    with pytest.raises(NumericalError, match="disagree"):
        Decomposition(S, torch.ones(8, 2), torch.ones(1, 16))


def test_the_error_of_uncorrelated_entries_is_the_mean_over_all_their_signs():
    generator = torch.Generator().manual_seed(0)
    x, g, E = (torch.randn(*shape, generator=generator) for shape in ((9, 3), (8, 2), (2, 3)))
    signs = torch.tensor([*itertools.product((-1.0, 1.0), repeat=6)]).view(-1, 2, 3)
    for outputs in (None, Gram(g.mT @ g / 8, 8)):
        metric = Metric(Gram(x.mT @ x / 9, 9), outputs)
        errors = [metric.error(sign * E) for sign in signs]
        assert metric.uncorrelated_error(E) == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_solutions_have_finite_errors():
    value = Decomposition(torch.zeros(2, 2), torch.zeros(2, 0), torch.zeros(0, 2))
    with pytest.raises(NumericalError):
        Solution(value, float("nan"))


def surface(*points):
    return ErrorSurface(SPEC, tuple(Target(r, n) for r, n, _ in points), tuple(e for _, _, e in points))


def test_frontier_drops_what_is_dominated():
    found = surface((0, 0, 8.0), (1, 0, 6.0), (0, 30, 7.0), (0, 40, 6.0), (0, 64, 2.0), (0, 128, 0.0)).frontier(
        Budget(128, 128)
    )
    assert [(t.rank, t.nnz) for t, _, _ in found] == [(0, 0), (1, 0), (0, 64), (0, 128)]
    assert [cost for _, cost, _ in found] == [0, 24, 64, 128]


def test_prediction_is_linear_between_options():
    s = surface((0, 0, 8.0), (0, 100, 4.0), (2, 0, 4.0), (2, 50, 2.0))
    assert s.predict(Target(0, 50)) == 6.0
    assert s.predict(Target(2, 25)) == 3.0
    assert s.predict(Target(1, 0)) == 6.0
    assert s.predict(Target(2, 100)) == 2.0
    assert s.predict(Target(5, 0)) == 4.0


def test_problem_refuses_budgets_below_its_floor():
    cheapest = ErrorSurface(SPEC, (Target(0, 64, NM(2, 4)),), (1.0,))
    with pytest.raises(BudgetError, match=r"pattern 2:4 needs 64\. Raise --budget to at least 0\.5"):
        Problem((cheapest,), Budget(60, 128), NM(2, 4))


def test_finish_is_the_gate():
    p = Problem((surface((0, 0, 1.0), (0, 128, 0.0)),), Budget(64, 128))
    assert p.finish({"a": Target(0, 64)}, "test").used == 64
    with pytest.raises(BudgetError, match="uses 65 of 64"):
        p.finish({"a": Target(0, 65)}, "test")
    with pytest.raises(BudgetError, match="2 layers"):
        p.finish({"a": Target(0, 1), "b": Target(0, 1)}, "test")
    with pytest.raises(UsageError):
        p.finish({"a": Target(9, 0)}, "test")


def test_allocations_are_frozen():
    allocation = Allocation({"a": Target(0, 1)}, Budget(64, 128), 1, 2.0, "test", 1.5)
    assert allocation.gap == 0.25
    with pytest.raises(TypeError):
        allocation.targets["a"] = Target(0, 2)  # type: ignore[index]
