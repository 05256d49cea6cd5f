"""Prune by weight times input norm (Wanda)."""

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
class Wanda(Solver[LayerProblem]):
    """Prune by Wanda's score: keep the entries of `W` of largest `|w_ij| ||x_j||` (Sun et al. 2023, arXiv:2306.11695).

    The kept values are unchanged. `||x_j||` is the root of the diagonal of `G`.

    Args:
        per_row: compare scores within each output row, as published; otherwise within the layer.
        outputs: weight rows by the output Gram, or not, as published; without effect where `per_row` is on.

    >>> import torch
    >>> from globalopt import Gram
    >>> solver = Wanda()
    >>> metric = Metric(Gram(torch.diag(torch.tensor([1.0, 1.0, 100.0])), tokens=100))
    >>> state = solver.prepare(torch.tensor([[3.0, -1.0, 0.5], [-4.0, 2.0, 1.0]]), metric)
    >>> solver.solve(state, Target(rank=0, nnz=2)).value.S.tolist()
    [[0.0, 0.0, 0.5], [0.0, 0.0, 1.0]]
    """

    per_row: bool = True
    outputs: Outputs = Outputs.NONE

    name: ClassVar[str] = "wanda"
    paper: ClassVar[str] = "arXiv:2306.11695"
    needs: ClassVar[Needs] = Needs.DIAGONAL
    low_rank: ClassVar[bool] = False

    def __post_init__(self) -> None:
        at_most_rows(self)

    def prepare(self, weight: Tensor, metric: Metric) -> LayerProblem:
        return LayerProblem.read(weight, metric, self.outputs)

    def solve(self, state: LayerProblem, target: Target, start: Decomposition | None = None) -> Solution:
        state.check(target, self)
        scores = (state.weight * state.rows).abs() * state.metric.inputs.norms
        keep = keep_weights(scores, target.nnz, target.pattern, self.per_row)
        return state.solution(state.kept(keep), target, start)
