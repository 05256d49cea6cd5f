"""Compute linear layers `y = S x + U (V x) + b` that are stored packed, in the way that is fastest on the device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from globalopt.errors import ArtefactError, UnknownNameError, UsageError
from globalopt.export.fastest import fastest
from globalopt.export.packing import BITMASK, COLUMNS, EMPTY, Layout, layout, pack, pack_bits, unpack, unpack_bits
from globalopt.values.decomposition import Decomposition
from globalopt.values.layer import NM

AUTO, SPLIT, MERGED, TWO_FOUR, UNPACK = "auto", "split", "merged", "two-four", "unpack"
COMPUTES = (AUTO, SPLIT, MERGED, TWO_FOUR, UNPACK)


@dataclass(frozen=True)
class Shape:
    """Describe a packed layer beside its tensors, as it stands in the config of a checkpoint.

    Args:
        sparse: how `S` is packed.
        rank: of `L`.
        signs: whether `L` is multiplied by a plane of signs.
    Raises:
        ArtefactError: there is no such layer.

    >>> shape = Shape(Layout(d_out=8, d_in=16, form="2:4", values=64), rank=2, signs=False)
    >>> shape.tensors()
    {'weight': (64,), 'support': (16,), 'U': (8, 2), 'V': (2, 16)}
    >>> shape.bytes(per_value=2)
    240
    """

    sparse: Layout
    rank: int
    signs: bool

    def __post_init__(self) -> None:
        whole = isinstance(self.rank, int) and not isinstance(self.rank, bool)
        if not whole or not 0 <= self.rank <= min(self.sparse.d_out, self.sparse.d_in):
            raise ArtefactError(f"Rank {self.rank} is none of a {self.sparse.d_out} x {self.sparse.d_in} matrix.")
        if not isinstance(self.signs, bool) or (self.signs and not self.rank):
            raise ArtefactError(f"Signs {self.signs} do not go with rank {self.rank}.")

    def record(self) -> dict[str, Any]:
        """Return the description as JSON values."""
        how = self.sparse
        shape = {"d_out": how.d_out, "d_in": how.d_in, "form": how.form, "values": how.values}
        return {**shape, "rank": self.rank, "signs": self.signs}

    @classmethod
    def parse(cls, record: Any) -> Shape:
        """Parse what `record` returns; `ArtefactError` if it is something else."""
        try:
            how = Layout(record["d_out"], record["d_in"], record["form"], record["values"])
            return cls(how, record["rank"], record["signs"])
        except (KeyError, TypeError, IndexError):
            raise ArtefactError(f"{str(record)[:80]} does not describe a packed layer.") from None

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the layer's tensors by name, without the bias."""
        how = self.sparse
        found: dict[str, tuple[int, ...]] = {"weight": (how.values,)}
        if how.support_bytes:
            found["support"] = (how.support_bytes,)
        if self.rank:
            found |= {"U": (how.d_out, self.rank), "V": (self.rank, how.d_in)}
        if self.signs:
            found["signs"] = (-(-how.numel // 8),)
        return found

    def bytes(self, per_value: int) -> int:
        """Count the bytes of the layer's tensors, with `per_value` bytes for a floating-point number."""
        how = self.sparse
        signs = -(-how.numel // 8) if self.signs else 0
        return how.bytes(per_value) + per_value * self.rank * (how.d_out + how.d_in) + signs


def shape_of(value: Decomposition, pattern: NM | None = None) -> Shape:
    """Choose the smallest packed shape of a decomposition.

    >>> S = torch.eye(8)
    >>> shape_of(Decomposition(S, S[:, :0], S[:0])).sparse.form
    'bitmask'
    """
    return Shape(layout(value.S, pattern), value.rank, value.signs is not None)


class SparseLowRankLinear(nn.Module):
    """Compute `y = S x + U (V x) + b`, or `y = S x + ((U V) * signs) x + b`.

    Until it is first called it holds the stored tensors: `weight` (values,), the values of `S`; `support` and `signs`,
    bits in uint8; `U` (d_out, rank), `V` (rank, d_in). The first call fixes the way of computing (`compute`):

    auto       the fastest of the next three on this device, measured once per size
    split      `S` unpacked, for one dense product; the factors as two thin ones; without `S` only these
    two-four   as split, with a 2:4 `S` in the semi-structured layout of the device (CUDA)
    merged     one dense product with the sum; the stored tensors stay in memory beside it
    unpack     split, but `S` is unpacked anew in every call: the least memory

    A layer with signs is merged or unpacked. The state dict always holds the stored tensors. `split` and `merged` round
    differently, within the dtype's precision; name one where results must repeat to the bit.

    Args:
        transposed: whether it replaces a `Conv1D`, which stores the transposed weight.

    >>> S, U, V = torch.eye(4) * 2, torch.ones(4, 1), torch.ones(1, 4)
    >>> layer = SparseLowRankLinear.of(Decomposition(S, U, V), bias=None)
    >>> {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    {'weight': (4,), 'support': (2,), 'U': (4, 1), 'V': (1, 4)}
    >>> layer(torch.tensor([[1.0, 0.0, 0.0, 0.0]])).tolist()
    [[3.0, 1.0, 1.0, 1.0]]
    """

    weight: nn.Parameter
    U: nn.Parameter | None
    V: nn.Parameter | None
    bias: nn.Parameter | None
    support: Tensor | None
    signs: Tensor | None
    values: Tensor | None

    def __init__(
        self,
        shape: Shape,
        bias: bool,
        transposed: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.out_features, self.in_features = shape.sparse.d_out, shape.sparse.d_in
        self.transposed = transposed
        self.compute = AUTO
        self.path: str | None = None
        sizes = shape.tensors()
        for name in ("weight", "U", "V"):
            made = _parameter(torch.empty(sizes[name], dtype=dtype, device=device)) if name in sizes else None
            self.register_parameter(name, made)
        for name in ("support", "signs"):
            made = torch.empty(sizes[name], dtype=torch.uint8, device=device) if name in sizes else None
            self.register_buffer(name, made)
        self.register_buffer("values", None, persistent=False)
        b = _parameter(torch.empty(self.out_features, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", b)

    @classmethod
    def of(
        cls, value: Decomposition, bias: Tensor | None, transposed: bool = False, pattern: NM | None = None
    ) -> SparseLowRankLinear:
        """Pack a decomposition into a layer, with tensors of its dtype and device."""
        made = cls(shape_of(value, pattern), bias is not None, transposed, device="meta")
        values, support = pack(value.S, made.shape.sparse)
        made.weight, made.support = _parameter(values), support
        if value.rank:
            made.U, made.V = _parameter(value.U), _parameter(value.V)
        if value.signs is not None:
            made.signs = pack_bits(value.signs.flatten() > 0)
        if bias is not None:
            made.bias = _parameter(bias)
        return made

    def value(self) -> Decomposition:
        """Unpack the decomposition of the layer; `ArtefactError` where the stored tensors do not describe one."""
        how = self.shape.sparse
        if self.path in (SPLIT, TWO_FOUR):
            S = self._sparse_weight()
        else:
            S = unpack(self.weight if self.values is None else self.values, self.support, how)
        signs = None
        if self.signs is not None:
            bits = unpack_bits(self.signs, how.numel).reshape(how.d_out, how.d_in)
            signs = bits.to(S.dtype) * 2 - 1
        U = S.new_zeros(how.d_out, 0) if self.U is None else self.U.detach()
        V = S.new_zeros(0, how.d_in) if self.V is None else self.V.detach()
        return Decomposition(S.detach(), U, V, signs)

    def use(self, compute: str) -> None:
        """Set the way of computing from the next call on.

        Raises:
            UnknownNameError: there is no way called `compute`.
            UsageError: this layer or device does not support it.
        """
        if compute not in COMPUTES:
            raise UnknownNameError("compute", compute, COMPUTES)
        self._pack()
        if compute == TWO_FOUR:
            _two_four(self.value().S)
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to `x` (..., d_in) -> (..., d_out)."""
        if self.path is None:
            self._choose_path()
        if self.path == MERGED:
            return F.linear(x, self.weight, self.bias)
        if self.path == UNPACK and self.signs is not None:
            return F.linear(x, self.value().dense().to(x.dtype), self.bias)
        how = self.shape.sparse
        if how.form == EMPTY:
            return self._sum(x, None)
        return self._sum(x, unpack(self.weight, self.support, how) if self.path == UNPACK else self.weight)

    def _sum(self, x: Tensor, S: Tensor | None) -> Tensor:
        """Compute `S x + U (V x) + b`; `S` None: it is zero."""
        if self.U is None or self.V is None:
            if S is not None:
                return F.linear(x, S, self.bias)
            y = x.new_zeros(*x.shape[:-1], self.out_features)
            return y if self.bias is None else y + self.bias
        if S is None:
            return F.linear(F.linear(x, self.V), self.U, self.bias)
        return F.linear(x, S, self.bias) + F.linear(F.linear(x, self.V), self.U)

    def _choose_path(self) -> None:
        """Choose the way of computing, and make the weight that it needs."""
        # Weights that are moved to the device for one call are dropped after it, also an unpacked one.
        if self.compute == UNPACK or _offloaded(self):
            self.path = UNPACK
            return
        # Weights made in inference mode can be neither cast nor differentiated through.
        with torch.inference_mode(False), torch.no_grad():
            choices = self._choices()
            chosen = next(iter(choices)) if len(choices) == 1 else self._measured(choices)
            self._hold(chosen, choices[chosen])

    def _choices(self) -> dict[str, Tensor | None]:
        """Make the dense weight of each way of computing, the least memory first; None where it needs none."""
        value = self.value()
        if value.signs is not None:
            # `(U V) * signs` does not factor into two thin products.
            return {MERGED: value.dense().to(value.S.dtype)}
        if self.compute == TWO_FOUR:
            return {TWO_FOUR: _two_four(value.S)}
        choices: dict[str, Tensor | None] = {}
        if self.compute == AUTO and self.shape.sparse.form == str(NM(2, 4)):
            with contextlib.suppress(UsageError):
                choices[TWO_FOUR] = _two_four(value.S)
        if self.compute != MERGED or not value.rank:
            choices[SPLIT] = None if self.shape.sparse.form == EMPTY else value.S
        if self.compute != SPLIT and value.rank:
            choices[MERGED] = value.dense().to(value.S.dtype)
        return choices

    def _measured(self, choices: dict[str, Tensor | None]) -> str:
        """Return the fastest of the choices, timed once per process for layers of about one size."""
        how = self.shape.sparse
        # Layers of about one size share a measurement.
        key = (how.d_out, how.d_in, self.shape.rank.bit_length(), tuple(choices), self.weight.dtype, self.weight.device)
        if key not in _MEASURED:
            _MEASURED[key] = fastest({n: self._path(n, W) for n, W in choices.items()}, how.d_in, self.weight)
        return _MEASURED[key]

    def _path(self, name: str, W: Tensor | None) -> Callable[[Tensor], Tensor]:
        """Return the function that computes in the way `name` with the weight `W`."""
        if name == MERGED:
            assert W is not None
            return lambda x: F.linear(x, W, self.bias)
        return lambda x: self._sum(x, W)

    def _hold(self, path: str, weight: Tensor | None) -> None:
        """Replace the stored values by the weight of the chosen way of computing."""
        if path == MERGED:
            self.values = self.weight.detach()
        else:
            # The positions of the values can be read off the unpacked S.
            self.support = None
        if weight is not None:
            self.weight = _parameter(weight)
        self.path = path

    def _pack(self) -> None:
        """Return to the stored tensors alone."""
        if self.path is None:
            return
        stored = self._stored()
        self.weight, self.support, self.values = _parameter(stored["weight"]), stored.get("support"), None
        self.path = None

    def _stored(self) -> dict[str, Tensor]:
        """Return the tensors of the state dict, without their prefix."""
        if self.path in (SPLIT, TWO_FOUR) and self.shape.sparse.form != EMPTY:
            S, how = self._sparse_weight(), self.shape.sparse
            if how.form in (BITMASK, COLUMNS) and int(torch.count_nonzero(S)) != how.values:
                # A cast to a shorter dtype can round a value to zero.
                self.shape = replace(self.shape, sparse=layout(S))
            weight, support = pack(S, self.shape.sparse)
        else:
            weight, support = self.weight if self.values is None else self.values, self.support
        found = {"weight": weight, "support": support, "U": self.U, "V": self.V, "signs": self.signs, "bias": self.bias}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def _sparse_weight(self) -> Tensor:
        """Return `S` (d_out, d_in) of a layer that computes with it unpacked."""
        if self.shape.sparse.form == EMPTY:
            return self.weight.detach().new_zeros(self.out_features, self.in_features)
        W = self.weight.detach()
        return W.to_dense() if self.path == TWO_FOUR else W

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save the stored tensors instead of the weight that the layer computes with."""
        for name, tensor in self._stored().items():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def extra_repr(self) -> str:
        """Describe the layer in the printed model."""
        how, path = self.shape.sparse, self.path or self.compute
        return f"{self.in_features}, {self.out_features}, S={how.form}, rank={self.shape.rank}, compute={path}"


_MEASURED: dict[tuple[object, ...], str] = {}


def _two_four(S: Tensor) -> Tensor:
    """Convert `S` to the semi-structured layout of its device; `UsageError` where there is none."""
    try:
        W = torch.sparse.to_sparse_semi_structured(S)
        F.linear(S.new_zeros(1, S.shape[1]), W)
        return W
    # torch passes on the errors of its backends: for the device, the dtype, the sizes, the pattern, missing builds.
    except (RuntimeError, ValueError, NotImplementedError, TypeError, AttributeError) as cause:
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        raise UsageError(
            f"Compute two-four is not available for a {tuple(S.shape)} {S.dtype} layer on {S.device.type} ({reason}). "
            "Use auto."
        ) from None


def _offloaded(module: nn.Module) -> bool:
    """Tell whether accelerate moves the module's weights to the device for each call."""
    hook = getattr(module, "_hf_hook", None)
    hooks = [hook, *getattr(hook, "hooks", ())]
    return any(getattr(each, "offload", False) for each in hooks)


def _parameter(tensor: Tensor) -> nn.Parameter:
    """Make a parameter without gradient."""
    return nn.Parameter(tensor.detach(), requires_grad=False)
