"""Search for a support by ADMM, with or without a low-rank part: the method behind 3BASiL and ALPS."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from globalopt.kernels.low_rank import Subspace
from globalopt.kernels.norm import Norm
from globalopt.kernels.projection import indicate_nm, indicate_planes, indicate_roughly, indicate_top, plane_order
from globalopt.kernels.ridge_admm import Schedule, SparseAndSubspace, StackedLayer, ridge_admm
from globalopt.kernels.support_refit import refit
from globalopt.values.budget import Target
from globalopt.values.decomposition import Trace
from globalopt.values.layer import NM

# The penalty runs from FIRST[0] g^FIRST[1] to LAST[0] g^LAST[1], where g is the geometric mean of the eigenvalues of
# the Grams at unit diagonals: correlated coordinates have many small eigenvalues, and need a smaller penalty.
FIRST = (0.12, 0.75)
LAST = (0.9, 0.6)
# With an output Gram the eigenvalues of the system are products, which spread upwards by about this factor.
TWO_SIDED = 1.67
HOLD = 12  # steps between changes of the penalty, each of which costs a factorisation
LEVELS = 6  # the fewest changes of the penalty with which it still rises slowly
SETTLED = 0.00125  # share of the support that changes in a step at the end, below which more steps gain little
TRACE_EVERY = 32  # fewest steps between two entries of a trace


class AdmmResult(NamedTuple):
    """Hold a fit per layer, the steps of ADMM, and `taken`: these with those of the refit.

    `settled` says whether the supports hardly changed at the end; `traces` are as in `RidgeADMM`.
    """

    fits: tuple[SparseAndSubspace, ...]
    steps: int
    taken: int
    settled: bool
    traces: tuple[Trace, ...]


@dataclass(frozen=True)
class AdmmSearch:
    """Search for a support by `ridge_admm`, then refit the values on it.

    Args:
        steps: of ADMM, >= 1.
        begun: share of the penalty's rise that is skipped, for a warm start.
        full: share of the steps after which the support has its full size.
        rounds: of refitting the values on the support that was found, `S` and `L` in alternation.
        conjugate: conjugate-gradient steps per round.
        traced: whether to record the objective every `TRACE_EVERY` steps: see `RidgeADMM.traces`.
    """

    steps: int
    begun: float = 0.0
    full: float = 0.4
    rounds: int = 2
    conjugate: int = 4
    traced: bool = False

    def run(
        self,
        weights: Sequence[Tensor],
        norms: Sequence[Norm],
        targets: Sequence[Target],
        start: Sequence[SparseAndSubspace] | None = None,
    ) -> AdmmResult:
        """Fit every weight (d_out, d_in) to its target, all in one stacked problem.

        Args:
            norms: one per weight, with unit diagonals; they share their inputs.
            targets: one per weight, with at least one nonzero each.
            start: fits of neighbouring targets, one per weight.
        """
        inputs = norms[0].inputs
        if inputs is None:
            raise ValueError("The search needs an input Gram.")
        # Where all targets have one pattern, columns are reordered into planes: then no step copies the magnitudes.
        pattern = targets[0].pattern if len({target.pattern for target in targets}) == 1 else None
        parts, begin = [], 0
        for weight, norm, target in zip(weights, norms, targets, strict=True):
            end = begin + len(weight)
            parts.append(
                StackedLayer(slice(begin, end), norm.outputs, target.rank, _keeper(target, pattern is not None))
            )
            begin = end
        mean = inputs.geometric_mean * _mean_outputs(norms)
        scale = 1.0 if all(norm.outputs is None for norm in norms) else TWO_SIDED
        hold = max(1, min(HOLD, self.steps // LEVELS))
        schedule = Schedule(
            scale * FIRST[0] * mean ** FIRST[1],
            scale * LAST[0] * mean ** LAST[1],
            self.steps,
            hold,
            self.begun,
            grown=_grown(start, targets),
            full=self.full,
        )
        trace_every = TRACE_EVERY if self.traced else 0
        if pattern is None:
            found = ridge_admm(torch.cat(list(weights)), inputs, parts, schedule, start, trace_every)
        else:
            order = plane_order(len(inputs.matrix), pattern, inputs.matrix.device)
            planes = None if start is None else [fit._replace(S=fit.S[:, order]) for fit in start]
            found = ridge_admm(
                torch.cat(list(weights))[:, order], inputs.reordered(order), parts, schedule, planes, trace_every
            )
            back = order.argsort()
            found = found._replace(fits=tuple(fit._replace(S=fit.S[:, back]) for fit in found.fits))
        fits = tuple(
            SparseAndSubspace(*refit(weight, *fit, norm, self.rounds, self.conjugate))
            for weight, fit, norm in zip(weights, found.fits, norms, strict=True)
        )
        taken = found.steps + self.rounds * self.conjugate
        return AdmmResult(fits, found.steps, taken, found.moved <= SETTLED * hold, found.traces)


def prune(
    search: AdmmSearch, W: Tensor, norm: Norm, nnz: int, pattern: NM | None, previous: Tensor | None = None
) -> Tensor:
    """Prune `W` (d_out, d_in) by ALPS, without a low-rank part; from the support of a `previous` `S` if given."""
    empty = W[:, :0]
    start = None if previous is None else [SparseAndSubspace(previous, Subspace(empty, empty))]
    return search.run([W], [norm], [Target(0, nnz, pattern)], start).fits[0].S


def _keeper(target: Target, in_planes: bool) -> Callable[[Tensor, float, bool], Tensor]:
    """Make the function that selects the entries `target` keeps: `Part.keep`.

    Args:
        in_planes: whether the columns are in the `plane_order` of the target's pattern.
    """
    pattern = target.pattern

    def keep(magnitudes: Tensor, size: float, exact: bool) -> Tensor:
        nnz = math.ceil(size * target.nnz)
        indicate = indicate_top if exact else indicate_roughly
        if pattern is None:
            return indicate(magnitudes.flatten(), nnz).view_as(magnitudes)
        if in_planes:
            planes = magnitudes.view(len(magnitudes), pattern.of, -1)
            allowed = indicate_planes(planes, pattern.keep).view_as(magnitudes)
        else:
            allowed = indicate_nm(magnitudes, pattern)
        if nnz == target.nnz:
            return allowed
        # Where too few are above zero, zeros outside the pattern are among the largest.
        return indicate((magnitudes * allowed).flatten(), nnz).view_as(magnitudes).mul_(allowed)

    return keep


def _grown(start: Sequence[SparseAndSubspace] | None, targets: Sequence[Target]) -> float:
    """Share of the targets' nonzeros that a start has, at most 1."""
    if start is None:
        return 0.0
    nonzeros = sum(int(torch.count_nonzero(fit.S)) for fit in start)
    return min(1.0, nonzeros / sum(target.nnz for target in targets))


def _mean_outputs(norms: Sequence[Norm]) -> float:
    """Mean over layers of the geometric mean of the output Gram's eigenvalues; 1 where no layer has one."""
    means = [norm.outputs.geometric_mean for norm in norms if norm.outputs is not None]
    return sum(means) / len(means) if means else 1.0
