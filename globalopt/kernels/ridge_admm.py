"""Joint sparse + low-rank fit by the alternating direction method of multipliers (3BASiL, arXiv:2603.01376)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from globalopt.kernels.low_rank import Subspace, leading_subspace, subspace_step
from globalopt.kernels.norm import Norm, Side, ridge
from globalopt.kernels.precision import fast_products
from globalopt.values.decomposition import Trace

BEND = 1.3
RESTED = 0.015  # share of the support that would move in the steps left, at the pace of the last, below which it ends
MOMENTUM = 0.7  # of L; from 0.8 on, some layers get worse and planted parts are lost, and at 1 it diverges
EXACT_FROM = 0.7  # share of the steps after which counts are exact, and an accelerator's products in full precision


@dataclass(frozen=True)
class Schedule:
    """How the penalty rises from `start` to `end` and the support grows to its full size, in `steps` steps.

        penalty(t) = start (end / start)^(t^1.3)
        size(t) = grown + (1 - grown) min(1, t / full)        of the final count

    where `t` is the share of the steps done. A penalty that rises slowly is a search for the support. Entries that are
    admitted one after the other, each for what the others and `L` cannot explain, make a far better support than
    entries removed from the weight's largest: inputs are correlated, and of two that say the same one is enough.

    Args:
        hold: steps between changes of the penalty.
        begun: share of the penalty's rise that is skipped, in [0, 1): for a warm start.
        grown: share of the final count that is there at first.
        full: share of the steps after which the rest is.
    """

    start: float
    end: float
    steps: int
    hold: int
    begun: float = 0.0
    grown: float = 0.0
    full: float = 0.4

    def penalty(self, step: int) -> float:
        """The penalty of `step`, 0 <= step < steps."""
        share = self.begun + (1 - self.begun) * step / self.steps
        return self.start * (self.end / self.start) ** (share**BEND)

    def size(self, step: int) -> float:
        """Share of the final count that `step` keeps, 0 <= step < steps."""
        return min(1.0, self.grown + (1 - self.grown) * (step + 1) / (self.full * self.steps))


@dataclass(frozen=True, eq=False)
class Part:
    """One layer's rows of a stacked problem.

    Args:
        rows: its rows.
        outputs: its `A` (d_out, d_out), or None for the identity.
        rank: 0 <= rank <= min(d_out, d_in).
        keep: magnitudes (d_out, d_in), a share in (0, 1], whether exactly -> 0 and 1 in their dtype (bool is slower):
            so many of the entries to keep in the end, the largest; at least one.
    """

    rows: slice
    outputs: Side | None
    rank: int
    keep: Callable[[Tensor, float, bool], Tensor]


class Fit(NamedTuple):
    """Sparse `S` (d_out, d_in), and the subspace of the low-rank part, of one layer."""

    S: Tensor
    subspace: Subspace


class RidgeADMM(NamedTuple):
    """A fit per part, the steps taken, and the share of the support that changed at the last change of the penalty.

    `traces` has for every part the steps after which it was looked at and `||W - Z - L||²` there; `||W||²` at step 0.
    """

    fits: tuple[Fit, ...]
    steps: int
    moved: float
    traces: tuple[Trace, ...]


def ridge_admm(
    W: Tensor,
    inputs: Side,
    parts: Sequence[Part],
    schedule: Schedule,
    start: Sequence[Fit] | None = None,
    trace_every: int = 0,
) -> RidgeADMM:
    """Minimise `tr(A (W - S - L) G (W - S - L)ᵀ)` over sparse `S` and `L` of rank at most `rank`.

    With a copy `Z` of `S` that carries the constraint, a dual `p Y` and the penalty p, one step is

        R = A (W - L - m (L - L')) G + p (Z - Y)
        S <- the solution of A S G + p S = R
        Z <- the kept entries of S + Y
        Y <- Y + S - Z
        L <- U (A U)ᵀ M,  U <- orth_A(M (A M G)ᵀ U),  M = W - S

    with `L'` the `L` of the step before. The momentum m is not in the published method. A support holds on to what `L`
    would take over, so that `L` moves in small steps of one direction, and this lengthens them.

    The linear system hands over `A S G = R - p S`, so `A M G = A W G - R + p S` costs nothing: without `A` a step has a
    single product with a (d_in, d_in) matrix. The support starts empty, and `schedule` says how it grows; the published
    method starts from the largest entries at full count. Until `EXACT_FROM` of the steps a count may be rough: a
    threshold that is a little off moves what the next steps would have moved anyway.

    Layers on the same inputs may be stacked: they share the products and the ridge problems, and each has its own
    `A`, count and rank. They end together, after all steps, or in the exact ones as soon as less than `RESTED` of their
    supports would still change at the pace of the last.

    Args:
        W: (rows of all parts, d_in), not modified.
        inputs: G (d_in, d_in), best with a unit diagonal (`A` too), which makes the penalty free of scale.
        parts: in the order of their rows, covering all.
        start: for every part a fit of a neighbouring target; without it both parts start from zero.
        trace_every: fewest steps between looks at the objective, each of which costs one more product; 0: no looks.
    """
    outputs = [(part.rows, part.outputs) for part in parts]
    norms = [Norm(inputs, part.outputs) for part in parts]

    def times(E: Tensor) -> Tensor:
        return torch.cat([norm.times(E[part.rows]) for part, norm in zip(parts, norms, strict=True)])

    AWG = times(W)
    # A (W - L) G, kept instead of L: with momentum, and as it was in this and in the last step.
    rest = AWG.clone()
    now, before = torch.empty_like(W), torch.empty_like(W)
    Z, Y = torch.zeros_like(W), torch.zeros_like(W)
    R, P = torch.empty_like(W), torch.empty_like(W)
    penalty = schedule.penalty(0)
    subspaces: list[Subspace | None] = [None] * len(parts)
    if start is not None:
        Z = torch.cat([fit.S for fit in start])
        L = torch.cat(
            [fit.subspace.U @ fit.subspace.factor(W[p.rows] - fit.S) for fit, p in zip(start, parts, strict=True)]
        )
        rest.sub_(times(L))
        Y = (rest - times(Z)).masked_fill_(Z != 0, 0.0).div_(penalty)
    support, moved, rests, step = Z != 0, 1.0, False, 0
    traces: list[list[tuple[int, float]]] = [[] for _ in parts]
    if trace_every:
        traces = [[(0, _inner(W[part.rows], AWG[part.rows]))] for part in parts]
    with fast_products(W) as exact_from_here:
        while step < schedule.steps and not rests:
            exact = step >= EXACT_FROM * schedule.steps
            if exact:
                exact_from_here()
            last, penalty = penalty, schedule.penalty(step)
            Y.mul_(last / penalty)
            solve = ridge(inputs, outputs, penalty)
            seen = support
            for _ in range(min(schedule.hold, schedule.steps - step)):
                torch.add(rest, torch.sub(Z, Y, out=P), alpha=penalty, out=R)
                S = solve(R)
                torch.add(S, Y, out=P)
                size, magnitudes = schedule.size(step), torch.abs(P, out=Y)
                for part in parts:
                    torch.mul(P[part.rows], part.keep(magnitudes[part.rows], size, exact), out=Z[part.rows])
                torch.sub(P, Z, out=Y)
                M, N = torch.sub(W, S, out=P), torch.sub(AWG, R.sub_(S, alpha=penalty), out=R)
                for i, (part, norm) in enumerate(zip(parts, norms, strict=True)):
                    if part.rank:
                        previous, m, n = subspaces[i], M[part.rows], N[part.rows]
                        if previous is None:
                            subspace, momentum = leading_subspace(m, n, norm, part.rank), 0.0
                        else:
                            subspace, momentum = subspace_step(m, n, norm, previous), MOMENTUM
                        here = torch.addmm(AWG[part.rows], subspace.AU, subspace.U.mT @ n, alpha=-1, out=now[part.rows])
                        torch.lerp(before[part.rows] if momentum else here, here, 1 + momentum, out=rest[part.rows])
                        subspaces[i] = subspace
                now, before = before, now
                step += 1
            support = Z != 0
            if schedule.size(step - 1) == 1:
                moved = int((support != seen).sum()) / max(1, int(support.sum()))
                ahead = schedule.steps - step
                rests = exact and ahead >= schedule.hold and moved * ahead <= RESTED * schedule.hold
            if trace_every and step >= traces[0][-1][0] + trace_every:
                for part, norm, subspace, trace in zip(parts, norms, subspaces, traces, strict=True):
                    left = W[part.rows] - Z[part.rows]
                    if subspace is not None:
                        left.addmm_(subspace.U, subspace.factor(P[part.rows]), alpha=-1)
                    trace.append((step, _inner(left, norm.times(left))))
    fits = []
    for part, subspace in zip(parts, subspaces, strict=True):
        empty = W[part.rows, :0]
        fits.append(Fit(Z[part.rows], Subspace(empty, empty) if subspace is None else subspace))
    return RidgeADMM(tuple(fits), step, moved, tuple(tuple(trace) for trace in traces))


def _inner(X: Tensor, Y: Tensor) -> float:
    return float((X * Y).sum(dtype=torch.float64))
