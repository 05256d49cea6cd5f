"""Say which layers of an allocation are at a limit of what the search had on offer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from globalopt.values.layer_results import LayerPlan


@dataclass(frozen=True)
class Menu:
    """Hold the limits of the options that a search offers for a layer, beside the dense and the zero one.

    Args:
        least_kept: smallest fraction of the parameters that an option keeps.
        largest_share: largest share of these that is rank.
        levels: nonzero counts on offer per rank; two of them differ by `1 / levels` of the weights.

    >>> from reports.example import example_layers
    >>> Menu(0.05, 0.1, 64).facts(example_layers())
    [('options', '7 of 14 layers at the largest rank share on offer, 0.1')]
    """

    least_kept: float
    largest_share: float
    levels: int

    def facts(self, layers: Sequence[LayerPlan]) -> list[tuple[str, str]]:
        """List label and value on the layers at a limit; empty where none is, or where another limit holds.

        A layer is at a limit where one step fewer nonzeros, at the same rank, is not on offer. The limits are those of
        free nonzeros: with a pattern, or with ranks alone, there is none of either.
        """
        if any(layer.pattern is not None for layer in layers):
            return []
        free = [layer for layer in layers if 0 < layer.nnz < layer.d_out * layer.d_in]
        shares = sum(self._at_share(layer) for layer in free)
        least = sum(self._at_least(layer) for layer in free)
        said = [
            f"{count} of {len(layers)} layers at the {limit} on offer, {value:g}"
            for limit, value, count in (
                ("largest rank share", self.largest_share, shares),
                ("least kept", self.least_kept, least),
            )
            if count
        ]
        return [("options", "; ".join(said))] if said else []

    def _at_share(self, layer: LayerPlan) -> bool:
        fewer = layer.nnz - self._step(layer)
        return layer.rank_params > self.largest_share * (layer.rank_params + fewer)

    def _at_least(self, layer: LayerPlan) -> bool:
        fewer = layer.nnz - self._step(layer)
        return layer.rank_params + fewer < self.least_kept * layer.d_out * layer.d_in

    def _step(self, layer: LayerPlan) -> int:
        return -(-layer.d_out * layer.d_in // self.levels)
