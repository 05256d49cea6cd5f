"""Targets of layers and budgets of models: what may be kept, counted in parameters or bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from globalopt.errors import UnknownNameError, UsageError
from globalopt.values.layer import NM, HasShape, LayerSpec

ACCOUNTINGS = ("params", "bytes")

BYTES_PER_VALUE = 2  # values are stored in 16 bits in every format we count


@dataclass(frozen=True)
class Target:
    """What a layer may keep: a rank for `L`, a number of nonzeros for `S`, and how these lie.

    With a `pattern`, `nnz` is the pattern's exact count. `signs` adds SLaB's bit plane. `Target.dense(spec)` is the
    untouched layer, `Target.zero()` drops it.
    """

    rank: int
    nnz: int
    pattern: NM | None = None
    signs: bool = False

    def __post_init__(self) -> None:
        if self.rank < 0 or self.nnz < 0:
            raise UsageError(f"A target needs rank >= 0 and nnz >= 0; got rank {self.rank}, nnz {self.nnz}.")

    @classmethod
    def dense(cls, spec: HasShape) -> Target:
        return cls(rank=0, nnz=spec.numel)

    @classmethod
    def zero(cls) -> Target:
        return cls(rank=0, nnz=0)

    def check(self, spec: HasShape) -> Target:
        """Return self if it fits `spec`; `UsageError` naming the layer and the range otherwise."""
        if self.rank > spec.max_rank:
            raise UsageError(f"{spec.label}: rank {self.rank} is above its largest rank {spec.max_rank}.")
        if self.nnz > spec.numel:
            raise UsageError(f"{spec.label}: {self.nnz} nonzeros are more than its {spec.numel} weights.")
        if self.pattern is not None and self.nnz != self.pattern.nnz(spec):
            raise UsageError(
                f"{spec.label}: pattern {self.pattern} means {self.pattern.nnz(spec)} nonzeros, not {self.nnz}."
            )
        return self

    def params(self, spec: HasShape) -> int:
        """Parameters kept: `rank (d_out + d_in) + nnz`, plus one 16-bit value per 16 bits of a sign plane."""
        plane = math.ceil(spec.numel / 16) if self.signs else 0
        return self.rank * (spec.d_out + spec.d_in) + self.nnz + plane

    def rank_share(self, spec: HasShape) -> float:
        """Share of the kept parameters that is in the factors; 0 where nothing is kept."""
        params = self.params(spec)
        return self.rank * (spec.d_out + spec.d_in) / params if params else 0.0

    def bytes(self, spec: HasShape) -> int:
        """Bytes at 16 bits a value, the cheapest index included.

        Factors: `2 rank (d_out + d_in)`. `S`: 2 per value, plus nothing if it is full or empty, `ceil(log2 of)` bits
        per value under a pattern, else the smaller of a bitmap (1 bit per weight) and 16-bit column indices with row
        pointers.
        """
        low_rank = BYTES_PER_VALUE * self.rank * (spec.d_out + spec.d_in)
        plane = math.ceil(spec.numel / 8) if self.signs else 0
        if self.nnz in (0, spec.numel):
            index = 0
        elif self.pattern is not None:
            index = math.ceil(self.nnz * math.ceil(math.log2(self.pattern.of)) / 8)
        else:
            index = math.ceil(spec.numel / 8)
            if spec.d_in <= 2**16:
                index = min(index, 2 * self.nnz + 4 * (spec.d_out + 1))
        return low_rank + plane + BYTES_PER_VALUE * self.nnz + index


@dataclass(frozen=True)
class Limits:
    """What the place where a model will be served can hold of every layer.

    A layer that is kept whole has rank 0 and all its weights, which every such place can hold.

    Args:
        rank_multiple: every rank is a multiple of it, or 0.
        max_rank: the largest rank; None: any.
        sparse: whether there are sparse parts; without, a layer is factors alone, or kept or dropped whole.
    """

    rank_multiple: int = 1
    max_rank: int | None = None
    sparse: bool = True

    def __post_init__(self) -> None:
        if self.rank_multiple < 1:
            raise UsageError(f"Ranks are multiples of 1 or more; got {self.rank_multiple}.")
        if self.max_rank is not None and self.max_rank < 0:
            raise UsageError(f"The largest rank must be at least 0; got {self.max_rank}.")

    def floor(self, rank: int) -> int:
        """The largest rank within the limits that is at most `rank`."""
        most = rank if self.max_rank is None else min(rank, self.max_rank)
        return most // self.rank_multiple * self.rank_multiple

    def check(self, target: Target, spec: LayerSpec) -> Target:
        """Return `target` if it is within the limits; `UsageError` naming the layer otherwise."""
        if self.floor(target.rank) != target.rank:
            most = "" if self.max_rank is None else f", at most {self.max_rank}"
            raise UsageError(
                f"Layer {spec.name}: rank {target.rank} is no multiple of {self.rank_multiple}{most}, and that is all "
                "that can be served."
            )
        if not self.sparse and target.nnz and target != Target.dense(spec):
            raise UsageError(
                f"Layer {spec.name} has {target.nnz} nonzeros; it is to be served as factors alone, or whole."
            )
        return target


FREE = Limits()
"""No limits."""


@dataclass(frozen=True)
class Budget:
    """A limit on what all layers keep together, in the unit of an accounting.

    Args:
        limit: the most that may be used, parameters or bytes.
        total: what the dense layers use in the same unit.
        accounting: "params" or "bytes" (`Target.params`, `Target.bytes`).
    """

    limit: int
    total: int
    accounting: str = "params"

    def __post_init__(self) -> None:
        if self.accounting not in ACCOUNTINGS:
            raise UnknownNameError("accounting", self.accounting, ACCOUNTINGS)
        if not 0 < self.limit <= self.total:
            raise UsageError(f"A budget must be above 0 and at most the dense {self.total}; got {self.limit}.")

    @classmethod
    def fraction(cls, kept: float, specs: Iterable[LayerSpec], accounting: str = "params") -> Budget:
        """The budget that keeps `kept` of the compressible layers, rounded down to a whole unit."""
        if not 0 < kept <= 1:
            raise UsageError(f"--budget is the fraction kept of the compressible layers, in (0, 1]; got {kept:g}.")
        if accounting not in ACCOUNTINGS:
            raise UnknownNameError("accounting", accounting, ACCOUNTINGS)
        total = sum(spec.numel for spec in specs) * (BYTES_PER_VALUE if accounting == "bytes" else 1)
        return cls(limit=max(1, math.floor(kept * total + 1e-9)), total=total, accounting=accounting)

    @property
    def kept(self) -> float:
        return self.limit / self.total

    def cost(self, target: Target, spec: HasShape) -> int:
        """What `target` uses of this budget."""
        return target.params(spec) if self.accounting == "params" else target.bytes(spec)

    def grow(self, target: Target, spec: HasShape, axis: str, top: int, limit: int, step: int = 1) -> Target:
        """`target` with its `axis` ("rank" or "nnz") raised as far as a cost of `limit` allows, at most to `top`.

        By bisection: a cost grows along either axis, except that a full `S` may be cheaper than a nearly full one.
        A target that costs more than `limit` already is returned as it is.

        Args:
            step: it is raised by multiples of it.
        """
        start = getattr(target, axis)

        def at(steps: int) -> Target:
            return replace(target, **{axis: start + steps * step})

        low, high = 0, (top - start) // step
        if self.cost(at(high), spec) <= limit:
            return at(high)
        while high - low > 1:
            middle = (low + high) // 2
            if self.cost(at(middle), spec) <= limit:
                low = middle
            else:
                high = middle
        return at(low)
