"""Magnitude pruning: keep the largest weights of the layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from globalopt.kernels.projection import keep_weights
from globalopt.protocols import Needs
from globalopt.types import Decomposition, Metric, Solution, Target
from solvers._layer import Layer


@dataclass(frozen=True)
class Magnitude:
    """`S` = the `nnz` entries of `W` of largest `|w|`, values unchanged (Han et al. 2015, arXiv:1506.02626)."""

    name: ClassVar[str] = "magnitude"
    paper: ClassVar[str] = "arXiv:1506.02626"
    needs: ClassVar[Needs] = Needs.NOTHING
    low_rank: ClassVar[bool] = False
    patterns: ClassVar[bool] = True

    def prepare(self, weight: Tensor, metric: Metric) -> Layer:
        return Layer.read(weight, metric)

    def solve(self, state: Layer, target: Target, start: Decomposition | None = None) -> Solution:
        state.check(target, self)
        keep = keep_weights(state.weight.abs(), target.nnz, target.pattern)
        return state.solution(state.sparse(state.weight.masked_fill(~keep, 0.0)), target, start)
