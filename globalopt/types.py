"""The values that pass between stages: frozen, and checked once, at birth.

Conventions, stated here and nowhere else:

* `W` is `(d_out, d_in)` as in `nn.Linear`; a GPT-2 `Conv1D` is transposed where the model is read and written.
* **layer** = one linear map, **block** = one decoder layer, **site** = one input tensor shared by several layers
  (q/k/v; gate/up).
* `G = mean over tokens of x xᵀ`: per token, no factor 2. Layer error = `tr(E G Eᵀ)` with `E = W - S - L`.
* `A = mean over tokens of g gᵀ`, `g` the gradient of `log p(label)` at the layer's output, labels sampled from the
  model. `tr(A E G Eᵀ) / 2` is then a predicted loss in nats per token (K-FAC).
* Kernels compute in float32 (float64 where a result depends on it); errors are summed in float64; parameters are
  counted as integers.
* A budget is the fraction **kept** of the compressible layers, in (0, 1].
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor

from globalopt.errors import BudgetError, CalibrationError, NumericalError, UnknownNameError, UsageError
from globalopt.summary import Trace

ACCOUNTINGS = ("params", "bytes")
BYTES_PER_VALUE = 2  # values are stored in 16 bits in every format we count


@dataclass(frozen=True)
class NM:
    """An N:M pattern: of every `of` consecutive weights of a row exactly `keep` may be nonzero."""

    keep: int
    of: int

    def __post_init__(self) -> None:
        if not 0 < self.keep < self.of:
            raise UsageError(f"Pattern {self.keep}:{self.of} must keep at least 1 and fewer than all of its group.")

    @classmethod
    def parse(cls, text: str) -> NM | None:
        """Read "2:4" (keep 2 of 4) or "unstructured" (None)."""
        if text == "unstructured":
            return None
        keep, colon, of = text.partition(":")
        if not (colon and keep.isdecimal() and of.isdecimal()):
            raise UnknownNameError("pattern", text, ("unstructured", "2:4", "4:8", "1:4", "2:8"))
        return cls(int(keep), int(of))

    def nnz(self, spec: LayerSpec) -> int:
        """Nonzeros of a layer under this pattern; `UsageError` where `d_in` is no multiple of the group."""
        if spec.d_in % self.of:
            raise UsageError(
                f"Pattern {self} needs d_in to be a multiple of {self.of}; layer {spec.name} has d_in = {spec.d_in}. "
                "Use --pattern unstructured."
            )
        return spec.numel // self.of * self.keep

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"


@dataclass(frozen=True)
class LayerSpec:
    """One compressible linear layer: where it is and how large.

    `name` is the module path; `site` names the input tensor it shares with other layers; `kind` is the shortest
    name that tells the layers of one block apart ("q_proj").
    """

    name: str
    block: int
    site: str
    kind: str
    d_out: int
    d_in: int

    def __post_init__(self) -> None:
        if self.d_out < 1 or self.d_in < 1:
            raise UsageError(f"Layer {self.name} has shape {self.d_out} x {self.d_in}; both sizes must be at least 1.")

    @property
    def numel(self) -> int:
        return self.d_out * self.d_in

    @property
    def max_rank(self) -> int:
        return min(self.d_out, self.d_in)


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
    def dense(cls, spec: LayerSpec) -> Target:
        return cls(rank=0, nnz=spec.numel)

    @classmethod
    def zero(cls) -> Target:
        return cls(rank=0, nnz=0)

    def check(self, spec: LayerSpec) -> Target:
        """Return self if it fits `spec`; `UsageError` naming the layer and the range otherwise."""
        if self.rank > spec.max_rank:
            raise UsageError(f"Layer {spec.name}: rank {self.rank} is above its largest rank {spec.max_rank}.")
        if self.nnz > spec.numel:
            raise UsageError(f"Layer {spec.name}: {self.nnz} nonzeros are more than its {spec.numel} weights.")
        if self.pattern is not None and self.nnz != self.pattern.nnz(spec):
            raise UsageError(
                f"Layer {spec.name}: pattern {self.pattern} means {self.pattern.nnz(spec)} nonzeros, not {self.nnz}."
            )
        return self

    def params(self, spec: LayerSpec) -> int:
        """Parameters kept: `rank (d_out + d_in) + nnz`, plus one 16-bit value per 16 bits of a sign plane."""
        plane = math.ceil(spec.numel / 16) if self.signs else 0
        return self.rank * (spec.d_out + spec.d_in) + self.nnz + plane

    def rank_share(self, spec: LayerSpec) -> float:
        """Share of the kept parameters that is in the factors; 0 where nothing is kept."""
        params = self.params(spec)
        return self.rank * (spec.d_out + spec.d_in) / params if params else 0.0

    def bytes(self, spec: LayerSpec) -> int:
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

    def cost(self, target: Target, spec: LayerSpec) -> int:
        """What `target` uses of this budget."""
        return target.params(spec) if self.accounting == "params" else target.bytes(spec)

    def grow(self, target: Target, spec: LayerSpec, axis: str, top: int, limit: int, step: int = 1) -> Target:
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


STRIP = 512
"""Rows of a Gram that are checked at once."""


@dataclass(frozen=True, eq=False)
class Gram:
    """Second moment `matrix` (d, d) float32 of a tensor over `tokens` tokens; never modified."""

    matrix: Tensor
    tokens: int

    def __post_init__(self) -> None:
        m = self.matrix
        if m.ndim != 2 or m.shape[0] != m.shape[1]:
            raise CalibrationError(f"A Gram must be square; got shape {tuple(m.shape)}.")
        if self.tokens < 1:
            raise CalibrationError("A Gram needs at least one token; no token reached this input.")
        # A strip at a time: copies of the matrix would be what a run needs most memory for.
        strips = [slice(first, first + STRIP) for first in range(0, len(m), STRIP)]
        if not all(bool(torch.isfinite(m[rows]).all()) for rows in strips):
            raise CalibrationError("The Gram is not finite: the activations overflow or the model holds NaN.")
        if bool((m.diagonal() < 0).any()):
            raise CalibrationError("The Gram has a negative diagonal entry; it is no second moment.")
        scale = max(m[rows].abs().max() for rows in strips)
        if any(bool((m[rows] - m.mT[rows]).abs().max() > 1e-4 * scale) for rows in strips):
            raise CalibrationError("The Gram is not symmetric; it is no second moment.")

    @property
    def diagonal(self) -> Tensor:
        """(d,) mean square of each coordinate."""
        return self.matrix.diagonal()

    @property
    def norms(self) -> Tensor:
        """(d,) root mean square of each coordinate, Wanda's `||x_j||` up to the number of tokens."""
        return self.diagonal.sqrt()

    def to(self, device: torch.device) -> Gram:
        """The same Gram on `device`."""
        return self if self.matrix.device == device else Gram(self.matrix.to(device), self.tokens)

    def damped(self, damping: float) -> Gram:
        """A new Gram with `damping * mean(diagonal)` added to the diagonal."""
        ridge = damping * float(self.diagonal.double().mean())
        return Gram(self.matrix + ridge * torch.eye(len(self.matrix), device=self.matrix.device), self.tokens)


