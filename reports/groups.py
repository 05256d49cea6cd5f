"""Pool layers by kind and by block, and lay them out on a grid of blocks and kinds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from globalopt.errors import ArtefactError
from globalopt.values.layer_results import LayerPlan, LayerResult
from reports.bits import mean_bits

P = TypeVar("P", bound=LayerPlan)


@dataclass(frozen=True)
class Group:
    """Pool several layers.

    Args:
        label: name of the group.
        layers: how many there are.
        kept: cost over dense cost of all of them, in the budget's accounting.
        density: nonzeros over weights.
        rank: mean over the layers, weighted by their weights.
        rank_share: parameters in low-rank factors over parameters kept.
        bits: mean bits of the parameters kept; None where there are none.
        predicted, actual: sums over the layers; None where a layer has none.
        relative: mean over the layers, weighted by their weights; None for layers that are not refined yet.

    >>> from reports.example import example_layers
    >>> group = Group.pool("all", example_layers())
    >>> group.layers, round(group.kept, 3), round(group.rank, 1)
    (14, 0.457, 5.0)
    """

    label: str
    layers: int
    kept: float
    density: float
    rank: float
    rank_share: float
    bits: float | None
    predicted: float | None
    actual: float | None
    relative: float | None

    @classmethod
    def pool(cls, label: str, layers: Sequence[LayerPlan]) -> Group:
        """Pool at least one layer."""
        sizes = [layer.d_out * layer.d_in for layer in layers]
        weights = sum(sizes)
        nnz = sum(layer.nnz for layer in layers)
        low_rank = sum(layer.rank_params for layer in layers)
        predicted = [layer.predicted for layer in layers if layer.predicted is not None]
        done = [layer for layer in layers if isinstance(layer, LayerResult)]
        measured = len(done) == len(layers)
        return cls(
            label=label,
            layers=len(layers),
            kept=sum(layer.cost for layer in layers) / sum(layer.dense_cost for layer in layers),
            density=nnz / weights,
            rank=sum(size * layer.rank for size, layer in zip(sizes, layers, strict=True)) / weights,
            rank_share=low_rank / (low_rank + nnz) if low_rank + nnz else 0.0,
            bits=mean_bits(layers),
            predicted=math.fsum(predicted) if len(predicted) == len(layers) else None,
            actual=math.fsum(layer.actual for layer in done) if measured else None,
            relative=math.fsum(layer.d_out * layer.d_in * layer.relative for layer in done) / weights
            if measured
            else None,
        )


def by_kind(layers: Sequence[LayerPlan]) -> list[Group]:
    """Pool the layers by kind, in the order in which the kinds first occur in the model.

    >>> from reports.example import example_layers
    >>> [group.label for group in by_kind(example_layers())][:3]
    ['q_proj', 'k_proj', 'v_proj']
    """
    kinds = dict.fromkeys(layer.kind for layer in layers)
    return [Group.pool(kind, [layer for layer in layers if layer.kind == kind]) for kind in kinds]


def by_block(layers: Sequence[LayerPlan]) -> list[Group]:
    """Pool the layers by block, in ascending order.

    >>> from reports.example import example_layers
    >>> [(group.label, group.layers) for group in by_block(example_layers())]
    [('0', 7), ('1', 7)]
    """
    blocks = sorted({layer.block for layer in layers})
    return [Group.pool(str(block), [layer for layer in layers if layer.block == block]) for block in blocks]


def typical(layers: Sequence[P]) -> list[P]:
    """Choose the layers of the largest, the median and the least kept fraction, and one of the highest rank.

    >>> from reports.example import example_layers
    >>> [(layer.block, layer.kind) for layer in typical(example_layers())]
    [(0, 'v_proj'), (1, 'gate_proj'), (0, 'gate_proj'), (1, 'up_proj')]
    """
    ranked = sorted(layers, key=lambda layer: -layer.kept)
    chosen = ranked if len(ranked) <= 3 else [ranked[0], ranked[len(ranked) // 2], ranked[-1]]
    highest = max(ranked, key=lambda layer: layer.rank)
    return chosen if highest.rank == 0 or highest in chosen else [*chosen, highest]


@dataclass(frozen=True)
class Grid(Generic[P]):
    """Lay out layers by block (rows: every block from the first to the last) and kind (columns: in model order).

    >>> from reports.example import example_layers
    >>> grid = Grid.of(example_layers())
    >>> grid.values(lambda layer: layer.rank).shape
    (2, 7)
    """

    blocks: tuple[int, ...]
    kinds: tuple[str, ...]
    cells: Mapping[tuple[int, str], P]

    @classmethod
    def of(cls, layers: Sequence[P]) -> Grid[P]:
        """Lay out at least one layer; `ArtefactError` where two layers have the same block and kind."""
        cells: dict[tuple[int, str], P] = {}
        for layer in layers:
            other = cells.setdefault((layer.block, layer.kind), layer)
            if other is not layer:
                raise ArtefactError(
                    f"The summary has two layers of kind {layer.kind} in block {layer.block}: {other.name} and "
                    f"{layer.name}. Run the search again to rewrite it."
                )
        blocks = [layer.block for layer in layers]
        kinds = dict.fromkeys(layer.kind for layer in layers)
        return cls(tuple(range(min(blocks), max(blocks) + 1)), tuple(kinds), cells)

    def values(self, value: Callable[[P], float]) -> NDArray[np.float64]:
        """Compute `value` of every layer: (blocks, kinds), NaN where a block has no such layer."""
        return np.array(
            [
                [value(self.cells[block, kind]) if (block, kind) in self.cells else math.nan for kind in self.kinds]
                for block in self.blocks
            ]
        )
