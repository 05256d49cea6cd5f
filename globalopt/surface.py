"""The options of a layer, and what each is predicted to cost: spans in, error surfaces out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from globalopt.errors import UsageError
from globalopt.kernels.projection import keep_nm
from globalopt.kernels.sketch import DenseSketch, PrefixSketch
from globalopt.types import NM, ErrorSurface, LayerSpec, Metric, Span, Target

RANK_SHARES = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.45)
"""Ranks offered beside free nonzeros, as fractions of the rank at which factors cost as much as the dense layer."""

LEVELS = 64
"""Nonzero counts offered per rank: multiples of `numel / LEVELS`."""

PATTERN_LEVELS = 24
"""Ranks offered beside an N:M pattern, evenly spaced from 0 to where the layer would cost as much as dense."""


@dataclass(frozen=True)
class Options:
    """The `(rank, nnz)` grid of one layer, grouped by rank.

    Args:
        rows: per rank, the nonzero counts offered with it, ascending.
        bucket: the spacing of the counts.
    """

    spec: LayerSpec
    pattern: NM | None
    rows: tuple[tuple[int, tuple[int, ...]], ...]
    bucket: int

    @classmethod
    def of(cls, spec: LayerSpec, max_rank: int, pattern: NM | None = None) -> Options:
        """The default grid: dense and zero included for unstructured `S`; with a pattern only the rank is free.

        Options that cost more parameters than the dense layer are left out.

        Args:
            max_rank: the largest rank the span offers.
        """
        per_rank = spec.d_out + spec.d_in
        if pattern is not None:
            nnz = pattern.nnz(spec)
            most = min(max_rank, (spec.numel - nnz) // per_rank)
            ranks = sorted({round(most * i / PATTERN_LEVELS) for i in range(PATTERN_LEVELS + 1)})
            return cls(spec, pattern, tuple((rank, (nnz,)) for rank in ranks), nnz)
        bucket = -(-spec.numel // LEVELS)
        counts = [*range(0, spec.numel, bucket), spec.numel]
        even = spec.numel / per_rank
        ranks = sorted({min(max_rank, round(share * even)) for share in RANK_SHARES})
        rows = tuple(
            (rank, tuple(n for n in counts if rank * per_rank + n <= spec.numel))
            for rank in ranks
            if rank * per_rank <= spec.numel
        )
        return cls(spec, None, rows, bucket)

    @property
    def targets(self) -> tuple[Target, ...]:
        return tuple(Target(rank, nnz, self.pattern) for rank, counts in self.rows for nnz in counts)

    def surface(self, error: Iterable[float]) -> ErrorSurface:
        """The surface with `error` in the order of `targets`."""
        return ErrorSurface(self.spec, self.targets, tuple(float(e) for e in error))


def sketches(span: Span, options: Options) -> list[PrefixSketch | DenseSketch]:
    """What each option drops of the layer, prepared for inner products with gradients.

    Option (rank, nnz) keeps the first `rank` directions of the span and the `nnz` largest entries of what they
    leave, in the span's scaled coordinates; the rest is dropped. The projections of the returned sketches,
    concatenated, are in the order of `options.targets`.
    """
    if options.pattern is not None:
        return [DenseSketch(torch.stack([_dropped_by_pattern(span, rank, options) for rank, _ in options.rows]))]
    made: list[PrefixSketch | DenseSketch] = []
    for rank, counts in options.rows:
        residual = span.residual(rank)
        made.append(PrefixSketch.make(residual.abs(), residual / span.scale, options.bucket, counts))
    return made


def _dropped_by_pattern(span: Span, rank: int, options: Options) -> Tensor:
    if options.pattern is None:
        raise UsageError("A pattern is needed to drop by one.")
    residual = span.residual(rank)
    kept = keep_nm(residual.abs(), options.pattern)
    return torch.where(kept, 0.0, residual) / span.scale


def project(made: Sequence[PrefixSketch | DenseSketch], gradients: Tensor) -> Tensor:
    """(b, d_out, d_in) gradients -> (b, options) inner products with what every option drops."""
    return torch.cat([sketch.project(gradients) for sketch in made], dim=1)


def gram_surface(span: Span, options: Options, metric: Metric, levels: int = 16) -> ErrorSurface:
    """Surface of `tr(E G Eᵀ)`, `E` what an option drops: the error to use where no backward pass is possible.

    Every option costs one product with G, so only about `levels` counts per rank are measured.
    """
    stride = max(1, LEVELS // levels)
    thinned = tuple((rank, tuple(sorted({*counts[::stride], counts[-1]}))) for rank, counts in options.rows)
    coarse = Options(options.spec, options.pattern, thinned, options.bucket)
    errors: list[float] = []
    for rank, counts in coarse.rows:
        if coarse.pattern is not None:
            errors.append(metric.error(_dropped_by_pattern(span, rank, coarse)))
            continue
        residual = span.residual(rank)
        order = residual.abs().flatten().argsort(descending=True, stable=True)
        for nnz in counts:
            dropped = (residual / span.scale).flatten()
            dropped[order[:nnz]] = 0.0
            errors.append(metric.error(dropped.view_as(residual)))
    return coarse.surface(errors)
