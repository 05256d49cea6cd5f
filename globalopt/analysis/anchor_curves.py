"""Estimate how a layer's error changes from anchor to anchor by layers of its kind in other blocks.

With more of a layer kept, the error of a solution falls away from that of the span by a factor that depends on the
layer's kind and little on its block, and so does what a share of rank is worth in place of nonzeros. In SmolLM2-135M
the logarithms of these factors, interpolated over depth from 11 of the 30 blocks, differ from those of the other blocks
by (root mean square by kind)

* .03 to .07 in gates, up and down projections between .22 and .07 or .55 kept without rank, and .07 to .15 in the
  small layers of attention;
* .02 to .06 for rank at half of the weights, and .1 in queries.

The first blocks are another matter (.6 in queries for rank), so all of these are solved. So the layers of some blocks
are solved at all anchors (`fully_solved`), and those of the others at one, which gives their level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from globalopt.analysis.solver_gap import sampled
from globalopt.values.layer import LayerSpec
from globalopt.values.surface import interpolate

T = TypeVar("T")

FIRST = 3
"""Blocks at the beginning in which all layers are solved at all anchors."""

PARTS = 7
"""Parts of the depth in each of which one block more is solved so; in a short model every second block, at most. The
last one is too."""


class Curve(NamedTuple):
    """Hold a logarithm at some kept fractions, ascending.

    >>> Curve((0.25, 0.5), (-0.1, 0.3)).at(0.25)
    -0.1
    """

    kept: tuple[float, ...]
    logs: tuple[float, ...]

    def at(self, kept: float) -> float:
        """Interpolate it linearly in the kept fraction; it is constant outside."""
        return interpolate(self.kept, self.logs, kept)


class AnchorCurves(NamedTuple):
    """Hold how the error of a layer changes from anchor to anchor.

    Args:
        level: log of the solution's error over the span's at the anchors of the first row, less that at its `middle`.
        worth: of rank: log of the error with a share of rank less that without, at the anchors of the second row; None
            without one.

    >>> AnchorCurves(Curve((0.2, 0.5), (0.0, -0.3)), None).level.at(0.5)
    -0.3
    """

    level: Curve
    worth: Curve | None


def middle(row: Sequence[T]) -> T:
    """Return what a row has for its middle anchor, the one at which every layer is solved.

    >>> middle((0.07, 0.22, 0.55))
    0.22
    """
    return row[len(row) // 2]


def fully_solved(specs: Sequence[LayerSpec]) -> frozenset[str]:
    """Name the layers that are solved at all of their anchors: of every kind, some over the whole depth.

    Args:
        specs: all layers of the model.

    >>> layers = [LayerSpec(f"{block}.up", block, "in", "up", 2, 2) for block in range(30)]
    >>> sorted(int(name.split(".")[0]) for name in fully_solved(layers))
    [0, 1, 2, 3, 7, 11, 15, 19, 23, 27, 29]
    """
    by_kind: dict[str, set[int]] = {}
    for spec in specs:
        by_kind.setdefault(spec.kind, set()).add(spec.block)
    chosen: dict[str, set[int]] = {}
    for kind, found in by_kind.items():
        blocks = sorted(found)
        half, last, every = len(blocks) // 2, len(blocks) - 1, max(2, len(blocks) // PARTS)
        places = (i for i in range(len(blocks)) if i < FIRST or i == last or (i - half) % every == 0)
        chosen[kind] = {blocks[i] for i in places}
    # The solver gap is measured at all anchors.
    compared = {spec.name for spec in sampled(specs)}
    return frozenset(spec.name for spec in specs if spec.block in chosen[spec.kind] or spec.name in compared)


@dataclass(frozen=True)
class CurvesOverDepth:
    """Interpolate the anchor curves of a kind of layer over its blocks.

    Args:
        levels, worths: by kind, the curve in some blocks.

    >>> near, far = (AnchorCurves(Curve((0.2, 0.5), (0.0, log)), None) for log in (-0.2, -0.4))
    >>> layers = [LayerSpec(f"{block}.up", block, "in", "up", 2, 2) for block in (0, 4)]
    >>> curves = CurvesOverDepth.of(list(zip(layers, (near, far))))
    >>> found = curves.at("up", 1, (0.2, 0.5))
    >>> [round(log, 3) for log in found.level.logs]
    [0.0, -0.25]
    """

    levels: Mapping[str, Mapping[int, Curve]]
    worths: Mapping[str, Mapping[int, Curve]]

    @classmethod
    def of(cls, measured: Sequence[tuple[LayerSpec, AnchorCurves]]) -> CurvesOverDepth:
        """Make it from layers; of several of a kind in one block, such as experts, the mean is taken."""
        return cls(
            _by_kind([(spec, curves.level) for spec, curves in measured]),
            _by_kind([(spec, curves.worth) for spec, curves in measured if curves.worth is not None]),
        )

    def at(
        self, kind: str, block: int, level_kept: tuple[float, ...], worth_kept: tuple[float, ...] = ()
    ) -> AnchorCurves:
        """Interpolate the curves in a block at the given kept fractions.

        Args:
            kind: one of which some layer was solved at all anchors.
            worth_kept: empty where there are no anchors with rank.
        """
        worths = self.worths.get(kind)
        worth = _over_depth(worths, block, worth_kept) if worths and worth_kept else None
        return AnchorCurves(_over_depth(self.levels[kind], block, level_kept), worth)


def _by_kind(measured: Sequence[tuple[LayerSpec, Curve]]) -> dict[str, dict[int, Curve]]:
    together: dict[str, dict[int, list[Curve]]] = {}
    for spec, curve in measured:
        together.setdefault(spec.kind, {}).setdefault(spec.block, []).append(curve)
    return {
        kind: {block: _mean(curves) for block, curves in sorted(blocks.items())} for kind, blocks in together.items()
    }


def _mean(curves: Sequence[Curve]) -> Curve:
    kept = curves[0].kept
    return Curve(kept, tuple(sum(curve.at(x) for curve in curves) / len(curves) for x in kept))


def _over_depth(known: Mapping[int, Curve], block: int, kept: tuple[float, ...]) -> Curve:
    blocks = list(known)
    return Curve(kept, tuple(interpolate(blocks, [known[each].at(x) for each in blocks], block) for x in kept))