ENTRIES_AT_ONCE = 2**22
"""Of a residual whose error is summed in float64."""


@dataclass(frozen=True, eq=False)
class Metric:
    """The norm a layer error is measured in: `tr(A E G Eᵀ)`, or `tr(E G Eᵀ)` without `outputs`.

    `inputs` is G (d_in, d_in); `outputs` is A (d_out, d_out) or None.
    """

    inputs: Gram
    outputs: Gram | None = None

    def error(self, residual: Tensor) -> float:
        """`tr(A E G Eᵀ)` for the residual `E` (d_out, d_in), undamped, summed in float64."""
        G = self.inputs.matrix
        residual = residual.to(G.dtype)
        AE = residual if self.outputs is None else self.outputs.matrix.to(residual.dtype) @ residual
        # Some rows at a time: copies in float64 of a whole layer would be what a small machine runs out of memory for.
        rows = max(1, ENTRIES_AT_ONCE // len(G))
        found = 0.0
        for begin in range(0, len(residual), rows):
            some = slice(begin, begin + rows)
            found += float((residual[some] @ G).double().mul_(AE[some]).sum())
        # Rounding can push an exact zero below it.
        return max(0.0, found)


@dataclass(frozen=True, eq=False)
class Decomposition:
    """`W ~ S + U V`, or `S + (U V) * signs` for SLaB.

    Args:
        S: (d_out, d_in) with exact zeros.
        U: (d_out, rank). V: (rank, d_in). Rank 0 is allowed.
        signs: (d_out, d_in) of +-1, or None.
    """

    S: Tensor
    U: Tensor
    V: Tensor
    signs: Tensor | None = None

    def __post_init__(self) -> None:
        d_out, d_in = self.S.shape
        if self.U.shape[0] != d_out or self.V.shape[1] != d_in or self.U.shape[1] != self.V.shape[0]:
            raise NumericalError(
                f"Shapes disagree: S {tuple(self.S.shape)}, U {tuple(self.U.shape)}, V {tuple(self.V.shape)}."
            )
        if self.signs is not None and self.signs.shape != self.S.shape:
            raise NumericalError(f"Signs {tuple(self.signs.shape)} do not match S {tuple(self.S.shape)}.")
        for label, part in (("S", self.S), ("U", self.U), ("V", self.V)):
            if not bool(torch.isfinite(part).all()):
                raise NumericalError(f"{label} of the decomposition is not finite.")

    @property
    def rank(self) -> int:
        return self.U.shape[1]

    @property
    def nnz(self) -> int:
        return int(torch.count_nonzero(self.S))

    def dense(self) -> Tensor:
        """(d_out, d_in) float32, or float64 if the parts are: the matrix this stands for."""
        dtype = torch.promote_types(self.S.dtype, torch.float32)
        L = self.U.to(dtype) @ self.V.to(dtype)
        if self.signs is not None:
            L = L * self.signs
        return L.add_(self.S)

    def matvec(self, x: Tensor) -> Tensor:
        """Apply to inputs `x` (..., d_in) -> (..., d_out), without forming the low-rank product where possible."""
        if self.signs is not None:
            return x @ self.dense().to(x.dtype).mT
        return x @ self.S.to(x.dtype).mT + (x @ self.V.to(x.dtype).mT) @ self.U.to(x.dtype).mT

    def fits(self, target: Target) -> bool:
        """Whether counts and pattern are within `target`."""
        if self.rank > target.rank or self.nnz > target.nnz or (self.signs is not None) != target.signs:
            return False
        return target.pattern is None or follows(self.S, target.pattern)


def follows(S: Tensor, pattern: NM) -> bool:
    """Whether every group of `pattern.of` consecutive weights of a row of `S` has at most `pattern.keep` nonzeros."""
    if S.shape[1] % pattern.of:
        return False
    groups = S.reshape(S.shape[0], -1, pattern.of)
    return bool(((groups != 0).sum(-1) <= pattern.keep).all())


class Status(Enum):
    """How a solver ended, each with a sentence of advice."""

    CONVERGED = "converged"
    MAX_STEPS = "max-steps"
    FALLBACK = "fallback"

    @property
    def advice(self) -> str:
        return {
            Status.CONVERGED: "The support settled, or the method has no iteration to wait for.",
            Status.MAX_STEPS: "The step limit came first; more steps may lower the error.",
            Status.FALLBACK: "The Gram needed more damping than asked; use more calibration tokens.",
        }[self]


@dataclass(frozen=True, eq=False)
class Solution:
    """A solver's answer: `value`, its undamped `error` (`Metric.error`), how it ended, and figures (`stats`).

    `trace` holds iterations and the objective after them, in the solver's own damped norm; first, after 0, that of
    keeping nothing. It is empty where there is no iteration, or where writing it down would cost time.
    """

    value: Decomposition
    error: float
    status: Status = Status.CONVERGED
    stats: Mapping[str, float] = field(default_factory=dict)
    trace: Trace = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.error) and self.error >= 0):
            raise NumericalError(f"The layer error came out as {self.error}; the decomposition is unusable.")


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


