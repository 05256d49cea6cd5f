"""Weights of layers are read and replaced as (d_out, d_in), and what would not fit or is not finite is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from globalopt.errors import NumericalError, UnknownNameError, UsageError
from globalopt.models.finding import find_layers
from globalopt.models.layers import check_finite
from tests.tiny_models import tiny_model


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_weights_are_read_and_written_as_out_by_in(kind: str) -> None:
    model = tiny_model(kind)
    layers = find_layers(model)
    for spec in layers.specs:
        module = layers.module(spec.name)
        x = torch.randn(5, spec.d_in)
        bias = module.bias if module.bias is not None else 0
        W = layers.weight(spec.name)
        assert (W.shape, W.dtype) == ((spec.d_out, spec.d_in), torch.float32)
        torch.testing.assert_close(module(x) - bias, x @ W.mT, atol=1e-5, rtol=1e-5)
        parameter = module.weight
        layers.set_weight(spec.name, W * 2)
        assert module.weight is parameter
        torch.testing.assert_close(module(x) - bias, 2 * x @ W.mT, atol=1e-5, rtol=1e-5)


def test_reading_a_weight_copies_it() -> None:
    layers = find_layers(tiny_model("llama"))
    name = layers.specs[0].name
    before = layers.weight(name)
    layers.weight(name).zero_()
    assert torch.equal(layers.weight(name), before)


def test_writing_casts_to_the_type_of_the_parameter() -> None:
    model: nn.Module = tiny_model("llama")
    layers = find_layers(model.to(torch.bfloat16))  # pyright: ignore[reportArgumentType]
    spec = layers.specs[0]
    W = torch.randn(spec.d_out, spec.d_in)
    layers.set_weight(spec.name, W)
    assert layers.module(spec.name).weight.dtype == torch.bfloat16
    assert torch.equal(layers.weight(spec.name), W.bfloat16().float())


def test_wrong_writes_are_refused_and_change_nothing() -> None:
    layers = find_layers(tiny_model("llama"))
    spec = layers.specs[0]
    before = layers.weight(spec.name)
    with pytest.raises(UsageError, match="q_proj"):
        layers.set_weight(spec.name, torch.zeros(1, spec.d_in))
    with pytest.raises(NumericalError, match="q_proj"):
        layers.set_weight(spec.name, torch.full((spec.d_out, spec.d_in), float("nan")))
    assert torch.equal(layers.weight(spec.name), before)
    with pytest.raises(UnknownNameError, match=r"did you mean 'model\.layers\.0\.mlp\.up_proj'"):
        layers.module("model.layers.0.mlp.up_prj")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(value: float) -> None:
    layers = find_layers(tiny_model("llama"))
    check_finite(layers)
    layers.module("model.layers.1.mlp.down_proj").weight[3, 4] = value
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.down_proj: 1 of 1536"):
        check_finite(layers)
