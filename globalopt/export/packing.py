"""Pack sparse matrices without loss: the values in row-major order, and their positions (the support).

form        values                      support (uint8)
empty       none, or one zero           none
full        all d_out d_in              none
bitmask     the nonzeros                one bit per weight
columns     the nonzeros                a 16-bit column per value, then d_out + 1 row starts of 32 bits
KEEP:OF     KEEP of every OF weights    ceil(log2 OF) bits per value: its position in its group

Bits fill a byte from the lowest up; numbers of several bytes are little endian. A group of a pattern that has fewer
nonzeros than the pattern allows is padded with zeros, so that all rows have equally many values, as in the layout of
semi-structured kernels. Values that are stored as codes (`codes`) cannot be zero: they are exactly the nonzeros, in
every form.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from globalopt.errors import ArtefactError
from globalopt.values.bits import pack_bits, pack_numbers, unpack_numbers
from globalopt.values.decomposition import follows
from globalopt.values.layer import NM

EMPTY, FULL, BITMASK, COLUMNS = "empty", "full", "bitmask", "columns"
_MOST_COLUMNS = 2**16
_LARGEST_GROUP = 256


@dataclass(frozen=True)
class Layout:
    """Describe how a matrix (d_out, d_in) is packed: the `form`, and the number of stored `values`.

    Raises:
        ArtefactError: the numbers do not fit together, as in a broken checkpoint.

    >>> Layout(d_out=8, d_in=16, form="2:4", values=64).support_bytes
    16
    >>> Layout(d_out=8, d_in=16, form="bitmask", values=10).bytes(per_value=2)
    36
    """

    d_out: int
    d_in: int
    form: str
    values: int

    def __post_init__(self) -> None:
        if not (_whole(self.d_out, 1) and _whole(self.d_in, 1) and _whole(self.values, 0 if self.form == EMPTY else 1)):
            raise ArtefactError(f"A packed matrix of {self.d_out} x {self.d_in} with {self.values} values is none.")
        pattern = self.pattern
        if self.form == EMPTY:
            right = self.values <= 1
        elif self.form == FULL:
            right = self.values == self.numel
        elif pattern is not None:
            right = self.d_in % pattern.of == 0 and self.values == self.numel // pattern.of * pattern.keep
        else:
            right = self.values <= self.numel and (self.form != COLUMNS or self.d_in <= _MOST_COLUMNS)
        if not right:
            raise ArtefactError(
                f"{self.values} values in form {self.form} are no matrix of {self.d_out} x {self.d_in}."
            )

    @property
    def numel(self) -> int:
        """Number of entries of the matrix."""
        return self.d_out * self.d_in

    @property
    def pattern(self) -> NM | None:
        """The N:M pattern that the form names; None for the other forms."""
        if self.form in (EMPTY, FULL, BITMASK, COLUMNS):
            return None
        try:
            pattern = NM.parse(self.form) if isinstance(self.form, str) else None
        except (ValueError, LookupError):
            pattern = None
        if pattern is None or pattern.of > _LARGEST_GROUP:
            raise ArtefactError(f"There is no form {self.form!r} of a packed matrix. Upgrade globalopt.")
        return pattern

    @property
    def support_bytes(self) -> int:
        """Length of the support in bytes."""
        if self.form in (EMPTY, FULL):
            return 0
        if self.form == BITMASK:
            return math.ceil(self.numel / 8)
        if self.form == COLUMNS:
            return 2 * self.values + 4 * (self.d_out + 1)
        assert self.pattern is not None
        return math.ceil(self.values * _position_bits(self.pattern) / 8)

    def bytes(self, per_value: int) -> int:
        """Count the bytes of the values, `per_value` each, and of the support."""
        return per_value * self.values + self.support_bytes


def layout(S: Tensor, pattern: NM | None = None, coded: bool = False) -> Layout:
    """Choose the smallest layout of `S` (d_out, d_in); that of `pattern` where it takes at most one bit per weight.

    Args:
        coded: whether the values become codes, which hold no zeros: there are as many as nonzeros.

    >>> S = torch.tensor([[1.0, 0.0, 0.0, 2.0], [0.0, 3.0, 4.0, 0.0]])
    >>> layout(S).form, layout(S, NM(2, 4)).form
    ('bitmask', '2:4')
    """
    d_out, d_in = S.shape
    nnz = int(torch.count_nonzero(S))
    if nnz == 0:
        return Layout(d_out, d_in, EMPTY, 0 if coded else 1)
    if pattern is not None and pattern.keep * _position_bits(pattern) <= pattern.of and follows(S, pattern):
        places = S.numel() // pattern.of * pattern.keep
        if not coded or nnz == places:
            return Layout(d_out, d_in, str(pattern), places)
    choices = [Layout(d_out, d_in, BITMASK, nnz)]
    if nnz == S.numel() or not coded:
        choices.insert(0, Layout(d_out, d_in, FULL, S.numel()))
    if d_in <= _MOST_COLUMNS:
        choices.append(Layout(d_out, d_in, COLUMNS, nnz))
    # Codes take the same bytes in every form, so that their forms differ by the support alone.
    return min(choices, key=lambda choice: choice.bytes(S.element_size()))


def pack(S: Tensor, how: Layout) -> tuple[Tensor, Tensor | None]:
    """Pack `S` (d_out, d_in) into its values (how.values,) and support (how.support_bytes,) uint8, or None.

    >>> S = torch.tensor([[1.0, 0.0, 0.0, 2.0], [0.0, 3.0, 4.0, 0.0]])
    >>> values, support = pack(S, layout(S))
    >>> values.tolist(), [f"{byte:08b}" for byte in support.tolist()]
    ([1.0, 2.0, 3.0, 4.0], ['01101001'])
    """
    if how.form == EMPTY:
        return S.new_zeros(how.values), None
    if how.form == FULL:
        return S.flatten(), None
    pattern = how.pattern
    if pattern is not None:
        groups = S.reshape(-1, pattern.of)
        # The nonzeros of a group come first, then its zeros, both in their order.
        order = torch.sort((groups == 0).to(torch.uint8), dim=1, stable=True).indices[:, : pattern.keep]
        positions = order.sort(dim=1).values
        return groups.gather(1, positions).flatten(), pack_numbers(positions.flatten(), _position_bits(pattern))
    nonzero = S != 0
    if how.form == BITMASK:
        return S[nonzero], pack_bits(nonzero.flatten())
    starts = torch.zeros(how.d_out + 1, dtype=torch.int64, device=S.device)
    starts[1:] = nonzero.sum(1).cumsum(0)
    columns = _bytes_of(nonzero.nonzero()[:, 1], 2)
    return S[nonzero], torch.cat([columns, _bytes_of(starts, 4)])


def unpack(values: Tensor, support: Tensor | None, how: Layout) -> Tensor:
    """Unpack the matrix (d_out, d_in) that was packed; `ArtefactError` where the support does not fit `how`.

    >>> S = torch.tensor([[1.0, 0.0, 0.0, 2.0], [0.0, 3.0, 4.0, 0.0]])
    >>> torch.equal(unpack(*pack(S, layout(S)), layout(S)), S)
    True
    """
    length = 0 if support is None else len(support)
    if values.shape != (how.values,) or length != how.support_bytes:
        raise ArtefactError(
            f"A packed matrix has {tuple(values.shape)} values and a support of {length} bytes; expected "
            f"({how.values},) and {how.support_bytes}."
        )
    if support is None:
        return values.reshape(how.d_out, how.d_in) if how.form == FULL else values.new_zeros(how.d_out, how.d_in)
    pattern = how.pattern
    if pattern is not None:
        positions = unpacked_numbers(support, _position_bits(pattern), how.values).long().view(-1, pattern.keep)
        if bool((positions >= pattern.of).any()) or bool((positions[:, 1:] <= positions[:, :-1]).any()):
            raise ArtefactError(f"The positions of a packed {pattern} matrix are out of range or out of order.")
        S = values.new_zeros(how.numel // pattern.of, pattern.of)
        return S.scatter_(1, positions, values.reshape(positions.shape)).reshape(how.d_out, how.d_in)
    if how.form == BITMASK:
        mask = unpacked_numbers(support, 1, how.numel).bool()
        if int(mask.sum()) != how.values:
            raise ArtefactError(f"A bitmask marks {int(mask.sum())} weights for {how.values} values.")
        return values.new_zeros(how.numel).masked_scatter_(mask, values).reshape(how.d_out, how.d_in)
    columns = _from_bytes(support[: 2 * how.values], 2)
    starts = _from_bytes(support[2 * how.values :], 4)
    lengths = starts.diff()
    if int(starts[0]) != 0 or int(starts[-1]) != how.values or bool((lengths < 0).any()):
        raise ArtefactError("The row starts of a packed matrix are out of order.")
    index = torch.arange(how.d_out, device=values.device).repeat_interleave(lengths) * how.d_in + columns
    if bool((columns >= how.d_in).any()) or bool((index.diff() <= 0).any()):
        raise ArtefactError("The columns of a packed matrix are out of range or out of order.")
    return values.new_zeros(how.numel).scatter_(0, index, values).reshape(how.d_out, how.d_in)


def _position_bits(pattern: NM) -> int:
    """Count the bits of a position in a group."""
    return math.ceil(math.log2(pattern.of))


def unpacked_numbers(packed: Tensor, width: int, n: int) -> Tensor:
    """Unpack `n` numbers of `width` bits of a checkpoint, (n,) uint8; `ArtefactError` where it does not hold them.

    >>> unpacked_numbers(torch.tensor([5], dtype=torch.uint8), width=1, n=3).tolist()
    [1, 0, 1]
    """
    try:
        return unpack_numbers(packed, width, n)
    except ValueError as cause:
        raise ArtefactError(f"A packed matrix is broken: {cause}") from None


def _bytes_of(numbers: Tensor, width: int) -> Tensor:
    """Convert numbers (n,) to (n width,) uint8, little endian."""
    places = 8 * torch.arange(width, device=numbers.device)
    return ((numbers[:, None] >> places) & 255).to(torch.uint8).flatten()


def _from_bytes(packed: Tensor, width: int) -> Tensor:
    """Convert (n width,) uint8, little endian, to numbers (n,)."""
    places = 8 * torch.arange(width, device=packed.device)
    return (packed.reshape(-1, width).long() << places).sum(1)


def _whole(value: object, least: int) -> bool:
    """Tell whether a value is an integer of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= sys.maxsize