@dataclass(frozen=True)
class Profile:
    """What one-shot heuristics read off a layer.

    Args:
        outliers: by threshold M, the share of the layer's entries whose `|w_ij| ||x_j||` is above M times the mean over
            all layers of its block (OWL, arXiv:2310.05175).
        alpha: Hill estimate of the power-law exponent of the eigenvalues of `Wᵀ W` (AlphaPruning, arXiv:2410.10912).
    """

    outliers: Mapping[int, float]
    alpha: float


@dataclass(frozen=True)
class ErrorSurface:
    """Predicted error of every option of one layer; not required to be monotone.

    Args:
        spec: the layer.
        targets: the options, with distinct `(rank, nnz)`.
        error: one per option, >= 0: nats per token where a sensitivity is there, else `tr(E G Eᵀ)`.
    """

    spec: LayerSpec
    targets: tuple[Target, ...]
    error: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.targets or len(self.targets) != len(self.error):
            raise NumericalError(f"Layer {self.spec.name}: {len(self.targets)} options, {len(self.error)} errors.")
        if not all(math.isfinite(e) and e >= 0 for e in self.error):
            raise NumericalError(f"Layer {self.spec.name}: a predicted error is negative or not finite.")
        for target in self.targets:
            target.check(self.spec)

    @cached_property
    def _rows(self) -> tuple[list[int], list[tuple[list[int], list[float]]]]:
        by_rank: dict[int, list[tuple[int, float]]] = {}
        for target, error in zip(self.targets, self.error, strict=True):
            by_rank.setdefault(target.rank, []).append((target.nnz, error))
        ranks = sorted(by_rank)
        rows = []
        for rank in ranks:
            points = sorted(by_rank[rank])
            rows.append(([n for n, _ in points], [e for _, e in points]))
        return ranks, rows

    def predict(self, target: Target) -> float:
        """Error of any target, linear between the nearest options in nnz, then in rank; constant outside them."""
        ranks, rows = self._rows
        at = [interpolate(nnz, error, target.nnz) for nnz, error in rows]
        return interpolate(ranks, at, target.rank)

    def frontier(self, budget: Budget) -> tuple[tuple[Target, int, float], ...]:
        """Undominated options as `(target, cost, error)`: cost strictly up, error strictly down."""
        options = sorted(
            ((budget.cost(t, self.spec), e, t.rank, t.nnz, t) for t, e in zip(self.targets, self.error, strict=True)),
            key=lambda o: o[:4],
        )
        kept: list[tuple[Target, int, float]] = []
        for cost, error, _, _, target in options:
            if not kept or error < kept[-1][2]:
                kept.append((target, cost, error))
        return tuple(kept)


