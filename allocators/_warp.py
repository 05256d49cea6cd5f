"""A warp of the error surfaces with a dozen coefficients, few enough to be learnt from a few evaluated losses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from globalopt.values.layer import LayerSpec
from globalopt.values.option_table import OptionTable

MOST_KINDS = 9
"""Most coefficients of kinds; of more kinds the largest `MOST_KINDS - 1` have their own and the others share one."""

OTHERS = "kind:others"


class Sampler(StrEnum):
    """Tree-structured Parzen estimators, CMA-ES (arXiv:1604.00772), or a Gaussian process."""

    TPE = "tpe"
    CMAES = "cmaes"
    GP = "gp"


@dataclass(frozen=True)
class Warp:
    """`error'_l(c) = error_l(c) exp(theta_kind(l) + theta_a z_l + theta_b z_l² + theta_s share(c))`.

    `z_l` is the layer's depth, its block index scaled to [-1, 1] (0 where there is one block); `share(c)` is the part
    of the target's parameters that is in its rank. With `theta = 0` nothing changes.

    Args:
        names: of the coefficients, in the order of every `theta`: kinds, then depth, depth², share.
        blocks: the first and the last block.
    """

    names: tuple[str, ...]
    blocks: tuple[int, int]

    @classmethod
    def of(cls, specs: Sequence[LayerSpec]) -> Warp:
        """Make the warp of the kinds and blocks of layers, the same for any order of them."""
        sizes: Counter[str] = Counter()
        for spec in specs:
            sizes[spec.kind] += spec.numel
        kinds = [f"kind:{kind}" for kind in sorted(sizes, key=lambda kind: (-sizes[kind], kind))]
        if len(kinds) > MOST_KINDS:
            kinds = [*kinds[: MOST_KINDS - 1], OTHERS]
        blocks = [spec.block for spec in specs]
        return cls((*kinds, "depth", "depth²", "share"), (min(blocks), max(blocks)))

    def features(self, specs: Sequence[LayerSpec]) -> NDArray[np.float64]:
        """Compute the factors in the exponent of all coefficients but the last, `share`: (layers, coefficients - 1)."""
        first, last = self.blocks
        rows = np.zeros((len(specs), len(self.names) - 1))
        columns = {name: column for column, name in enumerate(self.names)}
        for row, spec in zip(rows, specs, strict=True):
            kind = f"kind:{spec.kind}"
            z = 2 * (spec.block - first) / (last - first) - 1 if last > first else 0.0
            row[columns[kind if kind in columns else OTHERS]] = 1
            row[-2:] = z, z * z
        return rows

    def apply(self, table: OptionTable, theta: ArrayLike) -> OptionTable:
        """Return the table with all errors warped."""
        *fixed, share = np.asarray(theta, dtype=np.float64)
        exponent = (self.features(table.specs) @ np.array(fixed))[table.layer] + share * table.share
        return table.with_errors(table.error * np.exp(exponent))
