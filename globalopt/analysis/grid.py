"""List the (rank, nonzeros) options of a layer, and the anchors: the targets at which it is solved in the analysis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from globalopt.values.budget import NO_LIMITS, Limits, Target
from globalopt.values.layer import NM, HasShape, LayerSpec
from globalopt.values.surface import interpolate

RANK_LEVELS = (0.0, 0.02, 0.05, 0.1, 0.17, 0.25, 0.35)
"""Ranks offered beside free nonzeros, as fractions of the rank whose factors cost as much as the dense layer."""

NNZ_LEVELS = 64
"""Nonzero counts offered per rank: multiples of `numel / NNZ_LEVELS`."""

PATTERN_LEVELS = 24
"""Ranks offered beside an N:M pattern, evenly spaced from 0 to where the layer would cost as much as dense."""

ANCHORS = ((0.0, (0.07, 0.22, 0.55)), (0.3, (0.25, 0.5)))
"""The anchors of a layer, in rows: the share of rank in what they keep, and the fractions that they keep."""

LEAST_KEPT = 0.05
"""Smallest fraction kept of an option for which anchor solutions still set the level of predictions."""

LARGEST_SHARE = 0.45
"""Largest share of rank of such an option. Beyond these limits only the dense and the zero option are offered."""


def largest_rank(spec: HasShape, pattern: NM | None = None, limits: Limits = NO_LIMITS) -> int:
    """Return the largest rank of use in a layer: beside sparse parts, that whose factors cost half of the dense layer.

    Beside an N:M pattern the factors may cost what the pattern leaves, and without sparse parts as much as the layer.

    >>> spec = LayerSpec("up", 0, "in", "up", 64, 64)
    >>> [largest_rank(spec), largest_rank(spec, NM(1, 4)), largest_rank(spec, None, Limits(sparse=False))]
    [16, 24, 32]
    """
    room = spec.numel if not limits.sparse else spec.numel // 2 if pattern is None else spec.numel - pattern.nnz(spec)
    return min(spec.max_rank, room // (spec.d_out + spec.d_in))


@dataclass(frozen=True)
class Options:
    """Hold the `(rank, nnz)` options of one layer, grouped by rank.

    Args:
        pattern: N:M pattern of `S`, or None.
        rows: per rank, the nonzero counts offered with it, ascending.
        bucket: the spacing of the counts.

    >>> options = Options.of(LayerSpec("up", 0, "in", "up", 64, 64), max_rank=8)
    >>> [(rank, len(counts)) for rank, counts in options.rows]
    [(0, 62), (1, 59), (2, 55), (3, 50), (5, 41), (8, 28)]
    >>> [(target.rank, target.nnz) for target in options.anchors[1]]
    [(2, 768), (4, 1536)]
    """

    spec: LayerSpec
    pattern: NM | None
    rows: tuple[tuple[int, tuple[int, ...]], ...]
    bucket: int

    @classmethod
    def of(cls, spec: LayerSpec, max_rank: int, pattern: NM | None = None, limits: Limits = NO_LIMITS) -> Options:
        """Make the default options of a layer.

        For unstructured `S` they include the dense and the zero option. With a pattern only the rank varies. Without
        sparse parts there are ranks alone, and the dense layer. Options that cost more parameters than the dense layer
        are left out.

        Args:
            max_rank: the largest rank of the span.
            limits: every option is within them.
        """
        per_rank = spec.d_out + spec.d_in
        bucket = -(-spec.numel // NNZ_LEVELS)
        if pattern is not None or not limits.sparse:
            nnz = pattern.nnz(spec) if pattern is not None else 0
            # An option that costs as much as the dense layer is never better than it.
            most = limits.floor(min(max_rank, (spec.numel - (nnz or 1)) // per_rank))
            ranks = sorted({limits.floor(round(most * i / PATTERN_LEVELS)) for i in range(PATTERN_LEVELS + 1)})
            if pattern is None:
                return cls(spec, None, ((0, (0, spec.numel)), *((rank, (0,)) for rank in ranks if rank)), bucket)
            return cls(spec, pattern, tuple((rank, (nnz,)) for rank in ranks), nnz)
        counts = [*range(0, spec.numel, bucket), spec.numel]
        even = spec.numel / per_rank
        ranks = sorted({limits.floor(min(max_rank, round(level * even))) for level in RANK_LEVELS})
        rows = ((rank, tuple(n for n in counts if _offered(Target(rank, n), spec))) for rank in ranks)
        return cls(spec, None, tuple((rank, row) for rank, row in rows if row), bucket)

    def of_span(self, anchors: bool) -> Options:
        """Return the options whose errors a span gives: those without rank, where anchors say what rank is worth.

        Args:
            anchors: whether the layer is solved at anchors.

        >>> options = Options.of(LayerSpec("up", 0, "in", "up", 64, 64), max_rank=8)
        >>> len(options.of_span(anchors=False).rows), len(options.of_span(anchors=True).rows)
        (6, 1)
        """
        return replace(self, rows=self.rows[:1]) if anchors and len(self.anchors) > 1 else self

    @property
    def ranked(self) -> bool:
        """Tell whether an option has a low-rank part."""
        return any(rank for rank, _ in self.rows)

    @property
    def factors(self) -> bool:
        """Tell whether all options but the dense and the zero one are ranks without nonzeros."""
        return self.pattern is None and not any(count % self.spec.numel for _, row in self.rows for count in row)

    @property
    def targets(self) -> tuple[Target, ...]:
        """List all options, row by row."""
        return tuple(Target(rank, nnz, self.pattern) for rank, counts in self.rows for nnz in counts)

    @property
    def anchors(self) -> tuple[tuple[Target, ...], ...]:
        """List the targets at which the layer is solved, in rows of equal rank share, ascending in what they keep."""
        if self.pattern is not None:
            ranks = [rank for rank, _ in self.rows]
            picked = sorted({ranks[round(i * (len(ranks) - 1) / 3)] for i in range(4)})
            return (tuple(Target(rank, self.rows[0][1][0], self.pattern) for rank in picked),)
        if self.factors:
            per_rank = self.spec.d_out + self.spec.d_in
            ranks = sorted({max(1, int(kept * self.spec.numel / per_rank)) for kept in ANCHORS[0][1]})
            return (tuple(Target(rank, 0) for rank in ranks),)
        rows = []
        for share, fractions in ANCHORS:
            row = tuple(self.sharing(kept, share) for kept in fractions)
            if row := tuple(target for target in row if target.rank or not share):
                rows.append(row)
        return tuple(rows)

    def sharing(self, kept: float, share: float) -> Target:
        """Return the target that keeps a fraction `kept`, of it `share` as rank, rounded down to an offered rank."""
        per_rank = self.spec.d_out + self.spec.d_in
        rank = min(self.rows[-1][0], int(share * kept * self.spec.numel / per_rank))
        return Target(rank, int(kept * self.spec.numel) - rank * per_rank)


@dataclass(frozen=True)
class AnchorValues:
    """Interpolate values that are known at the anchors of a layer.

    The interpolation is linear in the kept fraction along a row and in the rank share between rows, and constant
    outside of them.

    Args:
        rows: per row, ascending, its rank share, the kept fractions and the values there.

    >>> values = AnchorValues(((0.0, (0.2, 0.4), (1.0, 2.0)),))
    >>> round(values.at(Target(0, 30), LayerSpec("up", 0, "in", "up", 10, 10)), 3)
    1.5
    """

    rows: tuple[tuple[float, tuple[float, ...], tuple[float, ...]], ...]

    @classmethod
    def of(cls, options: Options, values: Mapping[Target, float]) -> AnchorValues:
        """Make it from values by anchor; anchors without a value are left out."""
        spec, rows = options.spec, []
        for row in options.anchors:
            known = [anchor for anchor in row if anchor in values]
            if known:
                kept = tuple(anchor.params(spec) / spec.numel for anchor in known)
                share = max(anchor.rank_share(spec) for anchor in row)
                rows.append((share, kept, tuple(values[anchor] for anchor in known)))
        return cls(tuple(rows))

    def at(self, target: Target, spec: LayerSpec) -> float:
        """Interpolate the value at a target of this or another layer; there must be a row."""
        kept = target.params(spec) / spec.numel
        values = [interpolate(xs, ys, kept) for _, xs, ys in self.rows]
        return interpolate([share for share, _, _ in self.rows], values, target.rank_share(spec))


def _offered(target: Target, spec: LayerSpec) -> bool:
    """Tell whether a target is an option of a layer with unstructured `S`."""
    params = target.params(spec)
    if target in (Target.dense(spec), Target.zero()):
        return True
    low_rank = params - target.nnz
    return LEAST_KEPT * spec.numel <= params < spec.numel and low_rank <= LARGEST_SHARE * params
