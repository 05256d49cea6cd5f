"""Put whole layers on grids as published: every number to its nearest level, or one sweep over the columns (GPTQ).

Their grids have a level at zero and reach the largest number of every group, as in the programs that round so.
"""

from __future__ import annotations

from torch import Tensor

from globalopt.kernels.grid import largest_scales, snap, spread
from globalopt.protocols import Rounding
from globalopt.rounding.stored import GridNorm, stored, without_zeros
from globalopt.values.decomposition import Decomposition
from globalopt.values.layer import NM
from globalopt.values.metric import Metric
from globalopt.values.storage import GROUP, Scales, Storage


def on_grid(
    rounding: Rounding,
    value: Decomposition,
    weight: Tensor,
    metric: Metric,
    storage: Storage,
    pattern: NM | None = None,
) -> Decomposition:
    """Round a decomposition of `weight` (d_out, d_in) to the grids of `storage`, as its solver says.

    Args:
        rounding: `FITTED` is `stored`; the others are for whole layers.
        metric: the norm of the error.
        pattern: of `S`.

    >>> import torch
    >>> from globalopt.values.metric import Gram
    >>> W = torch.tensor([[1.4, 0.7]])
    >>> metric = Metric(Gram(torch.tensor([[1.0, 0.9], [0.9, 1.0]]), tokens=100))
    >>> value, bits = Decomposition(W, W[:, :0], W[:0]), Storage(3, 3)
    >>> [bool(on_grid(how, value, W, metric, bits).S.ne(0).all()) for how in Rounding]
    [True, True, True]
    """
    if rounding is Rounding.FITTED or not value.nnz:
        return stored(value, weight, metric, storage, pattern)
    S, scale = value.S.float(), None
    if storage.values < 16:
        S, scale = _whole(S, metric, storage.values, sweep=rounding is Rounding.SWEEP)
    return Decomposition(S, value.U, value.V, scales=Scales(storage, scale, None, None))


def _whole(W: Tensor, metric: Metric, bits: int, sweep: bool) -> tuple[Tensor, Tensor]:
    """Round all entries of `W` (d_out, d_in), and return the levels and the scales of their groups."""
    W = without_zeros(W)
    scales = largest_scales(W.flatten(), bits, GROUP)
    grids = spread(scales, GROUP, W.numel()).view_as(W)
    if not sweep:
        return snap(W, grids, bits), scales
    return GridNorm.of(metric.inputs.matrix.float()).sweep(W, grids, bits), scales
