"""Count the parameters and bytes of compressed layers, and limit their sum by a budget.

A target is the size of one layer's compressed form: the rank of `L = U V` and the number of nonzeros of `S`. A budget
limits what the targets of all layers cost together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from globalopt.errors import UnknownNameError, UsageError
from globalopt.values.layer import NM, HasShape, LayerSpec
from globalopt.values.storage import PLAIN, Storage, code_bytes, scale_bytes

ACCOUNTINGS = ("params", "bytes")
"""Units in which a budget may be counted: parameters, or bytes with the index of the sparse part."""

BYTES_PER_VALUE = 2  # values are stored in 16 bits in every format we count


@dataclass(frozen=True, slots=True)
class Target:
    """Give the size of a layer's compressed form: the rank of `L = U V`, and the number of nonzeros of `S`.

    Args:
        rank: rank of `L`, >= 0.
        nnz: nonzeros of `S`, >= 0; under a `pattern` the exact count of the pattern.
        pattern: N:M pattern of `S`; None is unstructured.
        signs: whether `L` is multiplied, entry by entry, by a plane of +-1 at one bit per weight (SLaB,
            arXiv:2604.04493).
        storage: bits of the values of `S` and of the factors.
    Raises:
        UsageError: `rank` or `nnz` is negative, or there are signs in another storage than 16 bits.

    >>> spec = LayerSpec("q_proj", 0, "q_proj", "q_proj", d_out=64, d_in=64)
    >>> target = Target(rank=8, nnz=1024)
    >>> target.params(spec), Target.dense(spec).params(spec)
    (2048, 4096)
    """

    rank: int
    nnz: int
    pattern: NM | None = None
    signs: bool = False
    storage: Storage = PLAIN

    def __post_init__(self) -> None:
        if self.rank < 0 or self.nnz < 0:
            raise UsageError(f"A target needs rank >= 0 and nnz >= 0; got rank {self.rank}, nnz {self.nnz}.")
        if self.signs and not self.storage.plain:
            raise UsageError(f"Layers with a plane of signs are stored in 16 bits, not in {self.storage}.")

    def __repr__(self) -> str:
        defaults = ((self.pattern, None, "pattern"), (self.signs, False, "signs"), (self.storage, PLAIN, "storage"))
        others = "".join(f", {name}={value}" for value, default, name in defaults if value != default)
        return f"Target(rank={self.rank}, nnz={self.nnz}{others})"

    @classmethod
    def dense(cls, spec: HasShape) -> Target:
        """Return the target of the unchanged layer: rank 0 and all of its weights."""
        return cls(rank=0, nnz=spec.numel)

    @classmethod
    def zero(cls) -> Target:
        """Return the target of a dropped layer, whose weight becomes zero."""
        return cls(rank=0, nnz=0)

    def check(self, spec: HasShape) -> Target:
        """Return the target itself if it fits `spec`.

        Raises:
            UsageError: the rank or the nonzeros exceed the layer's, or `nnz` is not the pattern's; names the layer.
        """
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
        """Count the parameters kept: `rank (d_out + d_in) + nnz`, plus one 16-bit value per 16 bits of a sign plane."""
        return params_kept(self.rank, self.nnz, self.signs, spec.d_out, spec.d_in)

    def rank_share(self, spec: HasShape) -> float:
        """Compute the share of the kept parameters that lies in the factors `U` and `V`; 0 where nothing is kept."""
        params = self.params(spec)
        return self.rank * (spec.d_out + spec.d_in) / params if params else 0.0

    def bytes(self, spec: HasShape) -> int:
        """Count the bytes kept in the target's storage, with the cheapest index of the sparse part: the sum of `parts`.

        Values of `S` and entries of the factors: in 16 bits 2 each, else their codes and the scales of their groups
        (`number_bytes`). Sign plane: one bit per weight. Index of `S`: none if `S` is full or empty, or in 16 bits and
        smaller with its zeros; `ceil(log2 M)` bits per value under an N:M pattern; else the smaller of a bitmap (one
        bit per weight) and 16-bit column indices with 32-bit row pointers.

        >>> spec = LayerSpec("q_proj", 0, "q_proj", "q_proj", d_out=64, d_in=64)
        >>> Target(rank=0, nnz=2048).bytes(spec)  # values 2 x 2048, bitmap 4096 / 8
        4608
        >>> Target(rank=0, nnz=64).bytes(spec)  # values 2 x 64, column indices 2 x 64, row pointers 4 x 65
        516
        >>> Target(rank=0, nnz=2048, storage=Storage(4, 8)).bytes(spec)  # codes 1024, scales 2 x 32, bitmap
        1600
        >>> Target(rank=0, nnz=4095).bytes(spec)  # all 4096 in 2 bytes
        8192
        """
        return self.parts(spec).total

    def parts(self, spec: HasShape) -> Parts:
        """Count the bytes of every part of the compressed layer.

        >>> spec = LayerSpec("q_proj", 0, "q_proj", "q_proj", d_out=64, d_in=64)
        >>> Target(rank=2, nnz=2048, storage=Storage(4, 8)).parts(spec)
        Parts(values=1024, index=512, scales=72, factors=256, signs=0)
        """
        bits = index_bits(self.pattern), self.storage.values, self.storage.factors
        return bytes_by_part(self.rank, self.nnz, self.signs, spec.d_out, spec.d_in, *bits)


def index_bits(pattern: NM | None) -> int:
    """Compute the bits of the index of a value under a pattern, `ceil(log2 M)`; 0 without one.

    >>> index_bits(NM(2, 4)), index_bits(None)
    (2, 0)
    """
    return 0 if pattern is None else math.ceil(math.log2(pattern.of))


Whole = Any
"""An integer, or an array of integers: the same formula counts one target or the targets of many layers."""


def params_kept(rank: Whole, nnz: Whole, signs: Whole, d_out: Whole, d_in: Whole) -> Whole:
    """Count the parameters of targets, as `Target.params` says.

    Args:
        rank, nnz, signs: of the targets. d_out, d_in: of their layers.

    >>> import numpy as np
    >>> params_kept(np.array([0, 8]), 1024, 0, 64, 64).tolist()
    [1024, 2048]
    """
    return rank * (d_out + d_in) + nnz + signs * -(-(d_out * d_in) // 16)


class Parts(NamedTuple):
    """Hold the bytes of the parts of compressed layers.

    Args:
        values: of `S`, as codes or in 16 bits. index: the positions of the values.
        scales: of the groups of codes, of values and factors.
        factors: the entries of `U` and `V`, as codes or in 16 bits. signs: the planes of signs.

    >>> Parts(values=1024, index=512, scales=72, factors=256, signs=0).total
    1864
    """

    values: Whole
    index: Whole
    scales: Whole
    factors: Whole
    signs: Whole

    @property
    def total(self) -> Whole:
        """The bytes of all parts."""
        return self.values + self.index + self.scales + self.factors + self.signs


def bytes_by_part(
    rank: Whole,
    nnz: Whole,
    signs: Whole,
    d_out: Whole,
    d_in: Whole,
    position_bits: int = 0,
    value_bits: Whole = 16,
    factor_bits: Whole = 16,
) -> Parts:
    """Count the bytes of the parts of targets, as `Target.bytes` says; `U` and `V` have groups of their own.

    Args:
        rank, nnz, signs: of the targets. d_out, d_in: of their layers.
        position_bits: of a value under the pattern (`index_bits`); 0 without one.
        value_bits, factor_bits: of their storage.

    >>> bytes_by_part(2, 1024, False, 64, 64)
    Parts(values=2048, index=512, scales=0, factors=512, signs=0)
    >>> import numpy as np
    >>> bytes_by_part(0, np.array([64, 2048, 4096]), 0, 64, 64).total.tolist()
    [516, 4608, 8192]
    """
    numel = d_out * d_in
    bitmap = -(-numel // 8)
    if position_bits:
        index = -(-nnz * position_bits // 8)
    else:
        # Column indices of 16 bits do not reach further: then they are made dearer than the bitmap.
        columns = 2 * nnz + 4 * (d_out + 1) + (d_in > 2**16) * bitmap
        index = (bitmap + columns - abs(bitmap - columns)) // 2  # the smaller of the two
    values, index = code_bytes(nnz, value_bits), (nnz > 0) * (nnz < numel) * index
    # A number in 16 bits may be zero: where an index costs more than the numbers that it spares, all are stored.
    full = 1 * ((value_bits == 16) * (values + index > 2 * numel))
    U, V = rank * d_out, rank * d_in
    return Parts(
        values=values + full * (2 * numel - values),
        index=index - full * index,
        scales=scale_bytes(nnz, value_bits) + scale_bytes(U, factor_bits) + scale_bytes(V, factor_bits),
        factors=code_bytes(U, factor_bits) + code_bytes(V, factor_bits),
        signs=signs * bitmap,
    )


@dataclass(frozen=True)
class Limits:
    """Restrict the ranks, and whether there is a sparse part, to what the serving software of a model supports.

    A layer that is kept dense, with rank 0 and all its weights, is within every limit.

    Args:
        rank_multiple: every rank is 0 or a multiple of it.
        max_rank: the largest rank; None: any.
        sparse: whether a layer may have a sparse part; if not, a layer is low-rank factors alone, dense, or zero.
    Raises:
        UsageError: `rank_multiple` is below 1, or `max_rank` below 0.

    >>> limits = Limits(rank_multiple=8, max_rank=64)
    >>> limits.floor(30), limits.floor(100)
    (24, 64)
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
        """Compute the largest rank within the limits that is at most `rank`."""
        most = rank if self.max_rank is None else min(rank, self.max_rank)
        return most // self.rank_multiple * self.rank_multiple

    def check(self, target: Target, spec: LayerSpec) -> Target:
        """Return `target` if it is within the limits.

        Raises:
            UsageError: it is not; names the layer.
        """
        if self.floor(target.rank) != target.rank:
            most = "" if self.max_rank is None else f", at most {self.max_rank}"
            raise UsageError(
                f"Layer {spec.name}: rank {target.rank} is no multiple of {self.rank_multiple}{most}, and that is all "
                "that can be served."
            )
        if not self.sparse and target.nnz and (target.rank or target.nnz < spec.numel):
            raise UsageError(
                f"Layer {spec.name} has {target.nnz} nonzeros; it is to be served as factors alone, or whole."
            )
        return target