def interpolate(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """Piecewise linear through the points `(xs, ys)`, `xs` ascending; constant outside them."""
    right = bisect.bisect_left(xs, x)
    if right == 0:
        return ys[0]
    if right == len(xs):
        return ys[-1]
    t = (x - xs[right - 1]) / (xs[right] - xs[right - 1])
    return ys[right - 1] + t * (ys[right] - ys[right - 1])


@dataclass(frozen=True)
class Allocation:
    """One target per layer within a budget; made only by `Problem.finish`, or read back from a budget file.

    Args:
        targets: by layer name, in model order.
        budget: the limit and its unit.
        used: what the targets use, in the budget's unit.
        predicted: sum of the surfaces' errors.
        by: the allocator's name.
        bound: a proved lower bound on `predicted` over all choices of options, or None.
    """

    targets: Mapping[str, Target]
    budget: Budget
    used: int
    predicted: float
    by: str
    bound: float | None = None

    def __post_init__(self) -> None:
        if self.used > self.budget.limit:
            raise BudgetError(f"The allocation uses {self.used} of {self.budget.limit} {self.budget.accounting}.")
        object.__setattr__(self, "targets", MappingProxyType(dict(self.targets)))

    @property
    def gap(self) -> float | None:
        """Relative distance to the bound, `(predicted - bound) / predicted`, at least 0."""
        if self.bound is None:
            return None
        return max(0.0, self.predicted - self.bound) / self.predicted if self.predicted > 0 else 0.0


@dataclass(frozen=True)
class Problem:
    """Everything an allocator sees: the surfaces, the budget, a pattern for `S`, a seed, and what heuristics read.

    `profiles`, by layer name, may be empty: the allocators that read them then refuse. Every option of the surfaces,
    and every answer, is within the `limits`.
    """

    surfaces: tuple[ErrorSurface, ...]
    budget: Budget
    pattern: NM | None = None
    seed: int = 0
    profiles: Mapping[str, Profile] = field(default_factory=dict)
    limits: Limits = FREE

    def __post_init__(self) -> None:
        if not self.surfaces:
            raise BudgetError("There is no layer to allocate to.")
        if self.limits != FREE:
            for surface in self.surfaces:
                for target in surface.targets:
                    self.limits.check(target, surface.spec)
        least = sum(min(self.budget.cost(t, s.spec) for t in s.targets) for s in self.surfaces)
        if least > self.budget.limit:
            share = least / self.budget.total
            why = f" with pattern {self.pattern}" if self.pattern else ""
            raise BudgetError(
                f"A budget of {self.budget.kept:.4g} keeps {self.budget.limit} {self.budget.accounting}; the cheapest "
                f"allocation{why} needs {least}. Raise --budget to at least {math.ceil(share * 1e4) / 1e4:g}."
            )

    @property
    def specs(self) -> tuple[LayerSpec, ...]:
        return tuple(surface.spec for surface in self.surfaces)

    @property
    def axis(self) -> str:
        """What is spent on to the end: "nnz", or "rank" where a pattern or the limits leave nothing else free."""
        return "nnz" if self.pattern is None and self.limits.sparse else "rank"

    def grow(self, target: Target, spec: LayerSpec, axis: str, top: int, limit: int) -> Target:
        """`Budget.grow` within the limits, from a target that is."""
        if axis == "rank":
            # A target that is above `top` already stays.
            top = max(target.rank, self.limits.floor(top))
            return self.budget.grow(target, spec, axis, top, limit, self.limits.rank_multiple)
        return self.budget.grow(target, spec, axis, top, limit)

    def scaled(self, factors: Mapping[str, float]) -> Problem:
        """The same problem with every layer's errors multiplied by its factor."""
        surfaces = (
            replace(surface, error=tuple(factors[surface.spec.name] * error for error in surface.error))
            for surface in self.surfaces
        )
        return replace(self, surfaces=tuple(surfaces))

    def predicted(self, targets: Mapping[str, Target]) -> float:
        """Sum over layers of the surfaces' errors at `targets`."""
        return math.fsum(surface.predict(targets[surface.spec.name]) for surface in self.surfaces)

    def used(self, targets: Mapping[str, Target]) -> int:
        """What `targets` use together, in the budget's unit."""
        return sum(self.budget.cost(targets[spec.name], spec) for spec in self.specs)

    def finish(self, targets: Mapping[str, Target], by: str, bound: float | None = None) -> Allocation:
        """Check every target and the budget, and make the allocation; the only place one is made.

        Raises:
            BudgetError: the targets exceed the budget, or their layers are not the problem's.
            UsageError: a target does not fit its layer or the limits.
        """
        if set(targets) != {spec.name for spec in self.specs}:
            raise BudgetError(f"{by} returned targets for {len(targets)} layers; the problem has {len(self.specs)}.")
        ordered = {spec.name: self.limits.check(targets[spec.name].check(spec), spec) for spec in self.specs}
        return Allocation(ordered, self.budget, self.used(ordered), self.predicted(ordered), by, bound)
