"""Magnitude pruning: keep the largest weights of the layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from globalopt.kernels.projection import keep_weights
from globalopt.protocols import Needs, Outputs
from globalopt.values.budget import Target
from globalopt.values.decomposition import Decomposition, Solution
from globalopt.values.metric import Metric
from solvers._layer import Layer, OneByOne, at_most_rows


@dataclass(frozen=True)
class Magnitude(OneByOne):
    """`S` = the `nnz` entries of `W` of largest `|w|`, values unchanged (Han et al. 2015, arXiv:1506.02626).

    Args:
        outputs: weight rows by the output Gram, or not, as published.
    """

    outputs: Outputs = Outputs.NONE

    name: ClassVar[str] = "magnitude"
    paper: ClassVar[str] = "arXiv:1506.02626"
    needs: ClassVar[Needs] = Needs.NOTHING
    sparse: ClassVar[bool] = True
    low_rank: ClassVar[bool] = False
    patterns: ClassVar[bool] = True
    signs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        at_most_rows(self)

    def prepare(self, weight: Tensor, metric: Metric) -> Layer:
        return Layer.read(weight, metric, self.outputs)

    def solve(self, state: Layer, target: Target, start: Decomposition | None = None) -> Solution:
        state.check(target, self)
        keep = keep_weights((state.weight * state.rows).abs(), target.nnz, target.pattern)
        return state.solution(state.kept(keep), target, start)
