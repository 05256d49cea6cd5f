"""What solvers write down of their objective is true, and writing it down changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from globalopt.values.budget import Target
from globalopt.values.metric import Gram, Metric
from solvers import _admm, get_solver
from solvers._unit_diagonal import Damping, UnitDiagonal
from tests.synthetic import layer

TRACED = {
    "3basil": {"steps": "70"},
    "alps": {"steps": "70"},
    "oats": {"steps": "6", "tolerance": "0"},
    "hassle-free": {"steps": "4", "tolerance": "0"},
    "slab": {"steps": "5", "search": "0"},
}


def problem(name: str, weighted: bool = False):
    solver = get_solver(name, TRACED.get(name, {}))
    W, gram = layer(24, 40, 200)
    outputs = torch.randn(300, 24, generator=torch.Generator().manual_seed(3)) * torch.linspace(0.3, 2, 24)
    metric = Metric(gram, Gram(outputs.mT @ outputs / 300, 300) if weighted else None)
    rank = 1 if solver.signs else 3 if solver.low_rank else 0
    return solver, W, metric, Target(rank, 240, signs=solver.signs)


@pytest.mark.parametrize("name", TRACED)
def test_a_trace_begins_with_nothing_kept_and_falls(name):
    solver, W, metric, target = problem(name)
    solution = solver.solve(solver.prepare(W, metric), target)
    steps, objective = zip(*solution.trace, strict=True)
    assert steps[0] == 0
    assert list(steps) == sorted(set(steps))
    assert len(steps) >= 3
    assert objective[0] > objective[1] > objective[-1] > 0
    # Damping and scaling aside, the norm of the objective is that of the error.
    relative = solution.error / metric.error(W)
    assert objective[-1] / objective[0] == pytest.approx(relative, rel=0.5)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_trace_of_admm_ends_with_the_damped_error_of_what_it_returns(weighted):
    solver, W, metric, target = problem("3basil", weighted)
    solution = solver.solve(solver.prepare(W, metric), target)
    unit = UnitDiagonal.read(W, metric, Damping(0.005, 0.005, 0.1), solver.outputs)

    def squared(E: torch.Tensor) -> float:
        E = E * unit.layer.rows * unit.columns
        return float((E * unit.norm.times(E)).sum(dtype=torch.float64))

    assert [step for step, _ in solution.trace][:2] == [0, 33]
    assert solution.trace[0][1] == pytest.approx(squared(W), rel=1e-5)
    assert solution.trace[-1][1] == pytest.approx(squared(W - solution.value.dense()), rel=1e-3)
    # The refit only lowers what the last step of ADMM had.
    assert solution.trace[-1][1] < solution.trace[-2][1]


@pytest.mark.parametrize("weighted", [False, True])
def test_tracing_changes_no_bit(weighted, monkeypatch):
    solver, W, metric, target = problem("3basil", weighted)
    traced = solver.solve_site([(W, metric, target)])[0]
    run = _admm.AdmmSearch.run
    monkeypatch.setattr(_admm.AdmmSearch, "run", lambda self, *given: run(replace(self, traced=False), *given))
    plain = solver.solve_site([(W, metric, target)])[0]
    for part in ("S", "U", "V"):
        assert torch.equal(getattr(traced.value, part), getattr(plain.value, part))


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt", "eora"])
def test_solvers_without_iteration_have_none(name):
    solver, W, metric, target = problem(name)
    assert solver.solve(solver.prepare(W, metric), target).trace == ()


def test_probes_along_a_path_have_none():
    solver, W, metric, target = problem("3basil")
    targets = [target, replace(target, nnz=400)]
    assert [found.trace for found in solver.solve_path(solver.prepare(W, metric), targets)] == [(), ()]
