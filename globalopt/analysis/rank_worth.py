"""Estimate what rank is worth to a layer from layers of its kind in other blocks.

By a share of rank in place of as many nonzeros, the error of a layer changes by a factor that depends on its kind and
hardly on its block: of the 210 layers of SmolLM2-135M, the logarithm differs from the one that is interpolated over
depth from 17 of the 30 blocks by .01 to .06 (root mean square by kind at half of the weights), and by .1 in queries.
The first blocks are another matter (.6 in queries), so all of these are solved. So solutions with rank are computed in
some blocks alone (`ranked`), and those without rank in all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from globalopt.analysis.solver_gap import sampled
from globalopt.values.layer import LayerSpec
from globalopt.values.surface import interpolate

FIRST = 3
"""Blocks at the beginning in which all layers are solved with rank."""

EVERY = 2
"""Of so many blocks after these, in one all layers are solved with rank; in the last one too. With 4 in place of 2 the
bundled model ended 3 % higher at 0.3 (one seed) than with rank in all blocks."""


class Worth(NamedTuple):
    """Hold the logarithm of the error with a share of rank less that without, at some kept fractions.

    >>> Worth((0.25, 0.5), (-0.1, 0.3)).at(0.25)
    -0.1
    """

    kept: tuple[float, ...]
    logs: tuple[float, ...]

    def at(self, kept: float) -> float:
        """Interpolate it linearly in the kept fraction."""
        return interpolate(self.kept, self.logs, kept)


def ranked(specs: Sequence[LayerSpec]) -> frozenset[str]:
    """Name the layers that are solved at anchors with rank too: of every kind, some over the whole depth.

    Args:
        specs: all layers of the model.

    >>> layers = [LayerSpec(f"{block}.up", block, "in", "up", 2, 2) for block in range(12)]
    >>> sorted(int(name.split(".")[0]) for name in ranked(layers))
    [0, 1, 2, 4, 6, 8, 10, 11]
    """
    by_kind: dict[str, set[int]] = {}
    for spec in specs:
        by_kind.setdefault(spec.kind, set()).add(spec.block)
    chosen: dict[str, set[int]] = {}
    for kind, found in by_kind.items():
        blocks = sorted(found)
        middle, last = len(blocks) // 2, len(blocks) - 1
        places = (i for i in range(len(blocks)) if i < FIRST or i == last or (i - middle) % EVERY == 0)
        chosen[kind] = {blocks[i] for i in places}
    # The solver gap is measured at all anchors.
    compared = {spec.name for spec in sampled(specs)}
    return frozenset(spec.name for spec in specs if spec.block in chosen[spec.kind] or spec.name in compared)


@dataclass(frozen=True)
class RankWorths:
    """Interpolate the worth of rank over the blocks of a kind of layer.

    Args:
        kinds: by kind, the worth in some blocks.

    >>> worths = RankWorths({"up": {0: Worth((0.25,), (0.2,)), 4: Worth((0.25,), (0.4,))}})
    >>> round(worths.at("up", 1, (0.25,)).logs[0], 3)
    0.25
    """

    kinds: Mapping[str, Mapping[int, Worth]]

    @classmethod
    def of(cls, measured: Sequence[tuple[LayerSpec, Worth]]) -> RankWorths:
        """Make it from layers; of several of a kind in one block, such as experts, the mean is taken."""
        together: dict[str, dict[int, list[Worth]]] = {}
        for spec, worth in measured:
            together.setdefault(spec.kind, {}).setdefault(spec.block, []).append(worth)
        return cls(
            {
                kind: {block: _mean(worths) for block, worths in sorted(blocks.items())}
                for kind, blocks in together.items()
            }
        )

    def at(self, kind: str, block: int, kept: tuple[float, ...]) -> Worth | None:
        """Interpolate the worth in a block at the fractions `kept`; None where no layer of the kind has one."""
        if kind not in self.kinds:
            return None
        blocks = sorted(self.kinds[kind])
        curves = [self.kinds[kind][each] for each in blocks]
        return Worth(kept, tuple(interpolate(blocks, [curve.at(x) for curve in curves], block) for x in kept))


def _mean(worths: Sequence[Worth]) -> Worth:
    kept = worths[0].kept
    return Worth(kept, tuple(sum(worth.at(x) for worth in worths) / len(worths) for x in kept))
