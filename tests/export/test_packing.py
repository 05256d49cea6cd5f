"""Packing is exact, as small as it says, and refuses what it cannot have written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from globalopt.errors import ArtefactError
from globalopt.export.packing import Layout, layout, pack, unpack
from globalopt.values.layer import NM

SIZES: tuple[tuple[int, int], ...] = ((1, 1), (3, 5), (8, 16), (7, 64), (33, 12))


def sparse(d_out: int, d_in: int, density: float, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    S = torch.randn(d_out, d_in, generator=generator)
    return (S * (torch.rand(d_out, d_in, generator=generator) < density)).to(dtype)


def patterned(d_out: int, d_in: int, pattern: NM) -> Tensor:
    groups = sparse(d_out, d_in, 1.0).reshape(-1, pattern.of)
    mask = torch.zeros_like(groups).scatter_(1, groups.abs().topk(pattern.keep, dim=1).indices, 1.0)
    mask[::3, : pattern.of // 2] = 0  # groups that keep fewer than they may
    return (groups * mask).reshape(d_out, d_in)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("density", [0.0, 0.01, 0.3, 0.7, 1.0])
def test_every_form_gives_the_matrix_back(size, density, dtype):
    d_out, d_in = size
    S = sparse(d_out, d_in, density, dtype)
    nnz = int(torch.count_nonzero(S))
    forms = [layout(S), Layout(d_out, d_in, "full", S.numel())]
    forms += [Layout(d_out, d_in, form, nnz) for form in ("bitmask", "columns") if nnz]
    for how in forms:
        values, support = pack(S, how)
        assert values.dtype == dtype
        assert values.shape == (how.values,)
        assert (0 if support is None else len(support)) == how.support_bytes
        assert torch.equal(unpack(values, support, how), S)


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "1:2", "3:5", "2:16"])
def test_patterns_give_the_matrix_back_also_where_a_group_keeps_less(text):
    pattern = NM.parse(text)
    assert pattern is not None
    S = patterned(6, 80, pattern)
    how = Layout(6, 80, text, S.numel() // pattern.of * pattern.keep)
    assert torch.equal(unpack(*pack(S, how), how), S)


def test_two_four_takes_the_semi_structured_form_of_nine_sixteenths():
    S = patterned(16, 64, NM(2, 4)).bfloat16()
    how = layout(S, NM(2, 4))
    assert how.form == "2:4"
    assert how.bytes(2) == S.numel() * 2 * 9 // 16


def test_a_pattern_that_the_matrix_breaks_is_not_its_form():
    S = patterned(4, 8, NM(2, 4))
    S[0, :4] = 1
    assert layout(S, NM(2, 4)).form == "bitmask"


@pytest.mark.parametrize(
    ("density", "form"), [(0.0, "empty"), (0.02, "columns"), (0.5, "bitmask"), (0.99, "full"), (1.0, "full")]
)
def test_the_layout_is_the_smallest(density, form):
    S = sparse(64, 256, density, torch.bfloat16)
    assert layout(S).form == form


def test_negative_zero_and_extreme_values_are_values_like_others():
    S = torch.tensor([[0.0, 1e-40, 3e38, 0.0], [-1e-45, 0.0, 0.0, 0.0]])
    how = layout(S)
    assert torch.equal(unpack(*pack(S, how), how), S)


@pytest.mark.parametrize(
    "wrong",
    [
        (3, 4, "bitmask", 13),
        (3, 4, "bitmask", 0),
        (3, 4, "bitmask", True),
        (3, 4, "bitmask", 2.0),
        (0, 4, "bitmask", 1),
        (-3, -4, "full", 12),
        (3, 4, "full", 11),
        (3, 4, "empty", 2),
        (3, 4, "2:4", 5),
        (3, 6, "2:4", 9),
        (3, 4, "4:2", 6),
        (3, 4, "csr", 6),
        (3, 4, "unstructured", 6),
        (3, 4, None, 6),
        (3, 4, ["2:4"], 6),
        (3, 4, "1:" + "9" * 5000, 1),
        (2, 2**17, "columns", 5),
        (2**70, 2**70, "full", 2**140),
    ],
)
def test_layouts_that_are_none_are_refused(wrong):
    with pytest.raises(ArtefactError):
        _ = Layout(*wrong).support_bytes


def test_broken_supports_are_refused():
    S = sparse(4, 10, 0.5)
    nnz = int(torch.count_nonzero(S))
    for form in ("bitmask", "columns"):
        how = Layout(4, 10, form, nnz)
        values, support = pack(S, how)
        assert support is not None
        for place in range(len(support)):
            for bit in range(8):
                broken = support.clone()
                broken[place] ^= 1 << bit
                try:
                    found = unpack(values, broken, how)
                except ArtefactError:
                    continue
                # What is still a support of as many values is another matrix, for the digest to find.
                assert not torch.equal(found, S)
        for support_too in (support[:-1], torch.cat([support, support[:1]]), None):
            with pytest.raises(ArtefactError, match="expected"):
                unpack(values, support_too, how)
        with pytest.raises(ArtefactError, match="expected"):
            unpack(values[:-1], support, how)


def test_positions_out_of_order_or_range_are_refused():
    how = Layout(1, 4, "2:4", 2)
    values = torch.tensor([1.0, 2.0])
    for first, second in ((1, 1), (2, 1)):
        with pytest.raises(ArtefactError, match="out of order"):
            unpack(values, torch.tensor([first | second << 2], dtype=torch.uint8), how)
    how = Layout(1, 3, "1:3", 1)
    with pytest.raises(ArtefactError, match="out of range"):
        unpack(values[:1], torch.tensor([3], dtype=torch.uint8), how)
