"""Measure what a layer loses by storing its numbers in few bits, at its anchor solutions and for the dense weight.

The solutions are there already: their values are rounded, and what that adds is measured in the metric of the predicted
loss. A fit on the grid left .1 to .9 of what rounding to the nearest level adds in six layers of the bundled model,
much the same part at 3, 4 and 5 bits; so it is made at `FITTED` bits alone, for the dense weight and for one sparse
solution, and all others are taken in proportion. What rows save by making up for each other (`joint_descent`) depends
on the kind of layer: it is measured on one layer of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from globalopt.analysis.layer_analysis import LayerAnalysis
from globalopt.analysis.solver_gap import sampled
from globalopt.kernels.cholesky import damped_cholesky
from globalopt.kernels.grid import fit_scales, grid_noise, snap, spread
from globalopt.kernels.grid_fit import joint_descent
from globalopt.kernels.low_rank import balanced
from globalopt.rounding.stored import DAMPING, PASSES, GridNorm, spread_over
from globalopt.values.decomposition import Decomposition
from globalopt.values.layer import LayerSpec
from globalopt.values.metric import Metric
from globalopt.values.rounding_losses import RoundingLosses
from globalopt.values.storage import BITS, GROUP

VERSION = 2
"""Raised whenever measured rounding losses change."""

FITTED = 4
"""Bits at which a fit on the grid is compared with rounding to the nearest level."""

FEW = tuple(bits for bits in BITS if bits < 16)


def rounding_losses(analysis: LayerAnalysis, specs: Sequence[LayerSpec]) -> Iterator[tuple[LayerSpec, RoundingLosses]]:
    """Measure the rounding losses of the layers `specs`, in the unit of their predicted losses.

    Args:
        analysis: with Grams and, where they were computed, output Grams and anchor solutions; without anchor solutions
            the dense weight alone is rounded.

    >>> from pathlib import Path
    >>> import torch
    >>> from globalopt.analysis.collect import write_grams, write_spans
    >>> from globalopt.analysis.anchors import solve_anchors
    >>> from globalopt.models.layers import find_layers
    >>> from globalopt.models.walk import Batch, BlockRunner
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
    norms: dict[str, GridNorm] = {}
    joint = _joint_shares(analysis)
    for spec in specs:
        weight, metric = analysis.layers.weight(spec.name).float(), analysis.loss_metric(spec)
        if spec.site not in norms:
            # Layers of one site follow each other.
            norms = {spec.site: GridNorm.of(metric.inputs.matrix.float())}
        norm, scale = norms[spec.site], 1.0 if metric.outputs is None else 0.5
        sparse, ranked = _solutions(analysis, spec)
        kept: list[float] = []
        values: dict[int, list[float]] = {bits: [] for bits in FEW}
        of_kind = joint.get(spec.kind, 1.0)
        share = _fitted_share(sparse[len(sparse) // 2].S.to(weight.device).float(), metric, norm) if sparse else 1.0
        for value in sparse:
            S = value.S.to(weight.device).float()
            kept.append(value.nnz / spec.numel)
            for bits in FEW:
                values[bits].append(scale * of_kind * share * _nearest_loss(S, metric, norm, bits))
        kept.append(int(weight.count_nonzero()) / spec.numel)
        share = _fitted_share(weight, metric, norm)
        for bits in FEW:
            values[bits].append(scale * of_kind * share * _nearest_loss(weight, metric, norm, bits))
        noise = {bits: scale * metric.error(grid_noise(weight, bits, GROUP)) for bits in FEW}
        factors = {bits: tuple(scale * _factor_loss(value, metric, bits) for value in ranked) for bits in FEW}
        yield (
            spec,
            RoundingLosses(
                tuple(kept),
                {bits: tuple(losses) for bits, losses in values.items()},
                tuple(value.rank for value in ranked),
                factors,
                noise,
            ),
        )


def _solutions(analysis: LayerAnalysis, spec: LayerSpec) -> tuple[list[Decomposition], list[Decomposition]]:
    """Read the anchor solutions whose values are rounded, of rank 0, and those whose factors are, by ascending rank."""
    if not analysis.solved_anchors(spec):
        return [], []
    found = [*analysis.work.get(analysis.anchors(spec), spec).values]
    sparse = [value for value in found if not value.rank and 0 < value.nnz < spec.numel]
    by_rank = {value.rank: value for value in found if value.rank}
    return sorted(sparse, key=lambda value: value.nnz), [by_rank[rank] for rank in sorted(by_rank)]


def _nearest_loss(S: Tensor, metric: Metric, norm: GridNorm, bits: int) -> float:
    """Compute the error that rounding the values of `S` to their nearest levels adds."""
    support = S != 0
    numbers = S[support]
    weights = norm.matrix.diagonal().expand_as(S)[support]
    scales = spread(fit_scales(numbers, bits, GROUP, weights), GROUP, len(numbers))
    return metric.error(torch.zeros_like(S).masked_scatter_(support, numbers - snap(numbers, scales, bits)))


def _fitted_share(S: Tensor, metric: Metric, norm: GridNorm) -> float:
    """Compute the part of what rounding `S` to its nearest levels adds that a fit row by row leaves."""
    nearest = _nearest_loss(S, metric, norm, FITTED)
    return min(1.0, metric.error(S - norm.fit(S, S, FITTED)[0]) / nearest) if nearest > 0 else 1.0


def _joint_shares(analysis: LayerAnalysis) -> dict[str, float]:
    """Compute by kind of layer the part of a rounding error row by row that `joint_descent` leaves of it.

    Where a layer is solved without its output Gram it is 1; of a kind that has no layer in the middle block too.
    """
    found = {}
    for spec in sampled(analysis.layers.specs):
        metric = analysis.metric(spec)
        if metric.outputs is not None:
            weight, norm = analysis.layers.weight(spec.name).float(), GridNorm.of(metric.inputs.matrix.float())
            A = damped_cholesky(metric.outputs.matrix.float(), DAMPING).matrix
            levels, scales = norm.fit(weight, weight, FITTED)
            grids = spread_over(levels, scales)
            joint = joint_descent(weight, levels, grids, FITTED, norm.matrix, A, PASSES)
            before = metric.error(weight - levels)
            found[spec.kind] = metric.error(weight - joint) / before if before > 0 else 1.0
    return found


def _factor_loss(value: Decomposition, metric: Metric, bits: int) -> float:
    """Compute the error that rounding both factors to their nearest levels adds."""
    device = metric.inputs.matrix.device
    U, V = balanced(value.U.to(device).float(), value.V.to(device).float())
    found = []
    for numbers in (U.mT.flatten(), V.flatten()):
        scales = spread(fit_scales(numbers, bits, GROUP), GROUP, len(numbers))
        found.append(snap(numbers, scales, bits))
    return metric.error(U @ V - found[0].view(U.mT.shape).mT @ found[1].view(V.shape))
