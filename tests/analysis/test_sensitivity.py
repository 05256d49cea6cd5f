"""The backward sweep against plain autograd on the whole model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from globalopt.analysis.grid import Options
from globalopt.analysis.sensitivity import Sketches, backward_sweep
from globalopt.analysis.spans import compute_span
from globalopt.analysis.surfaces import sketches
from globalopt.kernels.sketch import DenseSketch
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


# ---------------------------------------------------------------------------------- layers called in other ways


class Experts(nn.Module):
    """A router and two experts that are linear layers of their own; each token goes to one of them."""

    def __init__(self, width: int, shuffle: bool = False):
        super().__init__()
        self.router = nn.Linear(width, 2)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.shuffle = shuffle

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        weight, chosen = self.router(rows).softmax(-1).max(-1)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            (here,) = torch.where(chosen == number)
            here = here.flip(0) if self.shuffle else here
            out = out.index_add(0, here, expert(rows[here]) * weight[here, None])
        return out.view_as(x)


class ByKeyword(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(width, width)

    def forward(self, x):
        return self.up(input=x)


class Twice(nn.Module):
    """One layer that sees the tokens in two halves."""

    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(width, width)

    def forward(self, x):
        first, last = x.chunk(2, dim=1)
        return torch.cat([self.up(first), self.up(last)], 1)


class WithScores(nn.Linear):
    """A router that returns scores beside its logits."""

    def forward(self, input):  # pyright: ignore[reportIncompatibleMethodOverride]
        logits = super().forward(input)
        return logits.softmax(-1), logits


class ScoresAlone(nn.Linear):
    def forward(self, input):
        return super().forward(input).softmax(-1)


class Scored(nn.Module):
    def __init__(self, width: int, kind: type[nn.Linear] = WithScores):
        super().__init__()
        self.up = kind(width, width)

    def forward(self, x):
        y = self.up(x)
        return x * (y[0] if isinstance(y, tuple) else y)


class WithoutGradient(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up, self.index = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        with torch.no_grad():
            largest = self.index(x).argmax(-1, keepdim=True)
        return self.up(x) * largest


def model_with(make):
    model = tiny_model("llama")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for block in model.model.layers:
            block.mlp = make(32)
            for parameter in block.mlp.parameters():
                nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


def swept_against_autograd(model):
    """The errors of three random changes of every layer, by the sweep and by one backward pass per sequence."""
    layers = find_layers(model, allow_low_coverage=True)
    ids = torch.randint(3, 120, (5, 12), generator=torch.Generator().manual_seed(0))
    runner = BlockRunner(layers, [Batch(ids[:3]), Batch(ids[3:])])
    inputs = [[runner.first(i) for i in range(2)]]
    for block in range(len(layers.blocks)):
        inputs.append([runner.run(block, i, inputs[-1][i]) for i in range(2)])
    generator = torch.Generator().manual_seed(2)
    changes = {s.name: torch.randn(3, s.d_out, s.d_in, generator=generator) for s in layers.specs}
    found = backward_sweep(
        runner,
        inputs,
        layers.specs,
        lambda s: Sketches([DenseSketch(changes[s.name])], DenseSketch(changes[s.name])),
        SEED,
    )
    errors = {each.spec.name: each for each in found}

    generator = torch.Generator().manual_seed(SEED)
    expected = {name: torch.zeros(3, dtype=torch.float64) for name in changes}
    for some in (ids[:3], ids[3:]):
        labels = torch.multinomial(model(some).logits.softmax(-1).flatten(0, 1), 1, generator=generator)
        for row, wanted in zip(some, labels.view(some.shape), strict=True):
            weights = [layers.module(s.name).weight.requires_grad_() for s in layers.specs]
            log_p = model(row[None]).logits[0].log_softmax(-1).gather(1, wanted[:, None]).sum()
            for spec, gradient in zip(
                layers.specs, torch.autograd.grad(log_p, weights, allow_unused=True), strict=True
            ):
                if gradient is not None:
                    expected[spec.name] += (changes[spec.name] * gradient).flatten(1).double().sum(1).square()
            for weight in weights:
                weight.requires_grad_(False)
    return errors, {name: total / (2 * ids.numel()) for name, total in expected.items()}


@pytest.mark.parametrize(
    "make",
    [Experts, lambda width: Experts(width, shuffle=True), ByKeyword, Twice, Scored],
    ids=["experts", "experts in reverse order", "by keyword", "twice", "tuple"],
)
def test_errors_follow_the_rows_that_a_layer_was_called_with(make):
    found, expected = swept_against_autograd(model_with(make))
    assert len(found) >= 10
    for name, wanted in expected.items():
        assert float(wanted.min()) > 0
        torch.testing.assert_close(torch.tensor(found[name].error, dtype=torch.float64), wanted, rtol=1e-3, atol=0)
        torch.testing.assert_close(found[name].error, found[name].anchor_error)


@pytest.mark.parametrize("make", [WithoutGradient, lambda width: Scored(width, ScoresAlone)], ids=["no_grad", "scores"])
def test_a_layer_whose_gradient_cannot_be_had_is_none_of_the_layers(make):
    found, expected = swept_against_autograd(model_with(make))
    assert found.keys() == expected.keys()
    left = {name.rpartition("mlp.")[2] for name in found if ".mlp." in name}
    assert left == ({"up"} if make is WithoutGradient else set())


class FromElsewhere(nn.Module):
    """A layer whose input does not come from the hidden states that enter the block."""

    def __init__(self, width: int):
        super().__init__()
        self.up, self.place = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        places = torch.arange(x.shape[1] * x.shape[2]).view(x.shape[1:]) / x[0].numel()
        return self.up(x) + self.place(places.expand_as(x).contiguous())


class Spare(nn.Module):
    """An expert that is never chosen, beside one that always is, and a layer that is never called."""

    def __init__(self, width: int):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.spare = nn.Linear(width, 5)

    def forward(self, x):
        return self.experts[0](x)


def test_a_layer_apart_from_the_hidden_states_has_a_loss():
    found, expected = swept_against_autograd(model_with(FromElsewhere))
    for name, wanted in expected.items():
        torch.testing.assert_close(torch.tensor(found[name].error, dtype=torch.float64), wanted, rtol=1e-3, atol=0)


def test_output_grams_of_siblings_or_of_the_block_stand_in_where_no_gradient_comes():
    layers = find_layers(model_with(Spare), allow_low_coverage=True)
    runner = BlockRunner(layers, [Batch(torch.randint(3, 120, (3, 12), generator=torch.Generator().manual_seed(0)))])
    inputs = [[runner.first(0)]]
    for block in range(2):
        inputs.append([runner.run(block, 0, inputs[-1][0])])
    behind = {}
    # The sibling is swept too, though nobody asks for it.
    asked = [spec for spec in layers.specs if spec.name.endswith(("experts.1", "spare"))]
    some = backward_sweep(runner, inputs, asked, lambda s: Sketches(), SEED, behind=behind.__setitem__)
    every = backward_sweep(runner, inputs, layers.specs, lambda s: Sketches(), SEED)
    some, every = ({found.spec.name: found for found in each} for each in (some, every))
    assert some.keys() == {spec.name for spec in asked}
    for block in range(2):
        mlp = f"model.layers.{block}.mlp"
        chosen, never, spare = (f"{mlp}.experts.0", f"{mlp}.experts.1", f"{mlp}.spare")
        assert every[chosen].output_gram.tokens == 36
        for found in (some, every):
            assert (found[never].output_gram.tokens, found[never].error) == (0, ())
            torch.testing.assert_close(found[never].output_gram.matrix, every[chosen].output_gram.matrix)
            scale = behind[block].diagonal.mean()
            torch.testing.assert_close(found[spare].output_gram.matrix, scale * torch.eye(5))
