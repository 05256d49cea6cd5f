"""Keep every weight, in few bits: each is rounded to the nearest level of its grid (RTN)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from globalopt.protocols import Needs, Rounding, Solver
from globalopt.values.budget import Target
from globalopt.values.decomposition import Decomposition, Solution
from globalopt.values.metric import Metric
from solvers.layer_problem import LayerProblem


@dataclass(frozen=True)
class RTN(Solver[LayerProblem]):
    """Keep every weight, and round it to the nearest level of its grid: the baseline of quantisation.

        level = clamp(round(w / s)) s,   one scale s per group of 64 weights of a row

    The inputs are not read. The scale of a group just reaches its largest weight (`largest_scales`). Bits belong to the
    target: one in 16 bits keeps the layer unchanged, and none can ask for a part of its weights or for rank.

    >>> from globalopt import Gram
    >>> W = torch.tensor([[0.3, -0.1], [0.2, 0.4]])
    >>> solver = RTN()
    >>> solver.solve(solver.prepare(W, Metric(Gram(torch.eye(2), tokens=100))), Target(rank=0, nnz=4)).error
    0.0
    """

    name: ClassVar[str] = "rtn"
    needs: ClassVar[Needs] = Needs.NOTHING
    sparse: ClassVar[bool] = False
    low_rank: ClassVar[bool] = False
    patterns: ClassVar[bool] = False
    rounding: ClassVar[Rounding] = Rounding.NEAREST

    def prepare(self, weight: Tensor, metric: Metric) -> LayerProblem:
        return LayerProblem.read(weight, metric)

    def solve(self, state: LayerProblem, target: Target, start: Decomposition | None = None) -> Solution:
        state.check(target, self)
        kept = torch.full_like(state.weight, target.nnz > 0, dtype=torch.bool)
        return state.solution(state.kept(kept), target, start)
