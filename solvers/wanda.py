"""Wanda: prune by weight times input norm."""

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
class Wanda(OneByOne):
    """`S` = the entries of `W` of largest `|w_ij| ||x_j||`, values unchanged (Sun et al. 2023, arXiv:2306.11695).

    Args:
        per_row: compare within each output row, as published; otherwise within the layer.
        outputs: weight rows by the output Gram, or not, as published; felt only where rows compete.
    """

    per_row: bool = True
    outputs: Outputs = Outputs.NONE

    name: ClassVar[str] = "wanda"
    paper: ClassVar[str] = "arXiv:2306.11695"
    needs: ClassVar[Needs] = Needs.DIAGONAL
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
        scores = (state.weight * state.rows).abs() * state.metric.inputs.norms
        keep = keep_weights(scores, target.nnz, target.pattern, self.per_row)
        return state.solution(state.kept(keep), target, start)
