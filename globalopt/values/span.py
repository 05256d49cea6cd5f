"""The low-rank and the sparse span of a layer, from robust PCA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from globalopt.errors import NumericalError
from globalopt.values.budget import Target


@dataclass(frozen=True, eq=False)
class Span:
    """Stage 1's answer for one layer: `R W D = U diag(s) Vh + S` with `D = diag(scale)`, `R = diag(rows)`.

    Args:
        U: (d_out, k) unit columns. s: (k,) >= 0, the most important first. Vh: (k, d_in) unit rows.
        S: (d_out, d_in), the rest: RPCA's sparse part and its residual, so that the sum is exact.
        scale: (d_in,) positive, the input scaling the split was made in.
        rows: (d_out, 1) positive, the output scaling.
        stats: figures of the split (steps, residual, nnz of the sparse part).
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
        return len(self.s)

    def to(self, device: torch.device) -> Span:
        """The same span on `device`."""
        if self.S.device == device:
            return self
        parts = (part.to(device) for part in (self.U, self.s, self.Vh, self.S, self.scale, self.rows))
        return Span(*parts, stats=self.stats)

    def unscaled(self, X: Tensor) -> Tensor:
        """`X` (d_out, d_in) in the weight's own coordinates."""
        return X / self.rows / self.scale

    def residual(self, rank: int) -> Tensor:
        """(d_out, d_in) in scaled coordinates: what the first `rank` directions leave of `R W D`."""
        return self.S + (self.U[:, rank:] * self.s[rank:]) @ self.Vh[rank:]

    def low_rank(self, rank: int) -> tuple[Tensor, Tensor]:
        """The first `rank` directions as `U (d_out, rank)`, `V (rank, d_in)` of the unscaled weight."""
        return self.directions(slice(0, rank))

    def directions(self, chosen: slice | Tensor) -> tuple[Tensor, Tensor]:
        """As `low_rank`, of a `chosen` set of directions: a slice, or a mask (k,)."""
        root = self.s[chosen].sqrt()
        return self.U[:, chosen] * root / self.rows, root[:, None] * self.Vh[chosen] / self.scale


@dataclass(frozen=True, eq=False)
class Mask:
    """A choice of single components of a span, in any order of importance.

    Args:
        directions: (k,) bool, which singular directions are kept.
        entries: (d_out, d_in) bool, which entries of the span's `S` are kept.
    """

    directions: Tensor
    entries: Tensor

    def target(self) -> Target:
        """What a refinement of as many directions and entries is asked for."""
        return Target(int(self.directions.sum()), int(self.entries.sum()))
