"""Measure what a layer loses by storing its numbers in few bits, at its anchor solutions and for the dense weight.

The solutions are there already: their values are rounded to the nearest levels, and what that adds is taken as if these
errors were uncorrelated (`Metric.uncorrelated_error`). In the metric itself it was the same in the median over the 35
layers of stories260K, .97 to 1.03 at 3 to 8 bits, and by chance .5 to 3.6 times as much in its smallest layers.

A fit on the grid left .1 to .9 of what rounding to the nearest level adds in six layers of the bundled model,
much the same part at 3, 4 and 5 bits; so it is made at `FITTED` bits alone, for the dense weight and for one sparse
solution, and all others are taken in proportion. What rows save by making up for each other (`joint_descent`), and what
factors save that are fitted to what rounding leaves, depends on the kind of layer: it is measured on one of each.

A layer that was solved at one anchor takes what rounding adds at the others from the `NEIGHBOURS` nearest of its kind,
as the median of its logarithm beside what was measured. In SmolLM2-135M, where one of eleven such blocks is left out,
it differs from what is measured there by (root mean square) .1 to .2 in gates and up projections, .03 to .05 with half
of the weights kept, and by .1 to .6 in attention, where factors are the worst. A line through the nearest two is worse,
as the down projection of one block, which sees huge inputs, is unlike all others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor

from globalopt.analysis.layer_analysis import LayerAnalysis
from globalopt.analysis.solver_gap import sampled
from globalopt.kernels.cholesky import damped_cholesky
from globalopt.kernels.grid import fit_scales, grid_noise, snap, spread
from globalopt.kernels.grid_fit import joint_descent
from globalopt.kernels.low_rank import balanced
from globalopt.machine import ranks
from globalopt.rounding.stored import DAMPING, PASSES, GridNorm, spread_over, stored
from globalopt.runs.artefacts import ROUNDING
from globalopt.values.budget import Target
from globalopt.values.decomposition import Decomposition
from globalopt.values.layer import LayerSpec
from globalopt.values.metric import Metric
from globalopt.values.rounding_losses import RoundingLosses
from globalopt.values.storage import BITS, GROUP, Storage
from globalopt.values.surface import interpolate

VERSION = 6
"""Raised whenever measured rounding losses change."""

FITTED = 4
"""Bits at which a fit on the grid is compared with rounding to the nearest level."""

OF_FACTORS = 6
"""Bits of factors at which a fit of these is compared with rounding to the nearest level."""

LEAST = 0.05
"""Parts that a fit leaves are no less: small ones are differences of nearly equal errors."""

NEIGHBOURS = 5
"""Layers from which a layer that was solved at one anchor takes what rounding adds at the others."""

TINY = 1e-12
"""Ratios whose logarithms are taken are no less."""

FEW = tuple(bits for bits in BITS if bits < 16)


def rounding_losses(analysis: LayerAnalysis, specs: Sequence[LayerSpec]) -> Iterator[tuple[LayerSpec, RoundingLosses]]:
    """Measure the rounding losses of the layers `specs`, in the unit of their predicted losses.

    Args:
        analysis: with Grams and, where they were computed, output Grams and anchor solutions; without anchor solutions
            the dense weight alone is rounded.

    >>> from pathlib import Path
    >>> import torch
    >>> from globalopt.analysis.anchors import solve_anchors
    >>> from globalopt.analysis.collect import write_grams, write_spans
    >>> from globalopt.models.batch import Batch
    >>> from globalopt.models.block_runner import BlockRunner
    >>> from globalopt.models.finding import find_layers
    >>> from globalopt.reference.tiny import tiny_llama
    >>> from globalopt.runs.workspace import Workspace
    >>> from solvers import get_solver
    >>> layers = find_layers(tiny_llama(), allow_low_coverage=True)
    >>> analysis = LayerAnalysis(layers, Workspace(Path("work")))
    >>> write_grams(BlockRunner(layers, [Batch(torch.arange(64).view(4, 16))]), analysis.work)
    >>> write_spans(layers, analysis.work, layers.specs[:1], "activation")
    >>> solve_anchors(analysis, layers.specs[:1], get_solver("3basil", {"steps": "5"}))
    >>> ((spec, losses),) = rounding_losses(analysis, layers.specs[:1])
    >>> losses.kept[-1], losses.values[8] < losses.values[3], len(losses.ranks)
    (1.0, True, 1)
    """
    kinds = _of_kinds(analysis)
    lacking: list[LayerSpec] = []
    found: dict[str, RoundingLosses] = {}
    for spec, norm in _with_norms(analysis, specs):
        if analysis.lacks_anchors(spec):
            lacking.append(spec)
            continue
        found[spec.name] = _measure(analysis, spec, norm, kinds.get(spec.kind, NO_FITS), *_solutions(analysis, spec))
        yield spec, found[spec.name]
    if any(ranks.gathered(bool(lacking))):
        # What was measured at all anchors came first; some of it in an earlier call.
        known = ranks.merged(found)
        every = [spec for spec in analysis.layers.specs if not analysis.lacks_anchors(spec)]
        measured = [(spec, known.get(spec.name) or analysis.work.get(ROUNDING, spec)) for spec in every]
        for spec, norm in _with_norms(analysis, lacking):
            own = _measure(analysis, spec, norm, kinds.get(spec.kind, NO_FITS), _solutions(analysis, spec)[0])
            yield spec, _completed(spec, own, analysis.options(spec).anchors, measured)


def _with_norms(analysis: LayerAnalysis, specs: Sequence[LayerSpec]) -> Iterator[tuple[LayerSpec, GridNorm]]:
    """Make the norm in which each layer is rounded; layers of one site follow each other and share one."""
    site, norm = None, None
    for spec in specs:
        if norm is None or spec.site != site:
            site, norm = spec.site, GridNorm.of(analysis.loss_metric(spec).inputs.matrix.float())
        yield spec, norm


def _measure(
    analysis: LayerAnalysis,
    spec: LayerSpec,
    norm: GridNorm,
    fits: _Fits,
    sparse: Sequence[Decomposition] = (),
    ranked: Sequence[Decomposition] = (),
) -> RoundingLosses:
    """Measure what rounding the values of `sparse` adds, the factors of `ranked`, and the dense weight."""
    weight, metric = analysis.layers.weight(spec.name).float(), analysis.loss_metric(spec)
    scale = 1.0 if metric.outputs is None else 0.5
    kept: list[float] = []
    nearest: list[dict[int, float]] = []
    shares: list[float] = []
    for number, value in enumerate((*sparse, None)):
        S = weight if value is None else value.S.to(weight.device).float()
        kept.append(int(S.count_nonzero()) / spec.numel)
        nearest.append(_nearest_losses(S, metric, norm, FEW))
        # Of the sparse solutions the middle one is fitted, for all of them.
        if number in (len(sparse) // 2, len(sparse)):
            shares.append(_fitted_share(S, nearest[-1][FITTED], metric, norm))
    left = (*(shares[0] for _ in sparse), shares[-1])
    noise = {bits: scale * metric.uncorrelated_error(grid_noise(weight, bits, GROUP)) for bits in FEW}
    factors = {
        bits: tuple(scale * fits.factors * _factor_loss(value, metric, bits) for value in ranked) for bits in FEW
    }
    return RoundingLosses(
        tuple(kept),
        {
            bits: tuple(scale * fits.joint * share * each[bits] for share, each in zip(left, nearest, strict=True))
            for bits in FEW
        },
        tuple(value.rank for value in ranked),
        factors,
        noise,
        fits.ranked,
        fits.share,
    )


def _solutions(analysis: LayerAnalysis, spec: LayerSpec) -> tuple[list[Decomposition], list[Decomposition]]:
    """Read the anchor solutions whose values are rounded, of rank 0, and those whose factors are, by ascending rank."""
    if not analysis.solved_anchors(spec):
        return [], []
    found = [*analysis.work.get(analysis.anchors(spec), spec).values]
    sparse = [value for value in found if not value.rank and 0 < value.nnz < spec.numel]
    by_rank = {value.rank: value for value in found if value.rank}
    return sorted(sparse, key=lambda value: value.nnz), [by_rank[rank] for rank in sorted(by_rank)]


def _nearest_losses(S: Tensor, metric: Metric, norm: GridNorm, menu: Sequence[int]) -> dict[int, float]:
    """Compute by bits the error that rounding the values of `S` to their nearest levels adds."""
    support = S != 0
    numbers, weights = S[support], norm.matrix.diagonal().expand_as(S)[support]
    found = {}
    for bits in menu:
        scales = spread(fit_scales(numbers, bits, GROUP, weights), GROUP, len(numbers))
        errors = torch.zeros_like(S).masked_scatter_(support, numbers - snap(numbers, scales, bits))
        found[bits] = metric.uncorrelated_error(errors)
    return found


def _nearest_loss(S: Tensor, metric: Metric, norm: GridNorm) -> float:
    """Compute the error that rounding the values of `S` to their nearest levels adds at `FITTED` bits."""
    return _nearest_losses(S, metric, norm, (FITTED,))[FITTED]


def _fitted_share(S: Tensor, nearest: float, metric: Metric, norm: GridNorm) -> float:
    """Compute the part of what rounding `S` to its nearest levels adds, `nearest`, that a fit row by row leaves."""
    return min(1.0, metric.error(S - norm.fit(S, S, FITTED)[0]) / nearest) if nearest > 0 else 1.0


def _completed(
    spec: LayerSpec,
    own: RoundingLosses,
    anchors: Sequence[Sequence[Target]],
    measured: Sequence[tuple[LayerSpec, RoundingLosses]],
) -> RoundingLosses:
    """Add to what was measured of a layer what rounding adds at all of its anchors, as in the nearest of its kind.

    Args:
        own: of the dense weight, and of the middle anchor where that has no rank.
        measured: of layers that were solved at all anchors.
    """
    every = [anchor for row in anchors for anchor in row]
    kept = sorted(anchor.nnz / spec.numel for anchor in every if anchor.nnz and not anchor.rank)
    of_rank = tuple(sorted({anchor.rank for anchor in every if anchor.rank}))
    alike = [
        (abs(other.block - spec.block), losses)
        for other, losses in measured
        if other.kind == spec.kind
        and (len(losses.kept), len(losses.ranks)) == (len(kept) + 1, len(of_rank))
        # Rounding adds nothing where all inputs are zero.
        and min(map(min, losses.values.values())) > 0
    ]
    nearest = [losses for _, losses in sorted(alike, key=lambda pair: pair[0])[:NEIGHBOURS]]
    if not nearest:
        return own
    *here, whole = own.kept
    known = len(kept) // 2 if here else len(kept)
    values, factors = {}, {}
    for bits, losses in own.values.items():
        level, middle, dense = losses[0], losses[:-1], losses[-1]
        logs = zip(*(_beside(other, bits, known) for other in nearest), strict=True)
        below, above, ranked = ([math.exp(median(each)) for each in zip(*part, strict=True)] for part in logs)
        between = (level * dense) ** 0.5
        values[bits] = (*(level * x for x in below), *middle, *(between * x for x in above), dense)
        factors[bits] = tuple(level * x for x in ranked)
    kept[known : known + 1] = here
    return replace(own, kept=(*kept, whole), values=values, ranks=of_rank, factors=factors)


def _beside(losses: RoundingLosses, bits: int, known: int) -> tuple[list[float], list[float], list[float]]:
    """Compute the logarithms of what rounding adds beside what it adds at the anchor `known`, or to the dense weight.

    Returns:
        of the values at the anchors that keep less; of those that keep more, beside the geometric mean of that anchor
        and the dense weight; of the factors.
    """
    level, dense = losses.values[bits][known], losses.values[bits][-1]

    def logs(added: Sequence[float], beside: float) -> list[float]:
        return [math.log(max(loss / beside, TINY)) for loss in added]

    values = losses.values[bits][:-1]
    between = (level * dense) ** 0.5
    return logs(values[:known], level), logs(values[known + 1 :], between), logs(losses.factors[bits], level)


@dataclass(frozen=True)
class _Fits:
    """Hold what a fit leaves of a rounding error, as measured on one layer of a kind.

    Args:
        joint: the part of an error row by row that `joint_descent` leaves; 1 of a layer solved without output Gram.
        ranked, share: as in `RoundingLosses`.
        factors: the part of the error of factors at their nearest levels.
    """

    joint: float = 1.0
    ranked: float = 1.0
    share: float = 1.0
    factors: float = 1.0


NO_FITS = _Fits()
"""Of a kind that has no layer in the middle block."""


def _of_kinds(analysis: LayerAnalysis) -> dict[str, _Fits]:
    """Measure by kind of layer what fits leave of rounding errors; processes share the kinds."""
    found = {}
    for spec in ranks.share(sampled(analysis.layers.specs), LayerSpec.solve_cost):
        metric, weight = analysis.metric(spec), analysis.layers.weight(spec.name).float()
        norm = GridNorm.of(metric.inputs.matrix.float())
        fits = _Fits(joint=_joint_share(weight, metric, norm))
        sparse, ranked = _solutions(analysis, spec)
        if sparse and ranked:
            fits = replace(fits, **_beside_factors(spec, weight, metric, norm, sparse[-1], ranked[-1]))
        found[spec.kind] = fits
    return ranks.merged(found)


def _joint_share(weight: Tensor, metric: Metric, norm: GridNorm) -> float:
    """Compute the part of a rounding error of the dense weight row by row that `joint_descent` leaves of it."""
    if metric.outputs is None:
        return 1.0
    A = damped_cholesky(metric.outputs.matrix.float(), DAMPING).matrix
    levels, scales = norm.fit(weight, weight, FITTED)
    joint = joint_descent(weight, levels, spread_over(levels, scales), FITTED, norm.matrix, A, PASSES)
    before = metric.error(weight - levels)
    return metric.error(weight - joint) / before if before > 0 else 1.0


def _beside_factors(
    spec: LayerSpec, weight: Tensor, metric: Metric, norm: GridNorm, sparse: Decomposition, ranked: Decomposition
) -> dict[str, float]:
    """Compare what rounding adds to a solution with rank and to one without, which keep about as much."""
    target = Target(ranked.rank, ranked.nnz)
    sparse, ranked = (_in_float32(value, weight.device) for value in (sparse, ranked))

    def added(value: Decomposition, storage: Storage) -> float:
        exact = metric.error(weight - value.dense())
        return metric.error(weight - stored(value, weight, metric, storage).dense()) - exact

    # Factors in few bits have a loss of their own, which is added by `factors`.
    storage = Storage(FITTED, 16)
    plain, beside = added(sparse, storage), added(ranked, storage)
    # The solution without rank keeps a little more or less: its error is taken along its curve to what the other keeps.
    ends = (0.0, sparse.nnz / spec.numel, 1.0)
    losses = (0.0, *(_nearest_loss(S, metric, norm) for S in (sparse.S, weight)))
    kept = interpolate(ends, losses, target.params(spec) / spec.numel)
    if plain <= 0 or losses[1] <= 0 or kept <= 0:
        return {}
    ratio = beside / (plain * kept / losses[1])
    nearest, fitted = _factor_loss(ranked, metric, OF_FACTORS), added(ranked, Storage(16, OF_FACTORS))
    factors = min(1.0, max(LEAST, fitted / nearest)) if nearest > 0 else 1.0
    return {"ranked": max(LEAST, ratio), "share": target.rank_share(spec), "factors": factors}


def _in_float32(value: Decomposition, device: torch.device) -> Decomposition:
    """Move a solution to where its layer is, in float32."""
    S, U, V = (part.to(device).float() for part in (value.S, value.U, value.V))
    return Decomposition(S, U, V)


def _factor_loss(value: Decomposition, metric: Metric, bits: int) -> float:
    """Compute the error that rounding both factors to their nearest levels adds.

    With `E_U` and `E_V` the rounding errors of the factors, it is that of `E_U V + (U - E_U) E_V`, a product of two
    matrices of twice the rank: `tr(A E G Eᵀ)` takes no product of the size of the layer.
    """
    device = metric.inputs.matrix.device
    U, V = balanced(value.U.to(device).float(), value.V.to(device).float())
    errors = []
    for numbers in (U.mT.flatten(), V.flatten()):
        scales = spread(fit_scales(numbers, bits, GROUP), GROUP, len(numbers))
        errors.append(numbers - snap(numbers, scales, bits))
    of_U, of_V = errors[0].view(U.mT.shape).mT, errors[1].view(V.shape)
    left, right = torch.cat([of_U, U - of_U], 1), torch.cat([V, of_V])
    outer = left.mT @ (left if metric.outputs is None else metric.outputs.matrix.to(left.dtype) @ left)
    inner = right @ metric.inputs.matrix.to(right.dtype) @ right.mT
    return max(0.0, float((outer.double() * inner.double()).sum()))
