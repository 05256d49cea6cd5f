"""The base gives a solver everything but its name and its two methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from globalopt.protocols import Needs, Outputs, Solver
from globalopt.values.budget import Target
from globalopt.values.decomposition import Decomposition, Solution
from globalopt.values.metric import Metric
from solvers import SOLVERS, LayerProblem
from tests.synthetic import metric


@dataclass(frozen=True)
class First(Solver[LayerProblem]):
    """Keeps the first entries."""

    name: ClassVar[str] = "first"

    def prepare(self, weight: Tensor, metric: Metric) -> LayerProblem:
        return LayerProblem.read(weight, metric)

    def solve(self, state: LayerProblem, target: Target, start: Decomposition | None = None) -> Solution:
        kept = torch.arange(state.weight.numel()).view_as(state.weight) < target.nnz
        return state.solution(state.kept(kept), target, start)


def test_a_name_and_two_methods_make_a_solver():
    solver = First()
    assert (solver.paper, solver.version, solver.needs, solver.outputs) == ("", 1, Needs.GRAM, Outputs.NONE)
    assert solver.sparse
    assert solver.low_rank
    assert solver.patterns
    assert not solver.signs
    W, norm = metric(6, 8, 100)
    other, targets = metric(4, 8, 100, seed=1)[0], [Target(0, 9), Target(0, 30)]
    state = solver.prepare(W, norm)
    path = solver.solve_path(state, targets)
    assert [found.error for found in path] == [solver.solve(state, target).error for target in targets]
    site = solver.solve_site([(W, norm, targets[0]), (other, norm, targets[1])])
    assert site[0].error == path[0].error
    assert site[1].error == solver.solve(solver.prepare(other, norm), targets[1]).error


def test_a_solver_without_its_methods_cannot_be_made():
    class Half(Solver[Tensor]):
        name: ClassVar[str] = "half"

        def prepare(self, weight: Tensor, metric: Metric) -> Tensor:
            return weight

    with pytest.raises(TypeError, match="solve"):
        Half()  # pyright: ignore[reportAbstractUsage]


@pytest.mark.parametrize("name", SOLVERS)
def test_versions_count_from_one(name):
    assert SOLVERS[name].version >= 1
