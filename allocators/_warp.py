"""A warp of the error surfaces with a dozen coefficients, few enough to be learnt from a few evaluated losses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from globalopt.values.budget import Target
from globalopt.values.layer import LayerSpec
from globalopt.values.problem import Problem

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
    def of(cls, problem: Problem) -> Warp:
        """Make the warp of a problem's kinds and blocks, the same for any order of its layers."""
        sizes: Counter[str] = Counter()
        for spec in problem.specs:
            sizes[spec.kind] += spec.numel
        kinds = [f"kind:{kind}" for kind in sorted(sizes, key=lambda kind: (-sizes[kind], kind))]
        if len(kinds) > MOST_KINDS:
            kinds = [*kinds[: MOST_KINDS - 1], OTHERS]
        blocks = [spec.block for spec in problem.specs]
        return cls((*kinds, "depth", "depth²", "share"), (min(blocks), max(blocks)))

    def features(self, spec: LayerSpec, targets: Sequence[Target]) -> NDArray[np.float64]:
        """Compute the factors of the coefficients in the exponent, (targets, coefficients)."""
        first, last = self.blocks
        z = 2 * (spec.block - first) / (last - first) - 1 if last > first else 0.0
        kind = f"kind:{spec.kind}"
        rows = np.zeros((len(targets), len(self.names)))
        rows[:, self.names.index(kind if kind in self.names else OTHERS)] = 1
        rows[:, -3] = z
        rows[:, -2] = z * z
        rows[:, -1] = [target.rank_share(spec) for target in targets]
        return rows

    def factors(self, spec: LayerSpec, targets: Sequence[Target], theta: ArrayLike) -> NDArray[np.float64]:
        """Compute the factors of the errors of `targets`, (targets,)."""
        return np.exp(self.features(spec, targets) @ np.asarray(theta, dtype=np.float64))

    def apply(self, problem: Problem, theta: ArrayLike) -> Problem:
        """Return the problem with the errors of every surface warped."""
        surfaces = []
        for surface in problem.surfaces:
            error = np.asarray(surface.error) * self.factors(surface.spec, surface.targets, theta)
            surfaces.append(replace(surface, error=tuple(error.tolist())))
        return replace(problem, surfaces=tuple(surfaces))
