"""Layers in few bits take the bytes that a budget counts, compute what they say, and lie about nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from globalopt.errors import ArtefactError
from globalopt.export.codes import decode, encode, grid_codes
from globalopt.export.linear import SparseLowRankLinear
from globalopt.export.quantizer import dense_layer
from globalopt.export.shape import Shape, shape_of
from globalopt.kernels.grid import fit_scales, snap, spread
from globalopt.values.budget import Target
from globalopt.values.decomposition import Decomposition
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.storage import BITS, GROUP, Storage
from tests.export.runs import decomposed, in_few_bits

FEW = tuple(bits for bits in BITS if bits < 16)
STORAGES = tuple(map(Storage.parse, ("16", "8", "6/16", "5/3", "4/8", "3/4", "16/6")))
PATTERNS = {"2:4": NM(2, 4), "1:4": NM(1, 4), "2:8": NM(2, 8)}


def weight(d_out: int, d_in: int) -> Tensor:
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(d_out))


def of(how: str, storage: Storage, d_out: int = 24, d_in: int = 32) -> tuple[Decomposition, NM | None]:
    """A decomposition in few bits, and its pattern."""
    W, pattern = weight(d_out, d_in), PATTERNS.get(how)
    if pattern is None:
        return in_few_bits(decomposed(W, how), W, storage), None
    value = decomposed(W, "both")
    groups = (W - value.U @ value.V).reshape(-1, pattern.of)
    mask = torch.zeros_like(groups).scatter_(1, groups.abs().topk(pattern.keep, dim=1).indices, 1.0)
    mask[0] = 0  # a group with fewer nonzeros, which is filled up
    S = (groups * mask).reshape(d_out, d_in)
    return in_few_bits(Decomposition(S, value.U, value.V), W, storage, pattern), pattern


def held(layer: nn.Module) -> int:
    """Bytes of everything that a layer holds."""
    return sum(x.numel() * x.element_size() for x in (*layer.parameters(), *layer.buffers()))


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("how", ["both", "sparse", "factors", "few", "full", "dense", "zero", *PATTERNS])
@pytest.mark.parametrize("size", [(7, 13), (33, 64)])
def test_bytes_promised_are_the_bytes_of_the_tensors(size, how, storage):
    if how in PATTERNS and size[1] % 8:
        return
    value, pattern = of(how, storage, *size)
    value = value.cast(torch.bfloat16)
    shape = shape_of(value, pattern)
    layer = SparseLowRankLinear.of(value, None, pattern=pattern)
    layer.drop_zero()
    spec = LayerSpec("layer", 0, "layer", "layer", *size)
    nnz = value.nnz if pattern is None else pattern.nnz(spec)
    promised = Target(value.rank, nnz, pattern, storage=storage).check(spec).bytes(spec)
    saved = layer.state_dict()
    assert sum(x.numel() * x.element_size() for x in saved.values()) == promised == held(layer)
    assert layer.shape.bytes(2) == promised
    assert shape.bytes(2) == promised + (2 if how in ("zero", "factors") and storage.values == 16 else 0)
    assert {name: tuple(x.shape) for name, x in saved.items()} == layer.shape.tensors()
    assert saved["weight"].ndim == 1


def test_where_another_index_is_smaller_than_the_one_that_is_counted_it_is_stored():
    spec, wide = LayerSpec("layer", 0, "layer", "layer", 24, 32), NM(4, 8)
    groups = weight(24, 32).reshape(-1, 8)
    S = (groups * torch.zeros_like(groups).scatter_(1, groups.abs().topk(4, dim=1).indices, 1.0)).reshape(24, 32)
    value = in_few_bits(Decomposition(S, S[:, :0], S[:0]), weight(24, 32), Storage(8, 8), wide)
    promised = Target(0, wide.nnz(spec), wide, storage=Storage(8, 8)).bytes(spec)
    assert promised - shape_of(value, wide).bytes(2) == 24 * 32 * 4 // 8 // 8  # 12 bits of positions a group, or 8
    full = weight(24, 32).bfloat16()
    full[0, :10] = 0
    # In 16 bits with its zeros, which is counted too.
    assert shape_of(Decomposition(full, full[:, :0], full[:0])).bytes(2) == Target(0, full.numel() - 10).bytes(spec)


@pytest.mark.parametrize("compute", ["auto", "split", "merged", "unpack"])
@pytest.mark.parametrize("storage", [Storage(4, 8), Storage(16, 5), Storage(3, 16)], ids=str)
@pytest.mark.parametrize("how", ["both", "sparse", "factors", "few", "full", "2:4"])
def test_every_way_computes_the_numbers_of_the_codes_and_keeps_them(how, storage, compute):
    value, pattern = of(how, storage)
    layer = SparseLowRankLinear.of(value, torch.ones(24), pattern=pattern)
    layer.use(compute)
    saved = {name: x.clone() for name, x in layer.state_dict().items()}
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        layer.to(dtype)
        expected = x.to(dtype).float() @ value.dense().mT + 1
        torch.testing.assert_close(layer(x.to(dtype)).float(), expected, rtol=0.05, atol=0.1)
        assert layer.dtype == dtype == dense_layer(layer).weight.dtype
        for name, stored in layer.state_dict().items():
            if not stored.is_floating_point():
                assert torch.equal(stored, saved[name])
    layer.use(compute)
    # Codes have lost nothing by the casts; numbers in 16 bits have.
    parts = {"S": storage.values, "U": storage.factors, "V": storage.factors}
    for part, bits in parts.items():
        found, exact = getattr(layer.value(), part), getattr(value, part)
        assert torch.equal(found, exact if bits < 16 else exact.bfloat16().float())


def test_a_fresh_layer_computes_exactly_and_holds_codes_until_it_is_called():
    value, _ = of("both", Storage(4, 4), 64, 96)
    layer, x = SparseLowRankLinear.of(value, None), torch.randn(5, 96)
    packed = held(layer)
    assert packed == layer.shape.bytes(4) < value.S.numel()  # less than a byte a weight
    layer.use("unpack")
    torch.testing.assert_close(layer(x), x @ value.dense().mT, rtol=1e-4, atol=1e-4)
    assert held(layer) == packed
    for compute in ("split", "merged"):
        layer.use(compute)
        torch.testing.assert_close(layer(x), x @ value.dense().mT, rtol=1e-4, atol=1e-4)
        assert held(layer) > packed + 4 * value.S.numel() - 1
    layer.use("auto")
    assert held(layer) == packed
    assert "bits=4, compute=auto" in repr(layer)


def test_a_state_dict_makes_the_same_layer():
    value, _ = of("both", Storage(5, 8))
    layer = SparseLowRankLinear.of(value, torch.ones(24))
    layer.use("split")
    layer(torch.ones(1, 32))
    other = SparseLowRankLinear(layer.shape, bias=True)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.value().dense(), value.dense())
    assert all(torch.equal(x, other.state_dict()[name]) for name, x in layer.state_dict().items())


@pytest.mark.parametrize("bits", FEW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_come_back_from_their_codes(bits, dtype):
    numbers = torch.randn(200, generator=torch.Generator().manual_seed(bits))
    numbers[:GROUP] *= 1e-7  # which float16 hardly holds
    scales = fit_scales(numbers, bits, GROUP)
    exact = snap(numbers, spread(scales, GROUP, 200), bits)
    found = decode(*encode(exact.to(dtype), scales, bits), bits, 200, torch.float32)
    if dtype == torch.float16:
        torch.testing.assert_close(found[GROUP:], exact[GROUP:])
    else:
        assert torch.equal(found, exact)


def test_numbers_beside_the_grid_are_not_stored_as_others():
    scales = torch.tensor([1.0])
    for wrong in (torch.tensor([0.5, 0.75]), torch.tensor([0.0]), torch.tensor([9.5])):
        with pytest.raises(ArtefactError, match="not on the grid of 4 bits"):
            grid_codes(wrong, scales, 4)
    with pytest.raises(ArtefactError, match="65 numbers of a layer have 1 scales"):
        grid_codes(torch.full((65,), 0.5), scales, 4)
    value, _ = of("both", Storage(4, 4))
    with pytest.raises(ArtefactError, match="not on the grid"):
        SparseLowRankLinear.of(replace(value, U=value.U * 1.01), None)


def test_a_pattern_whose_groups_are_not_full_is_stored_by_its_nonzeros():
    value, pattern = of("2:4", Storage(8, 8))
    S = value.S * (torch.arange(value.S.numel()).view_as(value.S) >= 64)  # the first groups are empty
    assert shape_of(replace(value, S=S), pattern).sparse.form == "bitmask"


@pytest.mark.parametrize("scale", [float("inf"), float("-inf"), float("nan")])
def test_scales_that_are_none_are_refused(scale):
    packed, scales = encode(torch.full((70,), 0.5), torch.ones(2), 5)
    scales[1] = torch.tensor(scale, dtype=torch.bfloat16).view(torch.int16)
    with pytest.raises(ArtefactError, match="not finite"):
        decode(packed, scales, 5, 70, torch.float32)


def test_codes_that_are_more_or_fewer_are_refused():
    packed, scales = encode(torch.full((70,), 0.5), torch.ones(2), 5)
    for codes, n in ((packed[:-1], 70), (packed, 60), (packed, 80)):
        with pytest.raises(ArtefactError):
            decode(codes, scales, 5, n, torch.float32)
    with pytest.raises(ArtefactError, match="expected one per 64"):
        decode(packed, scales[:1], 5, 70, torch.float32)
    packed[-1] |= 128
    with pytest.raises(ArtefactError, match="after the last"):
        decode(packed, scales, 5, 70, torch.float32)


GOOD = {"d_out": 4, "d_in": 8, "form": "bitmask", "values": 3, "rank": 2, "signs": False, "storage": "4/8"}


@pytest.mark.parametrize(
    "wrong",
    [
        *({"storage": x} for x in ("7", "4/", "/8", "2", "-4", "four", "", None, 4, 4.0, ["4"], "9" * 5000, "4/8/3")),
        {"signs": True},
        {"form": "empty", "values": 1},
    ],
)
def test_shapes_in_bits_that_are_none_are_refused(wrong):
    assert Shape.parse(GOOD).record() == GOOD
    with pytest.raises(ArtefactError) as caught:
        Shape.parse({**GOOD, **wrong})
    assert len(str(caught.value)) < 300
