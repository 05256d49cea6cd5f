"""The search for a support by ADMM, with or without a low-rank part: the method behind 3BASiL and ALPS."""

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
# the Grams at unit diagonals: correlated coordinates have many small eigenvalues, and want a smaller penalty.
FIRST = (0.12, 0.75)
LAST = (0.9, 0.6)
# With an output side the system's eigenvalues are products, and spread about so much further up.
TWO_SIDED = 1.67
HOLD = 12  # steps between changes of the penalty, each of which costs a factorisation
LEVELS = 6  # and the fewest changes that still are a slow rise
SETTLED = 0.00125  # share of the support that changes in a step at the end, below which more steps promise little
LOOK = 32  # fewest steps between looks at the objective


class Found(NamedTuple):
    """A fit per layer; steps of ADMM, and `taken` with those of the refit; whether the supports had settled; traces."""

    fits: tuple[SparseAndSubspace, ...]
    steps: int
    taken: int
    settled: bool
    traces: tuple[Trace, ...]


@dataclass(frozen=True)
class Search:
    """How long to search, and how much to polish.

    Args:
        steps: of ADMM, >= 1.
        begun: share of the penalty's rise that is skipped, for a warm start.
        full: share of the steps after which the support has its full size.
        rounds: of refitting the values on the support that was found, `S` and `L` by turns.
        conjugate: conjugate-gradient steps per round.
        traced: whether to look at the objective now and then: see `RidgeADMM.traces`.
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
    ) -> Found:
        """Fit every weight (d_out, d_in) to its target, all in one problem.

        Args:
            norms: with unit diagonals; they share their inputs.
            targets: with at least one nonzero each.
            start: fits of neighbouring targets.
        """
        inputs = norms[0].inputs
        if inputs is None:
            raise ValueError("The search needs an input Gram.")
        # Columns in planes where all targets have one pattern: then keeping to it copies nothing.
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
        look = LOOK if self.traced else 0
        if pattern is None:
            found = ridge_admm(torch.cat(list(weights)), inputs, parts, schedule, start, look)
        else:
            order = plane_order(len(inputs.matrix), pattern, inputs.matrix.device)
            planes = None if start is None else [fit._replace(S=fit.S[:, order]) for fit in start]
            found = ridge_admm(
                torch.cat(list(weights))[:, order], inputs.reordered(order), parts, schedule, planes, look
            )
            back = order.argsort()
            found = found._replace(fits=tuple(fit._replace(S=fit.S[:, back]) for fit in found.fits))
        fits = tuple(
            SparseAndSubspace(*refit(weight, *fit, norm, self.rounds, self.conjugate))
            for weight, fit, norm in zip(weights, found.fits, norms, strict=True)
        )
        taken = found.steps + self.rounds * self.conjugate
        return Found(fits, found.steps, taken, found.moved <= SETTLED * hold, found.traces)


def prune(
    search: Search, W: Tensor, norm: Norm, nnz: int, pattern: NM | None, previous: Tensor | None = None
) -> Tensor:
    """`S` (d_out, d_in) of `W` (d_out, d_in) alone, as ALPS finds it; from the support of a `previous` one if given."""
    empty = W[:, :0]
    start = None if previous is None else [SparseAndSubspace(previous, Subspace(empty, empty))]
    return search.run([W], [norm], [Target(0, nnz, pattern)], start).fits[0].S


def _keeper(target: Target, in_planes: bool) -> Callable[[Tensor, float, bool], Tensor]:
    """What a layer keeps; its columns may be in the `plane_order` of the target's pattern."""
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
    """The share of the targets' entries that a start has; all of them, where it has more."""
    if start is None:
        return 0.0
    there = sum(int(torch.count_nonzero(fit.S)) for fit in start)
    return min(1.0, there / sum(target.nnz for target in targets))


def _mean_outputs(norms: Sequence[Norm]) -> float:
    means = [norm.outputs.geometric_mean for norm in norms if norm.outputs is not None]
    return sum(means) / len(means) if means else 1.0
