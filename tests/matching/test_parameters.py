from __future__ import annotations

import pytest
import torch

from globalopt.kernels.grid import codes, levels, spread
from globalopt.matching.parameters import Trainable, TrainableLayer, norm_parameters
from globalopt.models.finding import find_layers
from globalopt.refine.rounding import rounded
from globalopt.rounding.stored import stored
from globalopt.values.budget import Target
from globalopt.values.decomposition import Decomposition
from globalopt.values.metric import Gram, Metric
from globalopt.values.storage import GROUP, Storage
from tests.tiny_models import tiny_model

CPU = torch.device("cpu")


def decomposition(d_out=12, d_in=8, rank=3, seed=0, dtype=torch.float32, signs=False) -> Decomposition:
    generator = torch.Generator().manual_seed(seed)
    S = torch.randn(d_out, d_in, generator=generator)
    S[torch.rand(d_out, d_in, generator=generator) < 0.6] = 0
    U, V = torch.randn(d_out, rank, generator=generator) * 9, torch.randn(rank, d_in, generator=generator) / 7
    plane = torch.randn(d_out, d_in, generator=generator).sign() if signs else None
    return Decomposition(S.to(dtype), U.to(dtype), V.to(dtype), plane)


@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize("rank", [0, 1, 3, 8])
def test_the_weight_is_that_of_the_decomposition(rank, signs):
    value = decomposition(rank=rank, signs=signs)
    layer = TrainableLayer(value, CPU)
    torch.testing.assert_close(layer.weight().detach(), value.dense(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.value().dense(), value.dense(), rtol=1e-5, atol=1e-5)
    assert layer.value().rank == rank


def on_grids(storage: Storage, dtype=torch.float32, rank=3) -> Decomposition:
    """A decomposition whose numbers lie on grids, of more than one group in every part, with a group of zeros in V."""
    value = decomposition(24, 40, rank)
    value.V[0] = 0
    value.V[1, :24] = 0
    metric = Metric(Gram(torch.eye(40), 100))
    return rounded(stored(value, value.dense(), metric, storage), value.dense(), metric, dtype)


STORAGES = [Storage(4, 8), Storage(3, 3), Storage(16, 4), Storage(4, 16)]


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_on_grids_start_where_they_are_and_stay_on_grids(storage, dtype):
    value = on_grids(storage, dtype)
    layer = TrainableLayer(value, CPU)
    start = layer.value()
    # Balanced factors are rounded anew.
    atol = max(1e-3, torch.finfo(dtype).eps * float(value.dense().abs().max()))
    torch.testing.assert_close(start.dense(), value.dense(), rtol=1e-2, atol=atol)
    units = layer.units()
    adam = torch.optim.Adam([{"params": [p], "lr": 0.05 * u} for p, u in zip(layer.parameters(), units, strict=True)])
    wanted = torch.randn(24, 40, generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(30):
        adam.zero_grad()
        loss = (layer.weight() - wanted).square().sum()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    found = layer.value()
    assert torch.equal(found.S != 0, value.S != 0)
    assert (found.rank, found.storage, found.S.dtype) == (value.rank, storage, dtype)
    assert found.fits(Target(value.rank, value.nnz, storage=storage))
    # What is saved is what the loss was computed with, but for the dtype.
    torch.testing.assert_close(found.dense(), layer.weight().detach(), rtol=1e-2, atol=2e-2)
    assert found.scales is not None
    assert value.scales is not None
    parts = (found.S[found.S != 0], found.U.mT.flatten(), found.V.flatten())
    before = (value.scales.S, value.scales.U, value.scales.V)
    for part, scales, old in zip(parts, (found.scales.S, found.scales.U, found.scales.V), before, strict=True):
        assert (scales is None) == (old is None)
        if scales is not None and old is not None:
            bits = storage.values if part is parts[0] else storage.factors
            each = spread(scales, GROUP, len(part))
            exact = levels(codes(part.float(), each, bits), each, bits)
            assert torch.equal(scales, scales.bfloat16().float())
            assert torch.equal(scales > 0, old > 0)
            assert not torch.equal(scales, old)
            assert torch.equal(exact.to(part.dtype), part)


def test_the_gradient_of_a_scale_is_that_of_fixed_codes():
    value = on_grids(Storage(4, 4))
    layer = TrainableLayer(value, CPU)
    slope = torch.randn(24, 40, generator=torch.Generator().manual_seed(2))
    (layer.weight() * slope).sum().backward()
    assert layer.of_values is not None
    assert layer.of_V is not None
    products = (value.S * slope)[value.S != 0]
    expected = [float(part.sum()) for part in products.split(GROUP)]
    torch.testing.assert_close(layer.of_values.log_scales.grad, torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert layer.values.grad is not None
    torch.testing.assert_close(layer.values.grad, slope[value.S != 0])
    expected = [float(part.sum()) for part in (value.V * (value.U.mT @ slope)).flatten().split(GROUP)]
    torch.testing.assert_close(layer.of_V.log_scales.grad, torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_factors_are_balanced():
    layer = TrainableLayer(decomposition(), CPU)
    torch.testing.assert_close(layer.U.mT @ layer.U, layer.V @ layer.V.mT, rtol=1e-4, atol=1e-4)


def test_no_step_leaves_the_support():
    value = decomposition(dtype=torch.bfloat16)
    layer = TrainableLayer(value, CPU)
    adam = torch.optim.Adam(layer.parameters(), lr=0.3)
    wanted = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    for _ in range(20):
        adam.zero_grad()
        (layer.weight() - wanted).square().sum().backward()
        adam.step()
    trained = layer.value()
    assert torch.equal(trained.S != 0, value.S != 0)
    assert not torch.equal(trained.S, value.S)
    assert (trained.S.dtype, trained.U.dtype, trained.rank) == (torch.bfloat16, torch.bfloat16, 3)


def test_the_gradient_of_every_kept_number_is_that_of_the_dense_weight():
    layer = TrainableLayer(decomposition(), CPU)
    slope = torch.randn(12, 8, generator=torch.Generator().manual_seed(2))
    (layer.weight() * slope).sum().backward()
    assert layer.values.grad is not None
    assert layer.U.grad is not None
    torch.testing.assert_close(layer.values.grad, slope.flatten()[layer.support])
    torch.testing.assert_close(layer.U.grad, slope @ layer.V.mT)


@pytest.mark.parametrize(("name", "norms"), [("llama", 2), ("gpt2", 4)])
def test_norms_of_a_block_are_found(name, norms):
    layers = find_layers(tiny_model(name))
    found = dict(norm_parameters(layers.model, f"{layers.blocks_path}.0"))
    assert len(found) == norms
    for parameter_name, parameter in found.items():
        assert layers.model.get_parameter(parameter_name) is parameter
        assert parameter.ndim == 1


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_tensors_are_what_the_model_computes_with(name):
    model = tiny_model(name)
    layers = find_layers(model)
    values = {}
    for spec in layers.specs:
        W = layers.weight(spec.name)
        values[spec.name] = Decomposition(W, W.new_zeros(len(W), 0), W.new_zeros(0, W.shape[1]))
    made = Trainable(layers, values, [""]).tensors()
    for parameter, tensor in made.items():
        assert torch.equal(tensor, model.get_parameter(parameter))
    assert sum("norm" in name or "ln" in name for name in made) == len(made) - len(values)


def test_a_state_is_put_back():
    layers = find_layers(tiny_model("llama"))
    spec = layers.specs[0]
    trainable = Trainable(layers, {spec.name: decomposition(spec.d_out, spec.d_in)}, [f"{layers.blocks_path}.0"])
    state = trainable.state()
    with torch.no_grad():
        for parameter in trainable.parameters():
            parameter.add_(1)
    trainable.restore(state)
    for parameter, before in zip(trainable.parameters(), state, strict=True):
        assert torch.equal(parameter, before)