NO_LIMITS = Limits()
"""No limits: every rank and every sparse part."""


def limit_of(kept: float, total: int) -> int:
    """Compute the limit that the fraction `kept` of `total` parameters or bytes is, rounded down, at least 1.

    >>> limit_of(0.3, 1000)
    300
    """
    return max(1, math.floor(kept * total + 1e-9))


@dataclass(frozen=True)
class Budget:
    """Limit what all layers keep together, counted in parameters or in bytes.

    Args:
        limit: the largest total cost of all targets, in parameters or bytes.
        total: the cost of the dense layers, in the same unit.
        accounting: "params" or "bytes" (`Target.params`, `Target.bytes`).
    Raises:
        UnknownNameError: `accounting` is neither of the two.
        UsageError: `limit` is not in (0, `total`].

    >>> specs = [LayerSpec(name, 0, name, name, d_out=64, d_in=64) for name in ("q_proj", "k_proj")]
    >>> budget = Budget.fraction(0.5, specs)
    >>> budget.limit, budget.total
    (4096, 8192)
    >>> budget.cost(Target(rank=8, nnz=1024), specs[0])
    2048
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
        """Make the budget that keeps the fraction `kept` of the compressible layers, rounded down to a whole unit.

        Raises:
            UsageError: `kept` is not in (0, 1].
            UnknownNameError: `accounting` is neither "params" nor "bytes".
        """
        if not 0 < kept <= 1:
            raise UsageError(f"--budget is the fraction kept of the compressible layers, in (0, 1]; got {kept:g}.")
        if accounting not in ACCOUNTINGS:
            raise UnknownNameError("accounting", accounting, ACCOUNTINGS)
        total = sum(spec.numel for spec in specs) * (BYTES_PER_VALUE if accounting == "bytes" else 1)
        return cls(limit=limit_of(kept, total), total=total, accounting=accounting)

    @property
    def kept(self) -> float:
        """Compute the fraction of the dense layers that may be kept, `limit / total`."""
        return self.limit / self.total

    def cost(self, target: Target, spec: HasShape) -> int:
        """Count the parameters or bytes that `target` uses of this budget."""
        return target.params(spec) if self.accounting == "params" else target.bytes(spec)

    def grow(self, target: Target, spec: HasShape, axis: str, top: int, limit: int, step: int = 1) -> Target:
        """Raise the rank or the nonzeros of `target` as far as its cost stays within `limit`.

        The search is a bisection: the cost grows along either axis, except that a full `S` may be cheaper than a nearly
        full one, since it needs no index. A target that already costs more than `limit` is returned unchanged.

        Args:
            target: the target to start from.
            spec: its layer.
            axis: the field that is raised, "rank" or "nnz".
            top: its largest value.
            limit: the largest cost of this one target, in the budget's unit.
            step: the field is raised by multiples of it.

        >>> spec = LayerSpec("q_proj", 0, "q_proj", "q_proj", d_out=64, d_in=64)
        >>> Budget(4096, 4096).grow(Target(rank=8, nnz=0), spec, "nnz", top=4096, limit=2048).nnz
        1024
        """
        start = getattr(target, axis)

        def at(steps: int) -> Target:
            """Return the target raised by a number of steps."""
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
