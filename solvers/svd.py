"""Fit the low-rank approximation of least output error, without a sparse part (whitened SVD, SVD-LLM)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from globalopt.protocols import Outputs, Solver
from globalopt.registry import at_least
from globalopt.values.budget import Target
from globalopt.values.decomposition import Decomposition, Solution
from globalopt.values.metric import Metric
from solvers._unit_diagonal import Damping, UnitDiagonal


@dataclass(frozen=True)
class SVD(Solver[UnitDiagonal]):
    """Compute the low-rank `L` of least error by a whitened SVD (SVD-LLM, arXiv:2403.07378, section 3.1).

        min over L of the target's rank   tr(A (W - L) G (W - L)ᵀ)

    As published, this is the truncated SVD of `W C` with `C Cᵀ = G`, mapped back, and so the exact optimum. It does not
    update `U` on the activations of the compressed model. It fits no `S`: a target keeps no nonzeros, or all of them.

    Departures: `G` is always damped, where the public code shifts it only if its factorisation fails; and the error may
    weight outputs by `A`, for which the optimum is as exact.

    Args:
        damping: fraction of the mean of G's diagonal added to it.
        output_damping: fraction of each diagonal entry of A added to it.
        outputs: how much of A weights the error.

    >>> import torch
    >>> from globalopt import Gram
    >>> solver = SVD(damping=0)
    >>> metric = Metric(Gram(torch.diag(torch.tensor([1.0, 4.0])), tokens=100))
    >>> state = solver.prepare(torch.diag(torch.tensor([3.0, 2.0])), metric)
    >>> round(solver.solve(state, Target(rank=1, nnz=0)).error, 3)
    9.0
    """

    damping: float = 0.001
    output_damping: float = 0.1
    outputs: Outputs = Outputs.FULL

    name: ClassVar[str] = "svd"
    paper: ClassVar[str] = "arXiv:2403.07378"
    sparse: ClassVar[bool] = False
    patterns: ClassVar[bool] = False

    def __post_init__(self) -> None:
        at_least(0, damping=self.damping, output_damping=self.output_damping)

    def prepare(self, weight: Tensor, metric: Metric) -> UnitDiagonal:
        return UnitDiagonal.read(weight, metric, Damping(self.damping, 0.0, self.output_damping), self.outputs)

    def solve(self, state: UnitDiagonal, target: Target, start: Decomposition | None = None) -> Solution:
        layer = state.layer
        layer.check(target, self)
        value = state.without_search(target)
        assert value is not None, "a solver without a sparse part was handed a support to choose"
        return layer.solution(value, target, start, asked=self.damping, damping=state.damping)
