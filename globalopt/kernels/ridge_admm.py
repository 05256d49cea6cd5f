"""Fit sparse and low-rank parts together by the alternating direction method of multipliers.

The method is 3BASiL's (arXiv:2603.01376), with another schedule and momentum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from globalopt.kernels.low_rank import Subspace, leading_subspace, subspace_step
from globalopt.kernels.norm import Norm, Side, ridge
from globalopt.kernels.precision import fast_products, rough_products
from globalopt.values.decomposition import Trace

PENALTY_EXPONENT = 1.3  # exponent of the penalty's schedule
SETTLED_SHARE = (
    0.015  # share of the support: if fewer entries would still change in the remaining steps, the iteration ends
)
MOMENTUM = 0.7  # of L; from 0.8 on, some layers get worse and planted parts are not recovered, and at 1 it diverges
EXACT_FROM = 0.7  # share of the steps after which counts are exact, and an accelerator's products in full precision


@dataclass(frozen=True)
class Schedule:
    """Schedule the penalty, which rises from `start` to `end`, and the support, which grows to its final count.

        penalty(t) = start (end / start)^(t^1.3)
        size(t) = grown + (1 - grown) min(1, t / full)        of the final count

    where `t` is the share of the steps done. A penalty that rises slowly is a search for the support. Entries that are
    admitted one after the other, each for the part of the weight that the others and `L` cannot explain, make a far
    better support than entries that are removed from the weight's largest: inputs are correlated, and of two that carry
    the same information one is enough.

    Args:
        start, end: the first penalty, and the limit that it rises towards.
        steps: number of ADMM steps.
        hold: steps between changes of the penalty.
        begun: share of the penalty's rise that is skipped, in [0, 1): for a warm start.
        grown: share of the final count in the support at first.
        full: share of the steps after which the support has its final count.

    >>> schedule = Schedule(start=0.02, end=2.0, steps=50, hold=5)
    >>> [round(schedule.penalty(step), 3) for step in (0, 25, 49)]
    [0.02, 0.13, 1.775]
    >>> schedule.size(9), schedule.size(30)
    (0.5, 1.0)
    """

    start: float
    end: float
    steps: int
    hold: int
    begun: float = 0.0
    grown: float = 0.0
    full: float = 0.4

    def penalty(self, step: int) -> float:
        """Compute the penalty of `step`, 0 <= step < steps."""
        share = self.begun + (1 - self.begun) * step / self.steps
        return self.start * (self.end / self.start) ** (share**PENALTY_EXPONENT)

    def size(self, step: int) -> float:
        """Compute the share of the final count that `step` keeps, 0 <= step < steps."""
        return min(1.0, self.grown + (1 - self.grown) * (step + 1) / (self.full * self.steps))


@dataclass(frozen=True, eq=False)
class StackedLayer:
    """Describe one layer of several that are stacked by rows and fitted together, as they read the same inputs.

    Args:
        rows: its rows in the stacked weight.
        outputs: its damped output Gram `A` (d_out, d_out), or None for the identity.
        rank: rank of its `L`, 0 <= rank <= min(d_out, d_in).
        keep: function `keep(magnitudes, share, exact)` that selects the support of `S`. Of `magnitudes` (d_out, d_in)
            it marks the largest entries by 1 and the others by 0, in the dtype of the magnitudes, as products with a
            bool mask are slower. The number of entries is `share`, in (0, 1], of the layer's final number of nonzeros,
            and at least one; it must be met exactly if `exact` is true, and roughly otherwise.

    >>> def keep(magnitudes, share, exact):
    ...     final = magnitudes.numel() // 2
    ...     return indicate_top(magnitudes.flatten(), max(1, round(share * final))).view_as(magnitudes)
    >>> from globalopt.kernels.projection import indicate_top
    >>> layer = StackedLayer(slice(0, 2), outputs=None, rank=0, keep=keep)
    >>> layer.keep(torch.tensor([[1.0, 4.0], [3.0, 2.0]]), 0.5, True).tolist()  # half of the final two
    [[0.0, 1.0], [0.0, 0.0]]
    """

    rows: slice
    outputs: Side | None
    rank: int
    keep: Callable[[Tensor, float, bool], Tensor]


class SparseAndSubspace(NamedTuple):
    """Hold the solution of one layer: the sparse part, and the subspace of the low-rank part.

    Args:
        S: (d_out, d_in) with exact zeros.
        subspace: of `L = U V`, with `V = subspace.factor(W - S)`.

    >>> W, U = torch.tensor([[5.0, 1.0], [1.0, 1.0]]), torch.full((2, 1), 0.5**0.5)
    >>> fit = SparseAndSubspace(S=torch.diag(torch.tensor([4.0, 0.0])), subspace=Subspace(U, U))
    >>> L = fit.subspace.U @ fit.subspace.factor(W - fit.S)
    >>> torch.allclose(fit.S + L, W)
    True
    """

    S: Tensor
    subspace: Subspace


class RidgeADMM(NamedTuple):
    """Hold the solutions of all stacked layers, and how the iteration ended.

    Args:
        fits: one solution per layer.
        steps: steps taken.
        moved: share of the support that changed at the last change of the penalty.
        traces: for every layer, steps and the objective `||W - Z - L||²` after them; `||W||²` at step 0.

    >>> found = RidgeADMM(fits=(), steps=40, moved=0.01, traces=(((0, 8.0), (40, 1.0)),))
    >>> dict(found.traces[0])[found.steps] / dict(found.traces[0])[0]  # remaining error of the first layer
    0.125
    """

    fits: tuple[SparseAndSubspace, ...]
    steps: int
    moved: float
    traces: tuple[Trace, ...]


def ridge_admm(
    W: Tensor,
    inputs: Side,
    parts: Sequence[StackedLayer],
    schedule: Schedule,
    start: Sequence[SparseAndSubspace] | None = None,
    trace_every: int = 0,
) -> RidgeADMM:
    """Minimise `tr(A (W - S - L) G (W - S - L)ᵀ)` over sparse `S` and `L` of rank at most `rank`, by ADMM.

    With a copy `Z` of `S` that carries the constraint, a scaled dual `Y` (the dual is `p Y`) and the penalty p, one
    step is

        R = A (W - L - m (L - L')) G + p (Z - Y)
        S <- the solution of A S G + p S = R
        Z <- the kept entries of S + Y
        Y <- Y + S - Z
        L <- U (A U)ᵀ M,  U <- orth_A(M (A M G)ᵀ U),  M = W - S

    with `L'` the `L` of the step before. The momentum m is not in the published method: the support adapts to `L` and
    holds it back, so that `L` moves in many small steps of one direction, and momentum lengthens them.

    The linear system yields `A S G = R - p S`, so that `A M G = A W G - R + p S` costs nothing: without `A` a step has
    a single product with a (d_in, d_in) matrix. The support starts empty, and `schedule` says how it grows; the
    published method starts from the largest entries at full count. In the first `EXACT_FROM` of the steps, counts may
    be rough: the next steps would change the support by more than an inexact threshold does.

    Where the processor multiplies bfloat16 faster (`rough_products`), only the first step after a change of the penalty
    solves for `S`; the others solve for its change, in bfloat16. Their errors are relative to changes that shrink, and
    end with the penalty: final errors of layers differ by a few percent either way, not in the mean (docs/results.md).

    Layers on the same inputs may be stacked: they share the products and the ridge problems, and each has its own
    `A`, count and rank. They end together: after all steps, or once counts are exact and less than the share
    `SETTLED_SHARE` of their supports would change in the remaining steps at the rate of the last ones.

    Args:
        W: (rows of all layers, d_in), not modified.
        inputs: damped G (d_in, d_in). With a unit diagonal (of `A` too), penalties mean the same for every layer.
        parts: the stacked layers, in the order of their rows, covering all rows.
        schedule: of the penalty and of the size of the support.
        start: for every layer its solution at a neighbouring target; None starts from `S = L = 0`.
        trace_every: fewest steps between two evaluations of the objective for the traces, each of which costs one more
            product; 0: no traces.

    >>> from globalopt.kernels.projection import indicate_top
    >>> S = torch.diag(torch.tensor([5.0, 0.0, 5.0, 0.0, 0.0, 5.0]))  # three nonzeros
    >>> L = torch.outer(torch.ones(6), torch.linspace(1, 2, 6))  # rank one
    >>> def keep(magnitudes, share, exact):
    ...     return indicate_top(magnitudes.flatten(), max(1, round(3 * share))).view_as(magnitudes)
    >>> layer = StackedLayer(slice(0, 6), outputs=None, rank=1, keep=keep)
    >>> inputs = Side(torch.eye(6), torch.eye(6))
    >>> (fit,) = ridge_admm(S + L, inputs, [layer], Schedule(start=0.02, end=50.0, steps=100, hold=5)).fits
    >>> torch.equal(fit.S != 0, S != 0), torch.allclose(fit.S, S, atol=0.05)
    (True, True)
    """
    outputs = [(part.rows, part.outputs) for part in parts]
    norms = [Norm(inputs, part.outputs) for part in parts]

    def times(E: Tensor) -> Tensor:
        """Compute `A E G` with the `A` of every layer."""
        return torch.cat([norm.times(E[part.rows]) for part, norm in zip(parts, norms, strict=True)])

    AWG = times(W)
    # A (W - L) G stands for L: `extrapolated` has the momentum, `now` and `before` are those of this and the last step.
    extrapolated = AWG.clone()
    now, before = torch.empty_like(W), torch.empty_like(W)
    Z, Y = torch.zeros_like(W), torch.zeros_like(W)
    R, P = torch.empty_like(W), torch.empty_like(W)
    S, rough = W, rough_products(W)
    last_R = torch.empty_like(W) if rough else R
    penalty = schedule.penalty(0)
    subspaces: list[Subspace | None] = [None] * len(parts)
    if start is not None:
        Z = torch.cat([fit.S for fit in start])
        L = torch.cat(
            [fit.subspace.U @ fit.subspace.factor(W[p.rows] - fit.S) for fit, p in zip(start, parts, strict=True)]
        )
        extrapolated.sub_(times(L))
        # The dual that makes the start stationary: A (W - L - Z) G / p off the support.
        Y = (extrapolated - times(Z)).masked_fill_(Z != 0, 0.0).div_(penalty)
    ranked = any(part.rank for part in parts)
    support, moved, at_rest, step = Z != 0, 1.0, False, 0
    traces: list[list[tuple[int, float]]] = [[] for _ in parts]
    if trace_every:
        traces = [[(0, _inner(W[part.rows], AWG[part.rows]))] for part in parts]
    with fast_products(W) as exact_from_here:
        while step < schedule.steps and not at_rest:
            # The last steps decide what is kept, however few there are.
            exact = step + schedule.hold >= schedule.steps or step >= EXACT_FROM * schedule.steps
            if exact:
                exact_from_here()
            last_penalty, penalty = penalty, schedule.penalty(step)
            # The dual p Y does not change with the penalty.
            Y.mul_(last_penalty / penalty)
            solve = ridge(inputs, outputs, penalty)
            support_before = support
            for since_change in range(min(schedule.hold, schedule.steps - step)):
                torch.add(extrapolated, torch.sub(Z, Y, out=P), alpha=penalty, out=R)
                S = solve.rough(torch.sub(R, last_R, out=last_R)).add_(S) if rough and since_change else solve(R)
                if rough and ranked:
                    last_R.copy_(R)
                elif rough:
                    # R is not read again.
                    R, last_R = last_R, R
                torch.add(S, Y, out=P)
                size, magnitudes = schedule.size(step), torch.abs(P, out=Y)
                for part in parts:
                    torch.mul(P[part.rows], part.keep(magnitudes[part.rows], size, exact), out=Z[part.rows])
                torch.sub(P, Z, out=Y)
                step += 1
                if not ranked:
                    continue
                M, N = torch.sub(W, S, out=P), torch.sub(AWG, R.sub_(S, alpha=penalty), out=R)
                for i, (part, norm) in enumerate(zip(parts, norms, strict=True)):
                    if part.rank:
                        previous, m, n = subspaces[i], M[part.rows], N[part.rows]
                        if previous is None:
                            subspace, momentum = leading_subspace(m, n, norm, part.rank), 0.0
                        else:
                            subspace, momentum = subspace_step(m, n, norm, previous), MOMENTUM
                        here = torch.addmm(AWG[part.rows], subspace.AU, subspace.U.mT @ n, alpha=-1, out=now[part.rows])
                        last_step = before[part.rows] if momentum else here
                        torch.lerp(last_step, here, 1 + momentum, out=extrapolated[part.rows])
                        subspaces[i] = subspace
                now, before = before, now
            support = Z != 0
            if schedule.size(step - 1) == 1:
                moved = int((support != support_before).sum()) / max(1, int(support.sum()))
                remaining = schedule.steps - step
                at_rest = exact and remaining >= schedule.hold and moved * remaining <= SETTLED_SHARE * schedule.hold
            if trace_every and step >= traces[0][-1][0] + trace_every:
                for part, norm, subspace, trace in zip(parts, norms, subspaces, traces, strict=True):
                    E = W[part.rows] - Z[part.rows]
                    if subspace is not None:
                        E.addmm_(subspace.U, subspace.factor(P[part.rows]), alpha=-1)
                    trace.append((step, _inner(E, norm.times(E))))
    fits = []
    for part, subspace in zip(parts, subspaces, strict=True):
        empty = W[part.rows, :0]
        fits.append(SparseAndSubspace(Z[part.rows], Subspace(empty, empty) if subspace is None else subspace))
    return RidgeADMM(tuple(fits), step, moved, tuple(tuple(trace) for trace in traces))


def _inner(X: Tensor, Y: Tensor) -> float:
    """Compute the inner product of two matrices, summed in float64."""
    return float((X * Y).sum(dtype=torch.float64))
