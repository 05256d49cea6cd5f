"""Hold one target per layer as arrays."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Sizes:
    """Hold one target per layer as arrays, in the order of the names of an `OptionTable`.

    Args:
        place: (layers,) int64, the place of every layer's storage in the table.
        rank, nnz: (layers,) int64.

    >>> from allocators.example import example_problem
    >>> from globalopt.values.budget import Target
    >>> table = example_problem().table
    >>> sizes = table.sizes({name: Target(1, 16) for name in table.names})
    >>> sizes.rank.tolist(), sizes.with_layer(0, 2, 8).nnz.tolist()
    ([1, 1, 1, 1], [8, 16, 16, 16])
    """

    place: Ints
    rank: Ints
    nnz: Ints

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sizes) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    @cached_property
    def key(self) -> bytes:
        """The bytes that tell these targets from others of the same layers."""
        return self.place.tobytes() + self.rank.tobytes() + self.nnz.tobytes()

    def with_layer(self, layer: int, rank: int, nnz: int, place: int | None = None) -> Sizes:
        """Return a copy with another rank and other nonzeros of one layer, in its storage or at another `place`."""
        places, ranks, counts = self.place.copy(), self.rank.copy(), self.nnz.copy()
        places[layer], ranks[layer], counts[layer] = self.place[layer] if place is None else place, rank, nnz
        return Sizes(places, ranks, counts)

    @property
    def arrays(self) -> tuple[Ints, Ints, Ints]:
        """The three arrays, as the methods of an `OptionTable` take them."""
        return self.place, self.rank, self.nnz
