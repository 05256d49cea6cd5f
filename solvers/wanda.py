"""Wanda: prune by weight times input norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from globalopt.kernels.projection import keep_weights
from globalopt.protocols import Needs
from globalopt.types import Decomposition, Metric, Solution, Target
from solvers._layer import Layer


@dataclass(frozen=True)
class Wanda:
    """`S` = the entries of `W` of largest `|w_ij| ||x_j||`, values unchanged (Sun et al. 2023, arXiv:2306.11695).

    Args:
        per_row: compare within each output row, as published; otherwise within the layer.
    """

    per_row: bool = True

    name: ClassVar[str] = "wanda"
    paper: ClassVar[str] = "arXiv:2306.11695"
    needs: ClassVar[Needs] = Needs.DIAGONAL
    low_rank: ClassVar[bool] = False
    patterns: ClassVar[bool] = True

    def prepare(self, weight: Tensor, metric: Metric) -> Layer:
        return Layer.read(weight, metric)

    def solve(self, state: Layer, target: Target, start: Decomposition | None = None) -> Solution:
        state.check(target, self)
        scores = state.weight.abs() * state.metric.inputs.norms
        keep = keep_weights(scores, target.nnz, target.pattern, self.per_row)
        return state.solution(state.sparse(state.weight.masked_fill(~keep, 0.0)), target, start)
