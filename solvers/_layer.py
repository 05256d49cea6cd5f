"""What every solver does around its method: read a layer, refuse targets, report the undamped error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from globalopt.errors import NumericalError, UsageError
from globalopt.protocols import Outputs, Solver
from globalopt.values.budget import Target
from globalopt.values.decomposition import Decomposition, Solution, Status, Trace
from globalopt.values.layer import LayerSpec
from globalopt.values.metric import Metric

# Of the mean importance: a row whose output the loss does not feel still has a finite scale.
LEAST_IMPORTANCE = 1e-4


def at_most_rows(solver: Solver) -> None:
    """`UsageError` where `solver` is asked for the whole output Gram, but can only weight rows."""
    if solver.outputs is Outputs.FULL:
        raise UsageError(
            f"Solver '{solver.name}' weights rows by the diagonal of A; outputs is none or rows, not full."
        )


class OneByOne:
    """For solvers that gain nothing from a neighbouring target, or from layers on the same inputs."""

    def solve_site(self: Any, layers: Sequence[tuple[Tensor, Metric, Target]]) -> list[Solution]:
        return [self.solve(self.prepare(weight, metric), target) for weight, metric, target in layers]

    def solve_path(self: Any, state: Any, targets: Sequence[Target]) -> list[Solution]:
        return [self.solve(state, target) for target in targets]


@dataclass(frozen=True, eq=False)
class Layer:
    """One `weight` (d_out, d_in), the `metric` its error is measured in, and the `rows` scale it is fitted in.

    Row weighting: with `rows` (d_out, 1) `= diag(A)^1/2` up to a factor, a method that minimises `tr(E G Eᵀ)` for
    `rows * W` minimises `tr(diag(A) E G Eᵀ)` for `W`. Without output weighting `rows` is all ones.
    """

    weight: Tensor
    metric: Metric
    rows: Tensor

    @classmethod
    def read(cls, weight: Tensor, metric: Metric, outputs: Outputs = Outputs.NONE) -> Layer:
        """A layer fitted with as much of the metric's `A` as `outputs` says; without an `A` there is none to use.

        A float64 weight is fitted in float64, any other in float32.

        Raises:
            NumericalError: the weight is not finite.
            UsageError: the Grams belong to another layer.
        """
        if not bool(torch.isfinite(weight).all()):
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
            # Where the loss feels no output at all, there is nothing to weight by.
            if float(mean) > 0:
                rows = (metric.outputs.diagonal / mean + LEAST_IMPORTANCE).sqrt()[:, None]
        return cls(weight, metric, rows)

    @property
    def weighted(self) -> bool:
        """Whether outputs are weighted; not where the metric has no `A`, or its loss feels no output."""
        return bool((self.rows != 1).any())

    @property
    def G(self) -> Tensor:
        """(d_in, d_in) undamped."""
        return self.metric.inputs.matrix

    @cached_property
    def live(self) -> Tensor:
        """The weight to fit: rows scaled, and zeros in the columns of dead inputs, on which no error depends."""
        return (self.weight * self.rows).masked_fill(self.metric.inputs.diagonal == 0, 0.0)

    def check(self, target: Target, solver: Solver) -> None:
        """`UsageError` where `target` does not fit this layer or asks for what `solver` cannot do."""
        d_out, d_in = self.weight.shape
        target.check(LayerSpec(name="(given)", block=0, site="", kind="", d_out=d_out, d_in=d_in))
        if target.signs != solver.signs:
            wanted = "fits a sign plane; set signs in the target" if solver.signs else "has no sign plane"
            raise UsageError(f"Solver '{solver.name}' {wanted}; the target has signs={target.signs}.")
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
        """`S + U V` of `rows * weight * columns` as parts of the weight.

        Args:
            columns: (d_in,) what the columns of `live` were multiplied by.
        """
        if columns is not None:
            S, V = S / columns, V / columns
        return Decomposition(S / self.rows, U / self.rows, V)

    def kept(self, mask: Tensor) -> Decomposition:
        """The weight itself where `mask` (d_out, d_in) holds, with factors of rank 0."""
        S = self.weight.masked_fill(~mask, 0.0)
        return Decomposition(S, S.new_zeros(S.shape[0], 0), S.new_zeros(0, S.shape[1]))

    def sparse(self, S: Tensor) -> Decomposition:
        """`S` of `live`, with factors of rank 0."""
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
        """The better of `value` and a feasible `start`, with its undamped error.

        Args:
            asked, damping: the damping asked for and used, as fractions of the mean diagonal.
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
