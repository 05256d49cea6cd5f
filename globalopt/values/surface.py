"""Tabulate the predicted loss of one layer at every option."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from globalopt.errors import NumericalError, UsageError
from globalopt.values.budget import Budget, Target
from globalopt.values.layer import LayerSpec
from globalopt.values.storage import Storage


@dataclass(frozen=True)
class ErrorSurface:
    """Tabulate the predicted loss of one layer at every option; it need not be monotone.

    Args:
        spec: the layer.
        targets: the options, with distinct `(rank, nnz, storage)`.
        error: one per option, >= 0: predicted loss in nats per token where the sensitivity of the loss was estimated,
            else the output error `tr(E G Eᵀ)`.
    Raises:
        NumericalError: there is no option, not one error per option, or an error that is negative or not finite.
        UsageError: an option does not fit the layer.

    >>> spec = LayerSpec("q_proj", 0, "q_proj", "q_proj", d_out=64, d_in=64)
    >>> surface = ErrorSurface(spec, (Target(0, 0), Target(0, 2048), Target(0, 4096)), error=(0.4, 0.1, 0.0))
    >>> surface.predict(Target(0, 1024))
    0.25
    """

    spec: LayerSpec
    targets: tuple[Target, ...]
    error: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.targets or len(self.targets) != len(self.error):
            raise NumericalError(f"Layer {self.spec.name}: {len(self.targets)} options, {len(self.error)} errors.")
        if not all(math.isfinite(e) and e >= 0 for e in self.error):
            raise NumericalError(f"Layer {self.spec.name}: a predicted error is negative or not finite.")
        if any(target.pattern is not None for target in self.targets):
            for target in self.targets:
                target.check(self.spec)
        else:
            # The largest values alone tell whether all fit; of those that do not, the first is named.
            most = max(t.rank for t in self.targets), max(t.nnz for t in self.targets)
            if most[0] > self.spec.max_rank or most[1] > self.spec.numel:
                for target in self.targets:
                    target.check(self.spec)

    @cached_property
    def storages(self) -> tuple[Storage, ...]:
        """The storages of the options, most bits first."""
        return tuple(sorted({target.storage for target in self.targets}, reverse=True))

    @cached_property
    def arrays(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """The storages (places in `storages`), ranks, nonzeros and errors of the options, in this order; read only."""
        places = {storage: place for place, storage in enumerate(self.storages)}
        storage = np.array([places[target.storage] for target in self.targets], np.int64)
        rank = np.array([target.rank for target in self.targets], np.int64)
        nnz = np.array([target.nnz for target in self.targets], np.int64)
        order = np.lexsort((nnz, rank, storage))
        return storage[order], rank[order], nnz[order], np.array(self.error)[order]

    @cached_property
    def _rows(self) -> dict[Storage, tuple[list[int], list[tuple[list[int], list[float]]]]]:
        """Sort the options of every storage into ranks, and for every rank into ascending nonzeros and their errors."""
        by_rank: dict[Storage, dict[int, list[tuple[int, float]]]] = {}
        for target, error in zip(self.targets, self.error, strict=True):
            by_rank.setdefault(target.storage, {}).setdefault(target.rank, []).append((target.nnz, error))
        found = {}
        for storage, of_rank in by_rank.items():
            ranks, rows = sorted(of_rank), []
            for rank in ranks:
                points = sorted(of_rank[rank])
                rows.append(([n for n, _ in points], [e for _, e in points]))
            found[storage] = ranks, rows
        return found

    def predict(self, target: Target) -> float:
        """Interpolate the loss of any target: linearly between options in nnz, then in rank; constant outside them.

        Raises:
            UsageError: there is no option in the target's storage.
        """
        if target.storage not in self._rows:
            raise no_option(self.spec, target.storage, self.storages)
        ranks, rows = self._rows[target.storage]
        # Only the neighbours in rank matter.
        right = bisect.bisect_left(ranks, target.rank)
        near = slice(max(0, right - 1), right + 1)
        at = [interpolate(nnz, error, target.nnz) for nnz, error in rows[near]]
        return interpolate(ranks[near], at, target.rank)

    def narrowed(self, storage: Storage) -> ErrorSurface:
        """Return the surface with the options of one storage alone."""
        pairs = [(t, e) for t, e in zip(self.targets, self.error, strict=True) if t.storage == storage]
        return ErrorSurface(self.spec, tuple(t for t, _ in pairs), tuple(e for _, e in pairs))

    def frontier(self, budget: Budget) -> tuple[tuple[Target, int, float], ...]:
        """Select the undominated options as `(target, cost, error)`: costs strictly ascend, errors strictly descend."""
        options = sorted(
            ((budget.cost(t, self.spec), e, t.rank, t.nnz, t) for t, e in zip(self.targets, self.error, strict=True)),
            key=lambda o: o[:4],
        )
        kept: list[tuple[Target, int, float]] = []
        for cost, error, _, _, target in options:
            if not kept or error < kept[-1][2]:
                kept.append((target, cost, error))
        return tuple(kept)


def no_option(spec: LayerSpec, storage: Storage, menu: Iterable[Storage]) -> UsageError:
    """Make the error of a layer that has no option in a storage, but in those of a menu.

    >>> no_option(LayerSpec("up", 0, "up", "up", 8, 8), Storage(4, 8), [Storage(), Storage(8, 8)])
    UsageError('Layer up has no option in 4/8 bits; there are 16, 8.')
    """
    return UsageError(f"Layer {spec.name} has no option in {storage} bits; there are {', '.join(map(str, menu))}.")


def interpolate(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """Interpolate linearly through the points `(xs, ys)`, `xs` ascending; the result is constant outside them.

    >>> interpolate([0.0, 10.0], [4.0, 2.0], 5.0)
    3.0
    >>> interpolate([0.0, 10.0], [4.0, 2.0], 50.0)
    2.0
    """
    right = bisect.bisect_left(xs, x)
    if right == 0:
        return ys[0]
    if right == len(xs):
        return ys[-1]
    t = (x - xs[right - 1]) / (xs[right] - xs[right - 1])
    return ys[right - 1] + t * (ys[right] - ys[right - 1])
