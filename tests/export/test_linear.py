"""The packed layer computes the decomposition in every way, and keeps what is stored exactly."""

from __future__ import annotations

import pytest
import torch

from globalopt.errors import ArtefactError, UnknownNameError, UsageError
from globalopt.export import fastest as fastest_module
from globalopt.export import linear
from globalopt.export.fastest import fastest
from globalopt.export.linear import COMPUTES, SparseLowRankLinear
from globalopt.export.quantizer import dense_layer
from globalopt.export.shape import Shape
from globalopt.values.decomposition import Decomposition
from globalopt.values.layer import NM
from tests.export.runs import ALL, decomposed

HOWS = (*ALL, "signs")


def value_of(how: str, d_out: int = 24, d_in: int = 32) -> Decomposition:
    W = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(1))
    return decomposed(W, how)


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 32, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("compute", ["auto", "split", "merged", "unpack"])
@pytest.mark.parametrize("how", HOWS)
def test_every_way_computes_the_decomposition(how, compute):
    value, bias, x = value_of(how), torch.randn(24), inputs(2, 5)
    layer = SparseLowRankLinear.of(value, bias, pattern=NM(2, 4) if how == "2:4" else None)
    stored = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.use(compute)
    expected = x @ value.dense().mT + bias
    for _ in range(2):
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(layer.value().dense(), value.dense())
    after = layer.state_dict()
    assert after.keys() == stored.keys()
    assert all(torch.equal(after[name], stored[name]) for name in stored)


@pytest.mark.parametrize("how", HOWS)
def test_ways_can_be_changed_and_changed_back(how):
    value, x = value_of(how), inputs(3)
    layer = SparseLowRankLinear.of(value, None)
    for compute in ("split", "merged", "unpack", "split", "auto"):
        layer.use(compute)
        torch.testing.assert_close(layer(x), x @ value.dense().mT, rtol=1e-4, atol=1e-4)
        assert torch.equal(layer.value().dense(), value.dense())


@pytest.mark.parametrize("compute", ["split", "merged", "unpack"])
def test_a_cast_after_loading_casts_what_is_stored(compute):
    value, x = value_of("both"), inputs(3)
    layer = SparseLowRankLinear.of(value, None)
    layer.use(compute)
    layer(x)
    layer.bfloat16()
    expected = x.bfloat16() @ value.dense().bfloat16().mT
    torch.testing.assert_close(layer(x.bfloat16()), expected, rtol=5e-2, atol=2e-1)
    assert layer.state_dict()["weight"].dtype == torch.bfloat16
    assert torch.equal(layer.value().S, value.S.bfloat16())


@pytest.mark.parametrize("compute", ["auto", "split", "merged", "unpack"])
def test_a_first_call_in_inference_mode_leaves_an_ordinary_layer(compute):
    layer = SparseLowRankLinear.of(value_of("both"), torch.zeros(24))
    layer.use(compute)
    with torch.inference_mode():
        layer(inputs(1))
    x = inputs(2).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    layer.bfloat16()
    layer.use("split")
    layer(inputs(1).bfloat16())


def test_a_cast_that_makes_values_zero_is_stored_as_what_is_left():
    value = value_of("sparse")
    value.S[value.S != 0] *= 1e-3
    S = value.S.clone()
    S[0, S[0] != 0] = 1e-20
    layer = SparseLowRankLinear.of(Decomposition(S, value.U, value.V), None)
    layer.use("split")
    layer(inputs(1))
    layer.half()
    stored = layer.state_dict()
    assert stored["weight"].shape == (layer.shape.sparse.values,)
    assert layer.shape.sparse.values == int(torch.count_nonzero(S.half()))


def test_what_is_held_is_what_the_way_says():
    layer = SparseLowRankLinear.of(value_of("both"), None)

    def held() -> set[str]:
        return {name for name, _ in (*layer.named_parameters(), *layer.named_buffers())}

    assert held() == {"weight", "support", "U", "V"}
    layer.use("split")
    layer(inputs(1))
    assert held() == {"weight", "U", "V"}
    layer.use("merged")
    layer(inputs(1))
    assert held() == {"weight", "support", "values", "U", "V"}
    layer.use("unpack")
    layer(inputs(1))
    assert (held(), layer.weight.ndim) == ({"weight", "support", "U", "V"}, 1)


