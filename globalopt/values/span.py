"""Hold the ranked low-rank directions and sparse entries of a layer, found by robust PCA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from globalopt.errors import NumericalError
from globalopt.values.budget import Target


@dataclass(frozen=True, eq=False)
class SpanBasis:
    """Hold the ranked directions of a span and its scalings: all of it that a weight does not give.

    Args:
        U: (d_out, k) unit columns. s: (k,) >= 0, the most important first. Vh: (k, d_in) unit rows.
        scale: (d_in,) positive, the scaling of the inputs under which the split was made.
        rows: (d_out, 1) positive, the scaling of the outputs.
        stats: figures of the split (steps, residual, nnz of the sparse part).

    >>> u = torch.full((2, 1), 0.5**0.5)
    >>> basis = SpanBasis(u, torch.tensor([4.0]), u.mT, scale=torch.ones(2), rows=torch.ones(2, 1))
    >>> [[round(x, 4) for x in row] for row in basis.span(torch.tensor([[2.0, 2.0], [2.0, 7.0]])).S.abs().tolist()]
    [[0.0, 0.0], [0.0, 5.0]]
    >>> basis.leading(0).max_rank
    0
    """

    U: Tensor
    s: Tensor
    Vh: Tensor
    scale: Tensor
    rows: Tensor
    stats: Mapping[str, float] = field(default_factory=dict)

    @property
    def max_rank(self) -> int:
        """Return the number of directions, k."""
        return len(self.s)

    def leading(self, count: int) -> SpanBasis:
        """Keep the first `count` directions, and leave the others to the rest `S`."""
        count = min(count, self.max_rank)
        U, Vh = self.U[:, :count].contiguous(), self.Vh[:count].contiguous()
        return SpanBasis(U, self.s[:count].clone(), Vh, self.scale, self.rows, self.stats)

    def span(self, weight: Tensor) -> Span:
        """Split a weight (d_out, d_in) exactly, `S = R W D - U diag(s) Vh`, on its own device."""
        U, s, Vh, scale, rows = (part.to(weight.device) for part in (self.U, self.s, self.Vh, self.scale, self.rows))
        return Span(U, s, Vh, rows * weight.float() * scale - (U * s) @ Vh, scale, rows, self.stats)


@dataclass(frozen=True, eq=False)
class Span:
    """Split a scaled weight into ranked directions and a sparse rest: `R W D = U diag(s) Vh + S`.

    `D = diag(scale)` and `R = diag(rows)`. The first directions and the largest entries of `S` are a cheap
    decomposition of any size, without a solver.

    Args:
        U: (d_out, k) unit columns. s: (k,) >= 0, the most important first. Vh: (k, d_in) unit rows.
        S: (d_out, d_in), the rest: the sparse part of robust PCA and its residual, so that the sum is exact.
        scale: (d_in,) positive, the scaling of the inputs under which the split was made.
        rows: (d_out, 1) positive, the scaling of the outputs.
        stats: figures of the split (steps, residual, nnz of the sparse part).
    Raises:
        NumericalError: the shapes disagree, or a scaling is not positive.

    >>> W = torch.tensor([[2.0, 2.0], [2.0, 7.0]])
    >>> u = torch.full((2, 1), 0.5**0.5)
    >>> span = Span(u, torch.tensor([4.0]), u.mT, W - 2, scale=torch.ones(2), rows=torch.ones(2, 1))
    >>> [[round(x, 4) for x in row] for row in span.residual(rank=1).abs().tolist()]
    [[0.0, 0.0], [0.0, 5.0]]
    >>> U, V = span.low_rank(1)
    >>> [[round(x, 4) for x in row] for row in (U @ V).tolist()]
    [[2.0, 2.0], [2.0, 2.0]]
    """

    U: Tensor
    s: Tensor
    Vh: Tensor
    S: Tensor
    scale: Tensor
    rows: Tensor
    stats: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        k = len(self.s)
        if self.U.shape != (self.S.shape[0], k) or self.Vh.shape != (k, self.S.shape[1]):
            raise NumericalError(f"Span shapes disagree: U {tuple(self.U.shape)}, s {k}, Vh {tuple(self.Vh.shape)}.")
        if not bool((self.scale > 0).all() and (self.rows > 0).all()):
            raise NumericalError("A span's input and output scaling must be positive.")

    @property
    def max_rank(self) -> int:
        """Return the number of directions, k."""
        return len(self.s)

    @property
    def basis(self) -> SpanBasis:
        """Return all but `S`, which the weight gives back."""
        return SpanBasis(self.U, self.s, self.Vh, self.scale, self.rows, self.stats)

    def to(self, device: torch.device) -> Span:
        """Copy the span to `device`; one that is there already is returned itself."""
        if self.S.device == device:
            return self
        parts = (part.to(device) for part in (self.U, self.s, self.Vh, self.S, self.scale, self.rows))
        return Span(*parts, stats=self.stats)

    def unscaled(self, X: Tensor) -> Tensor:
        """Map `X` (d_out, d_in) from scaled coordinates to those of the weight, `R⁻¹ X D⁻¹`."""
        return X / self.rows / self.scale

    def residual(self, rank: int) -> Tensor:
        """Compute the residual of `R W D` after its first `rank` directions, (d_out, d_in) in scaled coordinates."""
        return self.S + (self.U[:, rank:] * self.s[rank:]) @ self.Vh[rank:]

    def low_rank(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return the first `rank` directions as factors `U` (d_out, rank), `V` (rank, d_in) of the unscaled weight."""
        return self.directions(slice(0, rank))

    def directions(self, chosen: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Return a set of directions as factors `U`, `V` of the unscaled weight.

        Args:
            chosen: a slice, or a bool mask (k,).
        """
        root = self.s[chosen].sqrt()
        return self.U[:, chosen] * root / self.rows, root[:, None] * self.Vh[chosen] / self.scale


@dataclass(frozen=True, eq=False)
class Mask:
    """Choose single directions and single entries of a span, not necessarily the most important ones.

    Args:
        directions: (k,) bool, which singular directions are kept.
        entries: (d_out, d_in) bool, which entries of the span's `S` are kept.

    >>> Mask(torch.tensor([True, False, True]), torch.eye(4, dtype=torch.bool)).target()
    Target(rank=2, nnz=4)
    """

    directions: Tensor
    entries: Tensor

    def target(self) -> Target:
        """Return the target with as many directions and entries as are chosen."""
        return Target(int(self.directions.sum()), int(self.entries.sum()))
