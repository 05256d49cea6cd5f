"""Compute linear layers `y = S x + U (V x) + b` that are stored packed, in the way that is fastest on the device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from globalopt.errors import UnknownNameError, UsageError
from globalopt.export.codes import decode, encode
from globalopt.export.fastest import fastest
from globalopt.export.packing import BITMASK, COLUMNS, EMPTY, layout, pack, unpack, unpacked_numbers
from globalopt.export.shape import SCALES, Shape, shape_of
from globalopt.values.bits import pack_bits
from globalopt.values.decomposition import Decomposition
from globalopt.values.layer import NM

AUTO, SPLIT, MERGED, TWO_FOUR, UNPACK = "auto", "split", "merged", "two-four", "unpack"
COMPUTES = (AUTO, SPLIT, MERGED, TWO_FOUR, UNPACK)

_STORED = {"weight": "values", "U": "U_codes", "V": "V_codes"}
"""Where the stored numbers of a part are while its parameter holds what the layer computes with."""


class SparseLowRankLinear(nn.Module):
    """Compute `y = S x + U (V x) + b`, or `y = S x + ((U V) * signs) x + b`.

    Until it is first called it holds the stored tensors: `weight` (values,), the values of `S`; `support` and `signs`,
    bits in uint8; `U` (d_out, rank), `V` (rank, d_in). What is stored in less than 16 bits are packed codes in uint8,
    with scales beside them (`codes`): those of `U` by its columns, those of `V` by its rows. The first call fixes the
    way of computing (`compute`):

    auto       the fastest of the next three on this device, measured once per size
    split      `S` unpacked, for one dense product; the factors as two thin ones; without `S` only these
    two-four   as split, with a 2:4 `S` in the semi-structured layout of the device (CUDA)
    merged     one dense product with the sum; the stored tensors stay in memory beside it
    unpack     split, but `S` is unpacked, and codes are decoded, anew in every call: the least memory

    A layer with signs is merged or unpacked. The state dict always holds the stored tensors; codes stay in memory
    beside the numbers that were decoded from them, so that no cast changes them. `split` and `merged` round
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
        self._dtype = dtype or torch.get_default_dtype()
        made = {
            name: torch.empty(size, dtype=shape.dtype(name) or dtype, device=device)
            for name, size in shape.tensors().items()
        }
        for name, stored in _STORED.items():
            self.register_parameter(name, _parameter(made[name]) if name in made else None)
            self.register_buffer(stored, None, persistent=False)
        for name in ("support", "signs", *(part + SCALES for part in _STORED)):
            self.register_buffer(name, made.get(name))
        b = _parameter(torch.empty(self.out_features, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", b)

    @classmethod
    def of(
        cls, value: Decomposition, bias: Tensor | None, transposed: bool = False, pattern: NM | None = None
    ) -> SparseLowRankLinear:
        """Pack a decomposition into a layer, with tensors of its dtype and device."""
        made = cls(shape_of(value, pattern), bias is not None, transposed, value.S.dtype, "meta")
        values, made.support = pack(value.S, made.shape.sparse)
        made._put("weight", values, value)
        if value.rank:
            made._put("U", value.U, value)
            made._put("V", value.V, value)
        if value.signs is not None:
            made.signs = pack_bits(value.signs > 0)
        if bias is not None:
            made.bias = _parameter(bias)
        return made

    def drop_zero(self) -> None:
        """Store no value of an empty `S`, as from version 2 of the format on; version 1 stores one zero."""
        if self.shape.sparse.form == EMPTY and self.shape.sparse.values:
            self.shape = replace(self.shape, sparse=replace(self.shape.sparse, values=0))
            self.weight = _parameter(self.weight.new_empty(0))

    def _put(self, part: str, numbers: Tensor, value: Decomposition) -> None:
        """Store the numbers of a part, as codes where the shape says so."""
        bits = self.shape.coded(part)
        if bits is not None and value.scales is not None:
            scales = {"weight": value.scales.S, "U": value.scales.U, "V": value.scales.V}[part]
            flat = (numbers.mT if part == "U" else numbers).flatten()
            numbers, codes_scales = encode(flat, flat.new_zeros(0) if scales is None else scales, bits)
            setattr(self, part + SCALES, codes_scales)
        setattr(self, part, _parameter(numbers))

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type that the layer computes in."""
        return self.weight.dtype if self.weight.is_floating_point() else self._dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLowRankLinear:
        """Apply a cast or a move to all tensors; codes stay, and are decoded in the new type from then on."""
        self._dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def value(self) -> Decomposition:
        """Unpack the decomposition of the layer; `ArtefactError` where the stored tensors do not describe one."""
        how = self.shape.sparse
        if self.path in (SPLIT, TWO_FOUR) and self.values is None:
            S = self._sparse_weight()
        else:
            S = unpack(self._numbers("weight"), self.support, how)
        signs = None
        if self.signs is not None:
            signs = unpacked_numbers(self.signs, 1, how.numel).view(how.d_out, how.d_in).to(S.dtype) * 2 - 1
        U, V = self._factors()
        return Decomposition(S.detach(), U, V, signs)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Return the stored factors, codes decoded."""
        how, rank = self.shape.sparse, self.shape.rank
        if not rank:
            like = torch.empty(0, dtype=self.dtype, device=self.weight.device)
            return like.new_zeros(how.d_out, 0), like.new_zeros(0, how.d_in)
        U, V = self._numbers("U"), self._numbers("V")
        return U if U.ndim == 2 else U.view(rank, how.d_out).mT.contiguous(), V.view(rank, how.d_in)

    def _numbers(self, part: str) -> Tensor:
        """Return the stored numbers of a part, codes decoded into numbers (n,)."""
        kept = getattr(self, _STORED[part])
        stored = getattr(self, part).detach() if kept is None else kept
        bits = self.shape.coded(part)
        if bits is None:
            return stored
        return decode(stored, getattr(self, part + SCALES), bits, self.shape.count(part), self.dtype)

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
        if self.path == UNPACK:
            empty = self.shape.sparse.form == EMPTY
            S = None if empty else unpack(self._numbers("weight"), self.support, self.shape.sparse)
            return self._sum(x, S, *self._factors())
        return self._sum(x, None if self.shape.sparse.form == EMPTY else self.weight, self.U, self.V)

    def _sum(self, x: Tensor, S: Tensor | None, U: Tensor | None, V: Tensor | None) -> Tensor:
        """Compute `S x + U (V x) + b`; `S` None: it is zero."""
        if not self.shape.rank or U is None or V is None:
            if S is not None:
                return F.linear(x, S, self.bias)
            y = x.new_zeros(*x.shape[:-1], self.out_features)
            return y if self.bias is None else y + self.bias
        if S is None:
            return F.linear(F.linear(x, V), U, self.bias)
        return F.linear(x, S, self.bias) + F.linear(F.linear(x, V), U)

    def _choose_path(self) -> None:
        """Choose the way of computing, and make the weight that it needs."""
        # Weights that are moved to the device for one call are dropped after it, also an unpacked one.
        if self.compute == UNPACK or _offloaded(self):
            self.path = UNPACK
            return
        # Weights made in inference mode can be neither cast nor differentiated through.
        with torch.inference_mode(False), torch.no_grad():
            value = self.value()
            choices = self._choices(value)
            chosen = next(iter(choices)) if len(choices) == 1 else self._measured(choices, value)
            self._hold(chosen, choices[chosen], value)

    def _choices(self, value: Decomposition) -> dict[str, Tensor | None]:
        """Make the dense weight of each way of computing, the least memory first; None where it needs none."""
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

    def _measured(self, choices: dict[str, Tensor | None], value: Decomposition) -> str:
        """Return the fastest of the choices, timed once per process for layers of about one size."""
        how, like = self.shape.sparse, torch.empty(0, dtype=self.dtype, device=self.weight.device)
        # Layers of about one size share a measurement.
        key = (how.d_out, how.d_in, self.shape.rank.bit_length(), tuple(choices), like.dtype, like.device)
        if key not in _MEASURED:
            _MEASURED[key] = fastest({n: self._path(n, W, value) for n, W in choices.items()}, how.d_in, like)
        return _MEASURED[key]

    def _path(self, name: str, W: Tensor | None, value: Decomposition) -> Callable[[Tensor], Tensor]:
        """Return the function that computes in the way `name` with the weight `W`."""
        if name == MERGED:
            assert W is not None
            return lambda x: F.linear(x, W, self.bias)
        return lambda x: self._sum(x, W, value.U, value.V)

    def _hold(self, path: str, weight: Tensor | None, value: Decomposition) -> None:
        """Hold what the chosen way of computing needs, in place of the stored tensors or beside them."""
        split = path != MERGED
        if split and self.shape.coded("weight") is None:
            # The values and their positions can be read off the unpacked S.
            self.support = None
        else:
            self.values = self.weight.detach()
        if weight is not None:
            self.weight = _parameter(weight)
        if split and self.U is not None and self.V is not None and self.shape.coded("U") is not None:
            self.U_codes, self.V_codes = self.U.detach(), self.V.detach()
            self.U, self.V = _parameter(value.U), _parameter(value.V)
        self.path = path

    def _pack(self) -> None:
        """Return to the stored tensors alone."""
        if self.path is None:
            return
        stored = self._stored()
        self.support = stored.get("support")
        for part, kept in _STORED.items():
            if part in stored:
                setattr(self, part, _parameter(stored[part]))
            setattr(self, kept, None)
        self.path = None

    def _stored(self) -> dict[str, Tensor]:
        """Return the tensors of the state dict, without their prefix."""
        found = {name: getattr(self, name) for name in ("weight", "weight_scales", "support")}
        if self.path in (SPLIT, TWO_FOUR) and self.values is None and self.shape.sparse.form != EMPTY:
            S, how = self._sparse_weight(), self.shape.sparse
            if how.form in (BITMASK, COLUMNS) and int(torch.count_nonzero(S)) != how.values:
                # A cast to a shorter dtype can round a value to zero.
                self.shape = replace(self.shape, sparse=layout(S))
            found["weight"], found["support"] = pack(S, self.shape.sparse)
        names = (f"{part}{end}" for part in ("U", "V") for end in ("", SCALES))
        found |= {name: getattr(self, name) for name in (*names, "signs", "bias")}
        found |= {part: getattr(self, kept) for part, kept in _STORED.items() if getattr(self, kept) is not None}
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
        bits = "" if self.shape.storage.plain else f", bits={self.shape.storage}"
        return f"{self.in_features}, {self.out_features}, S={how.form}, rank={self.shape.rank}{bits}, compute={path}"


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
