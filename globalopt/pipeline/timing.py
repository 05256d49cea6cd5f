"""What a machine takes for a product, a fit and a span, timed on small matrices: what a dry run counts with."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from globalopt.analysis.spans import compute_span
from globalopt.errors import GlobalOptError
from globalopt.protocols import Solver
from globalopt.values.budget import Target
from globalopt.values.layer import LayerSpec
from globalopt.values.metric import Gram, Metric

SIDE = 256
"""Of the layer that is fitted to time a solver."""

PRODUCT = 1024
"""Side of the matrices whose product is timed."""


def rate(device: torch.device) -> float:
    """Floating-point operations per second of a product of two matrices of `PRODUCT` x `PRODUCT`."""
    one = torch.rand(PRODUCT, PRODUCT, generator=torch.Generator().manual_seed(0)).to(device)
    return 2 * PRODUCT**3 / _timed(lambda: one @ one)


def fit_seconds(solver: Solver, kept: float, device: torch.device) -> float:
    """Seconds of one fit of a layer of `SIDE` x `SIDE`, a tenth of what is kept as rank where the solver has one."""
    numel = SIDE * SIDE
    rank = int(0.1 * kept * SIDE / 2) if solver.low_rank else 0
    if not solver.sparse:
        rank = max(1, int(kept * SIDE / 2))
    nnz = int(kept * numel) - 2 * SIDE * rank if solver.sparse else 0
    if nnz >= numel:
        return 0.0
    target = Target(max(1, rank), max(0, nnz - 2 * SIDE), signs=True) if solver.signs else Target(rank, nnz)
    weight, metric = _weight(device), Metric(_gram(device))
    try:
        return _timed(lambda: solver.solve(solver.prepare(weight, metric), target))
    except GlobalOptError:
        # A budget that no layer of this size meets says nothing of the model's own layers.
        return 0.0


def span_seconds(device: torch.device) -> float:
    """Seconds of the span of a layer of `SIDE` x `SIDE`."""
    return _timed(lambda: compute_span(_weight(device), _gram(device)))


def size(spec: LayerSpec) -> float:
    """How many layers of `SIDE` x `SIDE` a layer is worth: fits and spans grow as `d_out d_in (d_out + d_in)`."""
    return spec.numel * (spec.d_out + spec.d_in) / (2 * SIDE**3)


def _timed(compute: Callable[[], object]) -> float:
    """The shorter of two runs, in seconds."""
    times = []
    for _ in range(2):
        started = time.perf_counter()
        compute()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def _weight(device: torch.device) -> torch.Tensor:
    return torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0)).to(device)


def _gram(device: torch.device) -> Gram:
    x = torch.randn(4 * SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 2, SIDE)
    matrix = x.mT @ x / len(x)
    return Gram((matrix + matrix.mT).div(2).to(device), len(x))
