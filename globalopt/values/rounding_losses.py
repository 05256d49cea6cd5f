"""Hold what a layer loses by storing its numbers in few bits, and make the error surfaces of all storages of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from globalopt.values.budget import Target
from globalopt.values.layer import HasShape
from globalopt.values.storage import Storage
from globalopt.values.surface import ErrorSurface, interpolate

AUTO_STORAGES = tuple(Storage.parse(text) for text in ("16", "8", "6/8", "5/8", "4/8", "4/6", "3/8", "3/6"))
"""The menu of `--storage auto`. Factors have more bits than values: an error in one entry is one in a whole row."""


@dataclass(frozen=True)
class RoundingLosses:
    """Hold the losses that rounding adds to a layer, in the unit of its error surface.

    Args:
        kept: the fractions of the layer's entries that were in `S`, ascending.
        values: by bits, the loss that rounding the values of `S` adds at each of them, without rank.
        ranks: the ranks at which factors were rounded, ascending; empty where there are none.
        factors: by bits, the loss that rounding the factors adds at each of them.
        ranked: what rounding the values adds beside factors, as a fraction of what it adds where as many parameters are
            all in `S`: the factors are refitted to what rounding leaves, and smaller values remain. share: the share of
            rank at which that is so.
        noise: by bits, the loss of all entries of the dense weight rounded to their nearest levels (`grid_noise`).

    >>> from globalopt.values.layer import LayerSpec
    >>> losses = RoundingLosses((0.5, 1.0), {8: (0.1, 0.1)}, (4,), {8: (0.02,)}, {8: 0.2})
    >>> spec = LayerSpec("up", 0, "up", "up", 10, 10)
    >>> round(losses.added(Target(2, 25, storage=Storage(8, 8)), spec), 3), losses.added(Target(2, 25), spec)
    (0.11, 0.0)
    """

    kept: tuple[float, ...]
    values: Mapping[int, tuple[float, ...]]
    ranks: tuple[int, ...]
    factors: Mapping[int, tuple[float, ...]]
    noise: Mapping[int, float]
    ranked: float = 1.0
    share: float = 1.0

    def added(self, target: Target, spec: HasShape) -> float:
        """Interpolate the loss that rounding adds at a target, linearly in what it keeps and in its rank.

        The logarithm of what rank saves of it is linear in the share of rank up to `share`; beyond, what rounding adds
        is in proportion to the nonzeros that are left.
        """
        storage, found = target.storage, 0.0
        if storage.values < 16 and target.nnz:
            kept = target.params(spec) / spec.numel
            plain = interpolate((0.0, *self.kept), (0.0, *self.values[storage.values]), kept)
            part = target.rank_share(spec) / self.share
            found += plain * (
                self.ranked**part if part <= 1 else self.ranked * (1 - part * self.share) / (1 - self.share)
            )
        if storage.factors < 16 and target.rank and self.ranks:
            levels = (0.0, *self.factors[storage.factors])
            # Beyond the largest rank that was rounded, further components add no more than those before them.
            rank = target.rank / self.ranks[-1]
            found += levels[-1] * rank if rank > 1 else interpolate((0, *self.ranks), levels, target.rank)
        return found


def with_storages(surface: ErrorSurface, losses: RoundingLosses | None, menu: Sequence[Storage]) -> ErrorSurface:
    """Make the error surface of a layer in all storages of a menu from the one in 16 bits.

        error(target) = error in 16 bits + what rounding adds

    A rounding error is uncorrelated with what was dropped, as values are fitted to the weights before they are rounded.

    Args:
        losses: None where nothing is predicted: all storages then have the errors of 16 bits.

    >>> from globalopt.values.layer import LayerSpec
    >>> spec = LayerSpec("up", 0, "up", "up", 10, 10)
    >>> surface = ErrorSurface(spec, (Target(0, 0), Target(0, 50)), (1.0, 0.25))
    >>> losses = RoundingLosses((0.5,), {4: (0.1,)}, (), {}, {4: 0.3})
    >>> with_storages(surface, losses, (Storage(16, 16), Storage(4, 4))).error
    (1.0, 0.25, 1.0, 0.35)
    """
    spec, targets, errors = surface.spec, [], []
    for storage in menu:
        for target, error in zip(surface.targets, surface.error, strict=True):
            rounded = target if storage == target.storage else replace(target, storage=storage)
            targets.append(rounded)
            errors.append(error + (0.0 if losses is None else losses.added(rounded, spec)))
    return ErrorSurface(spec, tuple(targets), tuple(errors))
