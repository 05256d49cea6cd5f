"""Attribution against finite differences of the loss: one layer's residual scaled, and those of all."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from globalopt.analysis.attribution import attribute
from globalopt.errors import NumericalError
from globalopt.models.batch import Batch
from globalopt.models.block_runner import BlockRunner
from globalopt.models.finding import find_layers
from globalopt.models.layers import ModelLayers
from globalopt.objective.kl_to_dense import ModelObjective
from tests.tiny_models import tiny_ids, tiny_model

WINDOWS, TOKENS = 5, 10

CHUNKS = (0, 1, 2)


def posed(kind: str, size: float) -> tuple[ModelLayers, ModelObjective, dict[str, Tensor]]:
    """A model, and a random residual for every layer, `size` times as large as its weight."""
    layers = find_layers(tiny_model(kind), allow_low_coverage=True)
    model = ModelObjective(BlockRunner(layers, [Batch(ids) for ids in tiny_ids(WINDOWS, TOKENS).split(2)]))
    generator = torch.Generator().manual_seed(4)
    residuals = {}
    for spec in layers.specs:
        noise = torch.randn(spec.d_out, spec.d_in, generator=generator)
        residuals[spec.name] = size * noise * layers.weight(spec.name).norm() / noise.norm()
    return layers, model, residuals


def replaced(
    model: ModelObjective, residuals: Mapping[str, Tensor], scale: Mapping[str, float] | float = 1.0
) -> dict[str, Tensor]:
    """The weights less the residuals, times `scale` for all or by layer."""
    by_name = scale if isinstance(scale, Mapping) else dict.fromkeys(residuals, scale)
    return {name: model.dense(name) - by_name.get(name, 1.0) * E for name, E in residuals.items()}


def losses(model: ModelObjective, weights: Mapping[str, Tensor]) -> Tensor:
    return model.losses_of([weights], CHUNKS)[0]


def halves_of_slopes(model: ModelObjective, residuals: Mapping[str, Tensor], names: list[str], h: float) -> Tensor:
    """`1/2 dL/dt` at 1 where the residuals of `names` are scaled by t, window by window."""
    up, down = (replaced(model, residuals, dict.fromkeys(names, 1 + step)) for step in (h, -h))
    return (losses(model, up) - losses(model, down)) / (4 * h)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "gemma2", "opt"])
def test_the_share_of_a_layer_is_half_the_slope_of_the_loss_in_its_residual(kind):
    layers, model, residuals = posed(kind, 0.2)
    found = attribute(model, replaced(model, residuals), CHUNKS)
    assert list(found.shares) == [spec.name for spec in layers.specs]
    torch.testing.assert_close(found.losses, losses(model, replaced(model, residuals)), rtol=1e-4, atol=1e-7)
    scale = float(found.losses.mean())
    for spec in layers.specs[::3]:
        expected = halves_of_slopes(model, residuals, [spec.name], 0.02)
        assert found.shares[spec.name].shape == (WINDOWS,)
        torch.testing.assert_close(found.shares[spec.name], expected, rtol=0.02, atol=2e-3 * scale)
    whole = torch.stack(list(found.shares.values())).sum(0)
    torch.testing.assert_close(
        whole, halves_of_slopes(model, residuals, list(residuals), 0.02), rtol=0.02, atol=2e-3 * scale
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_near_the_dense_model_shares_add_up_to_the_loss(kind):
    _, model, residuals = posed(kind, 0.02)
    found = attribute(model, replaced(model, residuals), CHUNKS)
    whole = torch.stack(list(found.shares.values())).sum(0)
    torch.testing.assert_close(whole, found.losses, rtol=0.05, atol=0.0)
    # What a layer loses beside others is in its share, which its loss alone does not have.
    alone = sum(losses(model, {name: model.dense(name) - E}) for name, E in residuals.items())
    assert not torch.allclose(torch.as_tensor(alone), found.losses, rtol=0.05)


def test_of_two_layers_that_undo_each_other_each_share_knows_of_the_other():
    layers, model, _ = posed("llama", 0.02)
    # Values and the projection after them: a factor in one is the same factor in the other.
    value, output = (next(s.name for s in layers.specs if s.name.endswith(f"{kind}_proj")) for kind in "vo")
    scaled = {value: -0.1 * model.dense(value), output: 0.1 * model.dense(output)}
    found = attribute(model, replaced(model, scaled), CHUNKS)
    alone = {name: float(losses(model, {name: model.dense(name) - E}).mean()) for name, E in scaled.items()}
    assert set(found.shares) == set(scaled)
    for name in scaled:
        assert abs(float(found.shares[name].mean())) < 0.25 * alone[name]
    assert float(found.losses.mean()) < 0.05 * min(alone.values())


def test_some_chunks_alone_are_their_windows():
    _, model, residuals = posed("llama", 0.1)
    weights = replaced(model, residuals)
    whole, some = attribute(model, weights, CHUNKS), attribute(model, weights, (2, 0))
    columns = [4, 0, 1]
    torch.testing.assert_close(some.losses, whole.losses[columns], rtol=1e-4, atol=1e-8)
    for name, share in some.shares.items():
        torch.testing.assert_close(share, whole.shares[name][columns], rtol=1e-3, atol=1e-7)


def test_weights_may_be_made_when_they_are_needed_and_layers_left_dense():
    layers, model, residuals = posed("llama", 0.1)
    some = {spec.name: residuals[spec.name] for spec in layers.specs[2:5]}
    weights = replaced(model, some)
    # Before, the model holds something else.
    model.losses_of([replaced(model, residuals)], [0])
    given = attribute(model, weights, CHUNKS)
    made = attribute(model, {name: (lambda w=w: w) for name, w in weights.items()}, CHUNKS)
    assert list(given.shares) == list(made.shares) == list(some)
    for name, share in given.shares.items():
        torch.testing.assert_close(made.shares[name], share, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(given.losses, losses(model, weights), rtol=1e-4, atol=1e-8)


def test_a_dense_model_loses_nothing_and_is_dense_again_when_closed():
    layers, model, residuals = posed("gpt2", 0.1)
    before = {spec.name: layers.weight(spec.name) for spec in layers.specs}
    attribute(model, replaced(model, residuals), CHUNKS)
    assert any(not torch.equal(layers.weight(name), weight) for name, weight in before.items())
    nothing = attribute(model, {name: model.dense(name).clone() for name in residuals}, CHUNKS)
    assert float(nothing.losses.abs().max()) < 1e-6
    assert all(float(share.abs().max()) == 0 for share in nothing.shares.values())
    model.close()
    assert all(torch.equal(layers.weight(name), weight) for name, weight in before.items())
    assert not any(parameter.requires_grad for parameter in layers.model.parameters())


def test_a_model_that_breaks_is_named_by_its_chunk():
    _, model, residuals = posed("llama", 0.1)
    with pytest.raises(NumericalError, match="chunk 0 is not finite"):
        attribute(model, {name: 1e30 * model.dense(name) for name in residuals}, CHUNKS)
