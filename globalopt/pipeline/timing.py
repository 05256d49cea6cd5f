"""Time a matrix product, a solver and a span on small matrices, for the estimates of a dry run."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from globalopt.analysis.spans import compute_span
from globalopt.errors import GlobalOptError
from globalopt.kernels.grid import fit_scales
from globalopt.protocols import Solver
from globalopt.rounding.published import on_grid
from globalopt.rounding.stored import GridNorm
from globalopt.values.budget import Target
from globalopt.values.decomposition import Decomposition
from globalopt.values.layer import LayerSpec
from globalopt.values.metric import Gram, Metric
from globalopt.values.storage import GROUP, Storage

SIDE = 256
"""Outputs, and inputs, of the layer with which a solver is timed."""

BITS = 4
"""Bits of the values in which a rounding is timed."""

CALLS = 512
"""Rows whose operations take as long as the calls of a column."""

JOINT_CALLS = 8 * CALLS
"""The same where rows are moved in blocks too."""

PRODUCT = 1024
"""Rows, and columns, of the matrices whose product is timed."""


def rate(device: torch.device, rows: int = PRODUCT) -> float:
    """Measure the floating-point operations per second of a product (`rows`, `PRODUCT`) by (`PRODUCT`, `PRODUCT`).

    >>> rate(torch.device("cpu")) > 1e6
    True
    """
    one = torch.rand(PRODUCT, PRODUCT, generator=torch.Generator().manual_seed(0)).to(device)
    return 2 * rows * PRODUCT**2 / _timed(lambda: one[:rows] @ one)


def fit_seconds(solver: Solver, kept: float, device: torch.device, weighted: bool = False) -> float:
    """Measure the seconds of solving one layer of `SIDE` x `SIDE`; 0.0 if no such layer meets the budget.

    Args:
        solver: with a low-rank part, a tenth of the kept parameters is rank.
        kept: fraction kept.
        weighted: whether there is an output Gram, with which a step may have several times as many products.

    >>> from solvers import get_solver
    >>> fit_seconds(get_solver("wanda"), 0.5, torch.device("cpu")) > 0
    True
    """
    numel = SIDE * SIDE
    rank = int(0.1 * kept * SIDE / 2) if solver.low_rank else 0
    if not solver.sparse:
        rank = max(1, int(kept * SIDE / 2))
    nnz = int(kept * numel) - 2 * SIDE * rank if solver.sparse else 0
    if nnz >= numel:
        return 0.0
    target = Target(max(1, rank), max(0, nnz - 2 * SIDE), signs=True) if solver.signs else Target(rank, nnz)
    weight, metric = _weight(device), Metric(_gram(device), _gram(device) if weighted else None)
    try:
        return _timed(lambda: solver.solve(solver.prepare(weight, metric), target))
    except GlobalOptError:
        # The model's own layers may meet a budget that a layer of this size does not.
        return 0.0


def grid_fit_seconds(device: torch.device) -> float:
    """Measure the seconds of fitting the weight of one layer of `SIDE` x `SIDE` to a grid.

    >>> grid_fit_seconds(torch.device("cpu")) > 0
    True
    """
    weight, gram = _weight(device), _gram(device).matrix
    return _timed(lambda: GridNorm.of(gram).fit(weight, weight, BITS))


def scale_seconds(device: torch.device) -> float:
    """Measure the seconds per number of choosing the scales of groups.

    >>> scale_seconds(torch.device("cpu")) > 0
    True
    """
    numbers = _weight(device).flatten()
    return _timed(lambda: fit_scales(numbers, BITS, GROUP, numbers.square())) / len(numbers)


def rounding_seconds(solver: Solver, kept: float, device: torch.device, weighted: bool = False) -> float:
    """Measure the seconds of rounding one solved layer of `SIDE` x `SIDE` to few bits, as the solver has it rounded.

    Args:
        kept: fraction kept.
        weighted: whether there is an output Gram.

    >>> from solvers import get_solver
    >>> rounding_seconds(get_solver("gptq"), 1.0, torch.device("cpu")) > 0
    True
    """
    weight, metric = _weight(device), Metric(_gram(device), _gram(device) if weighted else None)
    rank = max(1, int(0.1 * kept * SIDE / 2)) if solver.low_rank else 0
    U, s, Vh = torch.linalg.svd(weight)
    sparse = weight * (weight.abs() >= weight.abs().flatten().quantile(max(0.0, 1 - kept)))
    value = Decomposition(sparse, U[:, :rank] * s[:rank], Vh[:rank])
    storage = Storage(BITS, 8)
    return _timed(lambda: on_grid(solver.rounding, value, weight, metric, storage))


def span_seconds(device: torch.device) -> float:
    """Measure the seconds of computing the span of a layer of `SIDE` x `SIDE`.

    >>> span_seconds(torch.device("cpu")) > 0
    True
    """
    return _timed(lambda: compute_span(_weight(device), _gram(device)))


def size(spec: LayerSpec) -> float:
    """Compute the time of a layer in units of that of a `SIDE` x `SIDE` layer.

    Solvers and spans take time in proportion to `d_out d_in (d_out + d_in)`.

    >>> size(LayerSpec("up", 0, "in", "up", SIDE, SIDE)), size(LayerSpec("up", 0, "in", "up", 2 * SIDE, 2 * SIDE))
    (1.0, 8.0)
    """
    return spec.numel * (spec.d_out + spec.d_in) / (2 * SIDE**3)


def column_size(spec: LayerSpec, joint: bool = False) -> float:
    """Compute the time of rounding a layer column by column, in units of that of a `SIDE` x `SIDE` layer.

    A column costs its rows, and calls that take as long as `CALLS` rows do: more where rows move in blocks (`joint`).
    On one thread, with products added, six shapes from 192 x 576 to 2048 x 2048 took .6 to 1.2 times this.

    >>> column_size(LayerSpec("up", 0, "in", "up", SIDE, SIDE)), column_size(LayerSpec("up", 0, "in", "up", SIDE, 512))
    (1.0, 2.0)
    """
    calls = JOINT_CALLS if joint else CALLS
    return spec.d_in * (spec.d_out + calls) / (SIDE * (SIDE + calls))


def _timed(compute: Callable[[], object]) -> float:
    """Measure the shorter of two runs, in seconds."""
    times = []
    for _ in range(2):
        started = time.perf_counter()
        compute()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def _weight(device: torch.device) -> torch.Tensor:
    """Draw a random weight (`SIDE`, `SIDE`)."""
    return torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0)).to(device)


def _gram(device: torch.device) -> Gram:
    """Compute the Gram of random inputs of unequal scales."""
    x = torch.randn(4 * SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 2, SIDE)
    matrix = x.mT @ x / len(x)
    return Gram((matrix + matrix.mT).div(2).to(device), len(x))
