"""State one layer's approximation problem: check weight and target, weight rows, report the undamped error.

Every solver does this around its method, and a new one may use it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from globalopt.errors import NumericalError, UsageError
from globalopt.protocols import Outputs, Solver
from globalopt.values.budget import Target
from globalopt.values.decomposition import Decomposition, Solution, Status, Trace
from globalopt.values.entries import all_finite
from globalopt.values.layer import Shape
from globalopt.values.metric import Metric

# Of the mean importance: a row whose output does not change the loss still has a finite scale.
LEAST_IMPORTANCE = 1e-4


def at_most_rows(solver: Solver[Any]) -> None:
    """Raise `UsageError` where `solver` is to weight its error by all of the output Gram, but can only weight rows.

    >>> from solvers.wanda import Wanda
    >>> at_most_rows(Wanda(outputs=Outputs.ROWS))
    >>> Wanda(outputs=Outputs.FULL)
    Traceback (most recent call last):
    globalopt.errors.UsageError: Solver 'wanda' weights rows by the diagonal of A; outputs is none or rows, not full.
    """
    if solver.outputs is Outputs.FULL:
        raise UsageError(
            f"Solver '{solver.name}' weights rows by the diagonal of A; outputs is none or rows, not full."
        )


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """Hold one `weight` (d_out, d_in), the `metric` of its error, and the row scale `rows` (d_out, 1) of its fit.

    With `rows = diag(A)^1/2` up to a factor, a method that minimises `tr(E G Eᵀ)` for `rows * W` minimises
    `tr(diag(A) E G Eᵀ)` for `W`. Without output weighting `rows` is all ones.

    >>> from globalopt import Gram
    >>> gradients = Gram(torch.diag(torch.tensor([4.0, 1.0])), tokens=100)
    >>> metric = Metric(Gram(torch.eye(3), tokens=100), gradients)
    >>> problem = LayerProblem.read(torch.ones(2, 3), metric, Outputs.ROWS)
    >>> round(float(problem.rows[0] / problem.rows[1]), 3)
    2.0
    >>> half = problem.kept(torch.tensor([[True] * 3, [False] * 3]))
    >>> problem.solution(half, Target(0, 3), start=None).error
    3.0
    """

    weight: Tensor
    metric: Metric
    rows: Tensor

    @classmethod
    def read(cls, weight: Tensor, metric: Metric, outputs: Outputs = Outputs.NONE) -> LayerProblem:
        """Check `weight` (d_out, d_in) against its Grams, and weight its rows where `outputs` is not none.

        A float64 weight is fitted in float64, any other in float32. Without an `A` no row is weighted.

        Raises:
            NumericalError: the weight is not finite.
            UsageError: the Grams belong to another layer.
        """
        if not all_finite(weight):
            raise NumericalError("The weight holds NaN or infinity; the checkpoint is damaged.")
        width = len(metric.inputs.matrix)
        if weight.ndim != 2 or weight.shape[1] != width:
            raise UsageError(f"A weight of shape {tuple(weight.shape)} does not fit a Gram of {width} inputs.")
        if metric.outputs is not None and len(metric.outputs.matrix) != len(weight):
            raise UsageError(
                f"A weight of shape {tuple(weight.shape)} does not fit a Gram of {len(metric.outputs.matrix)} outputs."
            )
        weight = weight.detach()
        weight = weight if weight.dtype == torch.float64 else weight.float()
        rows = weight.new_ones(len(weight), 1)
        if outputs is not Outputs.NONE and metric.outputs is not None:
            mean = metric.outputs.diagonal.mean()
            # Where no output changes the loss, there is nothing to weight by.
            if float(mean) > 0:
                rows = (metric.outputs.diagonal / mean + LEAST_IMPORTANCE).sqrt()[:, None]
        return cls(weight, metric, rows)

    @property
    def weighted(self) -> bool:
        """Whether rows are weighted: not where the metric has no `A`, or an `A` of zeros."""
        return bool((self.rows != 1).any())

    @property
    def G(self) -> Tensor:
        """The input Gram (d_in, d_in), undamped."""
        return self.metric.inputs.matrix

    @cached_property
    def live(self) -> Tensor:
        """The weight to fit (d_out, d_in): rows scaled, and zeros in the columns of inputs that are always zero."""
        return (self.weight * self.rows).masked_fill(self.metric.inputs.diagonal == 0, 0.0)

    def check(self, target: Target, solver: Solver[Any]) -> None:
        """Raise `UsageError` where `target` does not fit this layer, or has a part that `solver` does not fit."""
        d_out, d_in = self.weight.shape
        target.check(Shape(d_out, d_in))
        if target.signs != solver.signs:
            wanted = "fits a sign plane; set signs in the target" if solver.signs else "has no sign plane"
            raise UsageError(f"Solver '{solver.name}' {wanted}; the target has signs={target.signs}.")
        whole = not solver.sparse and not solver.low_rank
        if whole and (target.rank or target.nnz not in (0, d_out * d_in)):
            raise UsageError(
                f"Solver '{solver.name}' keeps every weight of a layer or none, but the target has rank {target.rank} "
                f"and {target.nnz} of {d_out * d_in} nonzeros; give it fewer bits instead, or choose another solver."
            )
        if target.nnz not in (0, d_out * d_in) and not solver.sparse:
            raise UsageError(
                f"Solver '{solver.name}' fits no sparse part, but the target keeps {target.nnz} nonzeros; fold them "
                f"into rank first ({target.nnz // (d_out + d_in)} more) or choose another solver."
            )
        if target.rank and not solver.low_rank:
            raise UsageError(
                f"Solver '{solver.name}' fits no low-rank part, but the target has rank {target.rank}; fold the rank "
                f"into nonzeros first ({target.rank * (d_out + d_in)} more) or choose another solver."
            )

    def restored(self, S: Tensor, U: Tensor, V: Tensor, columns: Tensor | None = None) -> Decomposition:
        """Undo the scaling of a decomposition `S + U V` of `rows * weight * columns`.

        Args:
            columns: (d_in,) the factors by which the columns of `live` were multiplied.
        """
        if columns is not None:
            S, V = S / columns, V / columns
        return Decomposition(S / self.rows, U / self.rows, V)

    def kept(self, mask: Tensor) -> Decomposition:
        """Keep the weight unchanged where `mask` (d_out, d_in) is true, with factors of rank 0."""
        S = self.weight.masked_fill(~mask, 0.0)
        return Decomposition(S, S.new_zeros(S.shape[0], 0), S.new_zeros(0, S.shape[1]))

    def sparse(self, S: Tensor) -> Decomposition:
        """Undo the scaling of an `S` (d_out, d_in) of `live`, with factors of rank 0."""
        return self.restored(S, S.new_zeros(S.shape[0], 0), S.new_zeros(0, S.shape[1]))

    def solution(
        self,
        value: Decomposition,
        target: Target,
        start: Decomposition | None,
        *,
        asked: float = 0.0,
        damping: float = 0.0,
        steps: int = 1,
        settled: bool = True,
        trace: Trace = (),
    ) -> Solution:
        """Report the better of `value` and a feasible `start`, with its undamped error.

        Args:
            asked, damping: the damping that was asked for and that was used, as fractions of the mean diagonal.
            steps, settled, trace: of an iterative method.
        """
        error = self.metric.error(self.weight - value.dense())
        if start is not None and start.fits(target):
            before = self.metric.error(self.weight - start.dense())
            if before < error:
                value, error = start, before
        status = Status.CONVERGED if settled else Status.MAX_STEPS
        if damping > asked:
            status = Status.FALLBACK
        return Solution(value, error, status, {"damping": damping, "steps": float(steps)}, trace)