def test_one_size_is_measured_once(monkeypatch):
    asked = []

    def counted(paths, d_in, like):
        asked.append(tuple(paths))
        return "split"

    monkeypatch.setattr(linear, "_MEASURED", {})
    monkeypatch.setattr(linear, "fastest", counted)
    for how in ("both", "both", "sparse", "factors", "signs", "zero"):
        SparseLowRankLinear.of(value_of(how), None)(inputs(1))
    # Without rank there is nothing to merge, with signs nothing to split.
    assert asked == [("split", "merged"), ("split", "merged")]


def test_the_fastest_is_the_fastest_and_a_draw_goes_to_the_first(monkeypatch):
    def took(seconds: float):
        return lambda x: torch.full((), seconds)

    # A clock of our own: this machine's is shared.
    monkeypatch.setattr(fastest_module, "_seconds", lambda path, x: float(path(x)))
    like = torch.zeros(1)
    assert fastest({"slow": took(3.0), "quick": took(1.0)}, 64, like) == "quick"
    assert fastest({"quick": took(1.0), "slow": took(3.0)}, 64, like) == "quick"
    assert fastest({"frugal": took(1.0), "hardly faster": took(0.95)}, 64, like) == "frugal"
    assert fastest({"frugal": took(1.0), "a tenth faster": took(0.89)}, 64, like) == "a tenth faster"


def test_measuring_calls_every_path_with_one_token_and_with_many():
    seen = []
    fastest({"one": lambda x: seen.append(tuple(x.shape)) or x, "other": lambda x: x}, 8, torch.zeros(1))
    assert set(seen) == {(1, 8), (64, 8)}


def test_unknown_and_impossible_ways_are_refused():
    layer = SparseLowRankLinear.of(value_of("2:4"), None, pattern=NM(2, 4))
    with pytest.raises(UnknownNameError, match="did you mean 'split'"):
        layer.use("spilt")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="two-four is not available"):
            layer.use("two-four")
    assert set(COMPUTES) == {"auto", "split", "merged", "two-four", "unpack"}


@pytest.mark.gpu
@pytest.mark.parametrize("compute", ["two-four", "auto"])
def test_two_four_on_an_accelerator(compute):
    value = value_of("2:4", 64, 128)
    value = Decomposition(value.S.half().cuda(), value.U.half().cuda(), value.V.half().cuda())
    layer = SparseLowRankLinear.of(value, None, pattern=NM(2, 4))
    layer.use(compute)
    x = torch.randn(3, 5, 128, dtype=torch.float16, device="cuda")
    torch.testing.assert_close(layer(x), x @ value.dense().half().mT, rtol=2e-2, atol=2e-1)
    assert torch.equal(layer.value().S, value.S)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_dense_layer_is_the_one_it_stands_for(transposed):
    value, bias, x = value_of("both"), torch.randn(24), inputs(2, 3)
    layer = SparseLowRankLinear.of(value, bias, transposed)
    dense = dense_layer(layer)
    assert type(dense).__name__ == ("Conv1D" if transposed else "Linear")
    torch.testing.assert_close(dense(x), x @ value.dense().mT + bias, rtol=1e-4, atol=1e-4)


GOOD = {"d_out": 4, "d_in": 8, "form": "bitmask", "values": 3, "rank": 2, "signs": False}


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 5},
        {"rank": -1},
        {"rank": "2"},
        {"rank": True},
        {"signs": 1},
        {"signs": True, "rank": 0},
        {"d_out": None},
    ],
)
def test_shapes_that_are_none_are_refused(wrong):
    assert Shape.parse(GOOD).record() == GOOD
    with pytest.raises(ArtefactError):
        Shape.parse({**GOOD, **wrong})


@pytest.mark.parametrize("record", [None, 3, "x", [], {}, {k: v for k, v in GOOD.items() if k != "rank"}])
def test_records_that_are_none_are_refused(record):
    with pytest.raises(ArtefactError):
        Shape.parse(record)
