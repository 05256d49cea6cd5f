"""Prune by magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from globalopt.kernels.projection import keep_weights
from globalopt.protocols import Needs, Outputs, Solver
from globalopt.values.budget import Target
from globalopt.values.decomposition import Decomposition, Solution
from globalopt.values.metric import Metric
from solvers.layer_problem import LayerProblem, at_most_rows


@dataclass(frozen=True)
class Magnitude(Solver[LayerProblem]):
    """Prune by magnitude: keep the `nnz` entries of `W` of largest `|w|` (Han et al. 2015, arXiv:1506.02626).

    The kept values are unchanged. The inputs are not read.

    Args:
        outputs: weight rows by the output Gram, or not, as published.

    >>> import torch
    >>> from globalopt import Gram
    >>> solver = Magnitude()
    >>> metric = Metric(Gram(torch.eye(3), tokens=100))
    >>> state = solver.prepare(torch.tensor([[3.0, -1.0, 0.5], [-4.0, 2.0, 1.0]]), metric)
    >>> solver.solve(state, Target(rank=0, nnz=3)).value.S.tolist()
    [[3.0, 0.0, 0.0], [-4.0, 2.0, 0.0]]
    """

    outputs: Outputs = Outputs.NONE

    name: ClassVar[str] = "magnitude"
    paper: ClassVar[str] = "arXiv:1506.02626"
    needs: ClassVar[Needs] = Needs.NOTHING
    low_rank: ClassVar[bool] = False

    def __post_init__(self) -> None:
        at_most_rows(self)

    def prepare(self, weight: Tensor, metric: Metric) -> LayerProblem:
        return LayerProblem.read(weight, metric, self.outputs)

    def solve(self, state: LayerProblem, target: Target, start: Decomposition | None = None) -> Solution:
        state.check(target, self)
        keep = keep_weights((state.weight * state.rows).abs(), target.nnz, target.pattern)
        return state.solution(state.kept(keep), target, start)
