"""The backward sweep against plain autograd on the whole model."""

from __future__ import annotations

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from globalopt.analysis.grid import Options
from globalopt.analysis.sensitivity import Sketches, backward_sweep
from globalopt.analysis.spans import compute_span
from globalopt.analysis.surfaces import sketches
from globalopt.models.layers import find_layers
from globalopt.models.walk import Batch, BlockRunner, walk_blocks
from globalopt.objective.candidates import take
from globalopt.values.problem import ErrorSurface
from tests.tiny_models import tiny_model

SEED = 3


def batches():
    ids = torch.randint(3, 120, (4, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[3, 8:] = 0
    return [Batch(ids[:2]), Batch(ids[2:], mask[2:])]


def swept(layers, spans, options):
    runner = BlockRunner(layers, batches())
    inputs = []
    for visit in walk_blocks(runner):
        inputs.append(visit.inputs)
        if visit.index + 1 == len(layers.blocks):
            inputs.append(visit.outputs())
    found = backward_sweep(
        runner, inputs, layers.specs, lambda s: Sketches(sketches(spans[s.name], options[s.name])), SEED
    )
    return {sensitivity.spec.name: sensitivity for sensitivity in found}


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_errors_equal_squared_inner_products_of_plain_gradients(kind):
    model = tiny_model(kind)
    layers = find_layers(model)
    spans = {s.name: compute_span(layers.weight(s.name), None, "none") for s in layers.specs}
    options = {s.name: Options.of(s, spans[s.name].max_rank) for s in layers.specs}
    found = swept(layers, spans, options)

    # The same labels, in the same order, and the gradient of every sequence by itself.
    generator = torch.Generator().manual_seed(SEED)
    squares = {s.name: torch.zeros(len(options[s.name].targets), dtype=torch.float64) for s in layers.specs}
    tokens = 0
    dropped = {
        s.name: torch.stack([layers.weight(s.name) - take(spans[s.name], t).dense() for t in options[s.name].targets])
        for s in layers.specs
    }
    parameters = [layers.module(s.name).weight for s in layers.specs]
    for batch in batches():
        with torch.no_grad():
            p = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float().softmax(-1)
        labels = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(batch.input_ids.shape)
        for row in range(len(labels)):
            for parameter in parameters:
                parameter.requires_grad_(True)
                parameter.grad = None
            mask = None if batch.attention_mask is None else batch.attention_mask[row : row + 1]
            log_p = model(input_ids=batch.input_ids[row : row + 1], attention_mask=mask).logits.float().log_softmax(-1)
            picked = log_p[0].gather(1, labels[row, :, None]).squeeze(1)
            real = torch.ones_like(picked) if mask is None else mask[0].to(picked)
            (picked * real).sum().backward()
            tokens += int(real.sum())
            for spec, parameter in zip(layers.specs, parameters, strict=True):
                assert parameter.grad is not None
                gradient = parameter.grad.mT if isinstance(layers.module(spec.name), Conv1D) else parameter.grad
                squares[spec.name] += (dropped[spec.name] * gradient).flatten(1).double().sum(1).square()
                parameter.requires_grad_(False)
    for spec in layers.specs:
        expected = squares[spec.name] / (2 * tokens)
        scale = float(expected.max())
        torch.testing.assert_close(
            torch.tensor(found[spec.name].error, dtype=torch.float64), expected, atol=1e-4 * scale, rtol=1e-3
        )


def test_output_gram_is_the_second_moment_of_output_gradients():
    model = tiny_model("llama")
    layers = find_layers(model)
    spans = {s.name: compute_span(layers.weight(s.name), None, "none") for s in layers.specs}
    options = {s.name: Options.of(s, spans[s.name].max_rank) for s in layers.specs}
    found = swept(layers, spans, options)
    name = layers.specs[0].name
    A = found[name].output_gram
    assert A.tokens == 24 + 20
    assert A.matrix.shape == (layers.specs[0].d_out,) * 2
    assert float(A.matrix.diagonal().min()) > 0


def test_dense_costs_nothing_and_the_model_is_left_alone():
    model = tiny_model("llama")
    layers = find_layers(model)
    before = [parameter.clone() for parameter in model.parameters()]
    spans = {s.name: compute_span(layers.weight(s.name), None, "none") for s in layers.specs}
    options = {s.name: Options.of(s, spans[s.name].max_rank) for s in layers.specs}
    for name, sensitivity in swept(layers, spans, options).items():
        surface = ErrorSurface(sensitivity.spec, options[name].targets, sensitivity.error)
        dense = surface.targets.index(type(surface.targets[0]).dense(surface.spec))
        zero = surface.targets.index(type(surface.targets[0]).zero())
        assert surface.error[dense] < 1e-6 * surface.error[zero]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
