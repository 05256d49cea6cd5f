"""Layers of a block that its output does not depend on through their own products are found, and nothing is changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from globalopt.errors import UnsupportedModelError
from globalopt.models.coverage import UNREACHED
from globalopt.models.finding import find_layers
from globalopt.models.loading import load_model
from tests.linear_experts import linear_experts
from tests.tiny_models import save_tiny, tiny_ids, tiny_model


class Gate(nn.Module):
    """`up` is used as usual; how `other` is used is told by a function of it, the input and what `up` gave."""

    def __init__(self, use: Any) -> None:
        super().__init__()
        self.up, self.other = nn.Linear(32, 32), nn.Linear(32, 32)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.other, x, self.up(x))


class NoAttention(nn.Module):
    def forward(self, hidden_states: Tensor, **rest: Any) -> tuple[Tensor, None]:
        return hidden_states, None


def _no_grad(layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        scores = layer(x).softmax(-1)
    return y * scores


def _inference(layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return y * layer(x.detach()).detach()


def _indices(layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return y.gather(-1, layer(x).argsort(-1))


def _threshold(layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return y.masked_fill(layer(x) > 0, 0.0)


def _by_weight(layer: Any, x: Tensor, y: Tensor) -> Tensor:
    return y + x @ layer.weight.mT


def _dropped(layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    layer(x)
    return y


def _used(layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return y * layer(x)


def _half_used(layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return _no_grad(layer, x, y) + layer(x)


def _in_place(layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return x.mul_(2).add_(layer(y))


def _not_at_all(layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return y


def _model(use: Any) -> Any:
    model: Any = tiny_model("llama")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for block in model.model.layers:
            block.mlp = Gate(use)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("use", [_no_grad, _inference, _indices, _threshold, _by_weight, _dropped])
def test_a_layer_that_the_loss_does_not_reach_stays_out(use: Any) -> None:
    layers = find_layers(_model(use))
    assert layers.apart == ("model.layers.0.mlp.other", "model.layers.1.mlp.other")
    assert "model.layers.0.mlp.up" in {spec.name for spec in layers.specs}
    assert layers.coverage.skipped[UNREACHED] == 2 * 32 * 32


@pytest.mark.parametrize("use", [_used, _half_used, _in_place, _not_at_all])
def test_a_layer_that_the_loss_may_reach_stays_in(use: Any) -> None:
    model = _model(use)
    layers = find_layers(model)
    assert layers.apart == ()
    assert len(layers.specs) == 2 * (4 + 2)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert not torch.is_grad_enabled() or model(tiny_ids(1, 4)).logits.grad_fn is None
    # Hooks and gradient mode are gone.
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("called", ["chosen", "empty", "all"])
def test_experts_without_tokens_stay_in(called: str) -> None:
    layers = find_layers(linear_experts(called, never=2))
    assert layers.apart == ()
    assert sum(".experts.2." in spec.name for spec in layers.specs) == 6


def test_a_block_that_raises_leaves_the_gradient_mode_as_it_was() -> None:
    model = _model(lambda layer, x, y: layer(y[..., :3]))
    with pytest.raises(UnsupportedModelError, match="cannot compute a text"), torch.no_grad():
        find_layers(model)
    assert torch.is_grad_enabled()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_models_that_are_read_block_by_block_are_looked_at_likewise(tmp_path: Any) -> None:
    loaded = load_model(save_tiny(tmp_path), device="cpu", lazily=True)
    layers = find_layers(loaded.model)
    assert (layers.apart, len(layers.specs)) == ((), 14)
    assert layers.lazy is not None
    assert layers.lazy.opened == ()
    assert layers.lazy.loads == 2


def test_all_layers_out_of_reach_are_refused_in_one_line() -> None:
    model = _model(_no_grad)
    for block in model.model.layers:
        block.self_attn = NoAttention()
        block.mlp.use = lambda layer, x, y: x * y.detach() * layer(x).detach()
    with pytest.raises(UnsupportedModelError, match=r"Only .*% of the .* the loss does not reach \(\d") as caught:
        find_layers(model)
    assert "\n" not in str(caught.value)
