from __future__ import annotations

import pytest
import torch

from globalopt.errors import UnknownNameError
from globalopt.kernels.top_kl import Teacher
from globalopt.matching.model import Distillation, match_model, teacher_distributions
from globalopt.models.batch import Batch
from globalopt.models.finding import find_layers
from globalopt.values.decomposition import Decomposition
from tests.tiny_models import tiny_ids, tiny_model

OPTIONS = Distillation(epochs=5, rate=0.03)


def compressed(kind: str = "llama", keep: float = 0.4):
    """A model with a part of every layer's entries, its decompositions, batches, and what the dense model says."""
    layers = find_layers(tiny_model(kind))
    batches = [Batch(tiny_ids(4, 12, seed=seed)) for seed in range(4)]
    dense = teacher_distributions(layers.model, batches)
    values = {}
    for spec in layers.specs:
        W = layers.weight(spec.name)
        S = torch.where(W.abs() >= W.abs().flatten().quantile(1 - keep), W, 0.0)
        values[spec.name] = Decomposition(S, S.new_zeros(len(S), 0), S.new_zeros(0, S.shape[1]))
        layers.set_weight(spec.name, S)
    return layers, batches, dense, values


@torch.no_grad()
def kl(layers, batches, dense) -> float:
    return float(
        torch.stack(
            [
                d.kl(layers.model(b.input_ids, use_cache=False).logits[:, :-1]).mean()
                for b, d in zip(batches, dense, strict=True)
            ]
        ).mean()
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_the_loss_is_the_kl_to_the_dense_model_and_falls(kind):
    layers, batches, dense, values = compressed(kind)
    before = kl(layers, batches[-1:], dense[-1:])
    trainable, found = match_model(layers, batches, dense, values, OPTIONS, seed=0)
    # Of four batches the last is held out.
    assert found.before == pytest.approx(before, rel=1e-4)
    assert found.after < 0.95 * before
    for name, value in trainable.values().items():
        assert torch.equal(value.S != 0, values[name].S != 0)
        # The model itself is not changed.
        assert torch.equal(layers.weight(name), values[name].dense())
        layers.set_weight(name, value.dense())
    for name, norm in trainable.norm_values().items():
        layers.set_parameter(name, norm)
    assert kl(layers, batches[-1:], dense[-1:]) == pytest.approx(found.after, rel=1e-3)


def test_the_last_norm_is_trained_too():
    layers, batches, dense, values = compressed()
    trainable, _ = match_model(layers, batches, dense, values, OPTIONS, seed=0)
    assert "model.norm.weight" in trainable.norm_values()
    assert not torch.equal(
        trainable.norm_values()["model.norm.weight"], layers.model.get_parameter("model.norm.weight")
    )


def test_the_dense_model_has_nothing_to_learn():
    layers = find_layers(tiny_model("llama"))
    batches = [Batch(tiny_ids(2, 8, seed=seed)) for seed in range(2)]
    dense = teacher_distributions(layers.model, batches)
    assert isinstance(dense[0], Teacher)
    values = {}
    for spec in layers.specs:
        W = layers.weight(spec.name)
        values[spec.name] = Decomposition(W, W.new_zeros(len(W), 0), W.new_zeros(0, W.shape[1]))
    _, found = match_model(layers, batches, dense, values, OPTIONS, seed=0)
    assert found.before == pytest.approx(0, abs=1e-6)
    assert found.after <= found.before


def test_options():
    assert Distillation.read({"epochs": "2"}).epochs == 2
    with pytest.raises(UnknownNameError, match="option of model matching"):
        Distillation.read({"loss": "nats"})
