"""What every solver does around its method: read a layer, refuse targets, report the undamped error."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from globalopt.errors import NumericalError, UsageError
from globalopt.protocols import Solver
from globalopt.types import Decomposition, LayerSpec, Metric, Solution, Status, Target


@dataclass(frozen=True, eq=False)
class Layer:
    """One `weight` (d_out, d_in) float32 and the input `metric` its error is measured in."""

    weight: Tensor
    metric: Metric

    @classmethod
    def read(cls, weight: Tensor, metric: Metric) -> Layer:
        """Raises: NumericalError: the weight is not finite. UsageError: the Gram belongs to another layer."""
        if not bool(torch.isfinite(weight).all()):
            raise NumericalError("The weight holds NaN or infinity; the checkpoint is damaged.")
        width = len(metric.inputs.matrix)
        if weight.ndim != 2 or weight.shape[1] != width:
            raise UsageError(f"A weight of shape {tuple(weight.shape)} does not fit a Gram of {width} inputs.")
        return cls(weight.detach().float(), Metric(metric.inputs))

    @property
    def G(self) -> Tensor:
        """(d_in, d_in) undamped."""
        return self.metric.inputs.matrix

    @cached_property
    def live(self) -> Tensor:
        """The weight with zeros in the columns of dead inputs: no error depends on these, so they may cost nothing."""
        return self.weight.masked_fill(self.metric.inputs.diagonal == 0, 0.0)

    def check(self, target: Target, solver: Solver) -> None:
        """`UsageError` where `target` does not fit this layer or asks for what `solver` cannot do."""
        d_out, d_in = self.weight.shape
        target.check(LayerSpec(name="(given)", block=0, site="", kind="", d_out=d_out, d_in=d_in))
        if target.signs:
            raise UsageError(f"Solver '{solver.name}' has no sign plane; use a target without signs.")
        if target.rank and not solver.low_rank:
            raise UsageError(
                f"Solver '{solver.name}' fits no low-rank part, but the target has rank {target.rank}; fold the rank "
                f"into nonzeros first ({target.rank * (d_out + d_in)} more) or choose another solver."
            )

    def sparse(self, S: Tensor) -> Decomposition:
        """`S` alone, with factors of rank 0."""
        return Decomposition(S, S.new_zeros(S.shape[0], 0), S.new_zeros(0, S.shape[1]))

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
    ) -> Solution:
        """The better of `value` and a feasible `start`, with its undamped error.

        Args:
            asked, damping: the damping asked for and used, as fractions of the mean diagonal.
            steps, settled: of an iterative method.
        """
        error = self.metric.error(self.weight - value.dense())
        if start is not None and start.fits(target):
            before = self.metric.error(self.weight - start.dense())
            if before < error:
                value, error = start, before
        status = Status.CONVERGED if settled else Status.MAX_STEPS
        if damping > asked:
            status = Status.FALLBACK
        return Solution(value, error, status, {"damping": damping, "steps": float(steps)})
