"""The backward sweep against plain autograd on the whole model."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from globalopt.analysis.sensitivity import LayerGradients, backward_sweep, label_gradients
from globalopt.errors import NumericalError
from globalopt.models.batch import Batch
from globalopt.models.block_runner import BlockRunner
from globalopt.models.finding import find_layers
from globalopt.models.layers import ModelLayers
from globalopt.values.metric import Gram
from tests.tiny_models import tiny_model

SEED = 3


def batches(padded: bool = True) -> list[Batch]:
    """Two batches of unequal size; in the second one a sequence ends early."""
    ids = torch.randint(3, 120, (5, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[4, 8:] = 0
    return [Batch(ids[:3]), Batch(ids[3:], mask[3:] if padded else None)]


def states_of(runner: BlockRunner) -> list[list[Tensor]]:
    """Hidden states before every block and after the last, by batch."""
    count = range(len(runner))
    states = [[runner.first(i) for i in count]]
    with torch.no_grad():
        for block in range(len(runner.layers.blocks)):
            states.append([runner.run(block, i, states[-1][i]) for i in count])
    return states


def random_changes(layers: ModelLayers) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {s.name: torch.randn(s.d_out, s.d_in, generator=generator) for s in layers.specs}


def swept(
    layers: ModelLayers, some: list[Batch], changes: dict[str, Tensor] | None = None, behind=None
) -> dict[str, LayerGradients]:
    """What the sweep finds of the gradients of sampled labels, by layer."""
    runner = BlockRunner(layers, some)
    states = states_of(runner)
    upstream = label_gradients(runner, states[-1], SEED)
    change = None if changes is None else lambda spec: changes[spec.name]
    found = backward_sweep(runner, states, layers.specs, upstream, changes=change, behind=behind)
    return {each.spec.name: each for each in found}


def noting(kept: list[Tensor], place: int) -> Callable[..., None]:
    """A hook that keeps the output of a module, or the one at `place` of several, with its gradient."""

    def note(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        y = output[place] if isinstance(output, tuple) else output
        if y.requires_grad:
            y.retain_grad()
            kept.append(y)

    return note


def by_autograd(layers: ModelLayers, some: list[Batch], changes: dict[str, Tensor]):
    """The same by one backward pass of the whole model per sequence: products, and second moments at the outputs.

    The labels are drawn as the sweep draws them.
    """
    model = layers.model
    generator = torch.Generator().manual_seed(SEED)
    products: dict[str, list[float]] = {name: [] for name in changes}
    moments = {s.name: torch.zeros(s.d_out, s.d_out, dtype=torch.float64) for s in layers.specs}
    blocks = [torch.zeros(()).double() for _ in layers.blocks]
    tokens = 0
    for batch in some:
        mask = batch.attention_mask
        with torch.no_grad():
            p = model(input_ids=batch.input_ids, attention_mask=mask).logits.float().softmax(-1)
        drawn = torch.rand(*p.shape[:-1], 1, generator=generator)
        labels = (p.cumsum(-1) <= drawn * p.cumsum(-1)[..., -1:]).sum(-1)
        for row in range(len(labels)):
            outputs: dict[str, list[Tensor]] = {s.name: [] for s in layers.specs}
            leaving: list[Tensor] = []
            # Of a router that returns scores and logits the logits are the product; a block's states come first.
            hooks = [layers.module(name).register_forward_hook(noting(kept, -1)) for name, kept in outputs.items()]
            hooks += [block.register_forward_hook(noting(leaving, 0)) for block in layers.blocks]
            weights = [layers.module(s.name).weight.requires_grad_() for s in layers.specs]
            one = None if mask is None else mask[row : row + 1]
            logits = model(input_ids=batch.input_ids[row : row + 1], attention_mask=one).logits.float()
            picked = logits.log_softmax(-1)[0].gather(1, labels[row, :, None]).squeeze(1)
            real = torch.ones_like(picked) if one is None else one[0].to(picked)
            (picked * real).sum().backward()
            tokens += int(real.sum())
            for hook in hooks:
                hook.remove()
            for spec, weight in zip(layers.specs, weights, strict=True):
                gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
                gradient = gradient.mT if isinstance(layers.module(spec.name), Conv1D) else gradient
                products[spec.name].append(float((gradient.double() * changes[spec.name]).sum()))
                weight.requires_grad_(False)
                weight.grad = None
                for y in outputs[spec.name]:
                    if y.grad is not None:
                        g = y.grad.flatten(0, -2).double()
                        moments[spec.name] += g.mT @ g
            for i, y in enumerate(leaving):
                assert y.grad is not None
                g = y.grad.flatten(0, -2).double()
                blocks[i] = blocks[i] + g.mT @ g
    return (
        {name: torch.tensor(each, dtype=torch.float64) for name, each in products.items()},
        {name: moment / tokens for name, moment in moments.items()},
        [moment / tokens for moment in blocks],
    )


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert math.isfinite(float(expected.norm()))
    assert float((found.double() - expected).norm()) <= 1e-4 * float(expected.norm())


KINDS = ["llama", "gemma2", "gpt2", "gpt_neox", "opt"]


@pytest.mark.parametrize("kind", KINDS)
def test_products_and_output_grams_are_those_of_plain_gradients(kind):
    layers = find_layers(tiny_model(kind))
    changes = random_changes(layers)
    behind: dict[int, Gram] = {}
    found = swept(layers, batches(), changes)
    weighted = swept(layers, batches(), behind=behind.__setitem__)
    products, moments, blocks = by_autograd(layers, batches(), changes)
    assert set(found) == set(weighted) == {spec.name for spec in layers.specs}
    for name, expected in products.items():
        each, gram = found[name].products, weighted[name].output_gram
        assert each is not None
        assert gram is not None
        assert found[name].output_gram is weighted[name].products is None
        assert_near(each, expected)
        # Padding carries no label, so that no gradient comes from it, and it counts as no token.
        assert gram.tokens == 60 - 4
        assert_near(gram.matrix, moments[name])
    assert sorted(behind) == list(range(len(blocks)))
    for block, expected in enumerate(blocks):
        assert_near(behind[block].matrix, expected)


def test_layers_come_last_block_first_and_those_that_are_not_asked_for_not_at_all():
    layers = find_layers(tiny_model("llama"))
    runner = BlockRunner(layers, batches())
    states = states_of(runner)
    upstream = label_gradients(runner, states[-1], SEED)
    whole = swept(layers, batches())
    asked = [layers.specs[2], layers.specs[-1]]
    found = list(backward_sweep(runner, states, asked, upstream))
    assert [each.spec for each in found] == asked[::-1]
    for each in found:
        other = whole[each.spec.name].output_gram
        assert each.output_gram is not None
        assert other is not None
        assert_near(each.output_gram.matrix, other.matrix.double())


def test_changes_are_asked_for_once_when_their_block_is_reached():
    layers = find_layers(tiny_model("llama"))
    changes = random_changes(layers)
    runner = BlockRunner(layers, batches())
    states = states_of(runner)
    asked: list[str] = []

    def change(spec):
        asked.append(spec.name)
        return changes[spec.name]

    found = backward_sweep(runner, states, layers.specs, label_gradients(runner, states[-1], SEED), changes=change)
    next(found)
    last = [spec.name for spec in layers.of_block(len(layers.blocks) - 1)]
    assert asked == last
    assert len(list(found)) == len(layers.specs) - 1
    assert sorted(asked) == sorted(spec.name for spec in layers.specs)


def test_labels_follow_the_seed_and_the_model_is_left_alone():
    model = tiny_model("llama")
    layers = find_layers(model)
    before = [parameter.clone() for parameter in model.parameters()]
    runner = BlockRunner(layers, batches())
    states = states_of(runner)
    one, again, other = (torch.cat(label_gradients(runner, states[-1], seed)) for seed in (0, 0, 1))
    assert_near(again, one.double())
    assert float((other - one).norm()) > 0.1 * float(one.norm())
    upstream = label_gradients(runner, states[-1], 0)
    kept = [gradient.clone() for gradient in upstream]
    list(backward_sweep(runner, states, layers.specs, upstream))
    assert all(torch.equal(a, b) for a, b in zip(kept, upstream, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())


def test_a_gradient_that_is_not_finite_is_refused_by_the_name_of_its_layer():
    layers = find_layers(tiny_model("llama"))
    runner = BlockRunner(layers, batches())
    states = states_of(runner)
    upstream = label_gradients(runner, states[-1], 0)
    upstream[1][0, 0, 0] = math.inf
    with pytest.raises(NumericalError, match=r"The gradient behind block 1 is not finite"):
        list(backward_sweep(runner, states, layers.specs, upstream))
    changes = random_changes(layers)
    with pytest.raises(NumericalError, match=r"layer model\.layers\.1\..* is not finite"):
        list(backward_sweep(runner, states, layers.specs, upstream, changes=lambda spec: changes[spec.name]))


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


@pytest.mark.parametrize(
    "make",
    [Experts, lambda width: Experts(width, shuffle=True), ByKeyword, Twice, Scored],
    ids=["experts", "experts in reverse order", "by keyword", "twice", "tuple"],
)
def test_what_is_found_follows_the_rows_that_a_layer_was_called_with(make):
    layers = find_layers(model_with(make), allow_low_coverage=True)
    changes, some = random_changes(layers), batches(padded=False)
    found, weighted = swept(layers, some, changes), swept(layers, some)
    products, moments, _ = by_autograd(layers, some, changes)
    assert len(found) >= 10
    for name, expected in products.items():
        each, gram = found[name].products, weighted[name].output_gram
        assert each is not None
        assert gram is not None
        assert float(expected.abs().max()) > 0
        # Sequence by sequence: rows that were counted to another one would show.
        torch.testing.assert_close(each, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
        assert_near(gram.matrix, moments[name])


@pytest.mark.parametrize("make", [WithoutGradient, lambda width: Scored(width, ScoresAlone)], ids=["no_grad", "scores"])
def test_a_layer_whose_gradient_cannot_be_had_is_none_of_the_layers(make):
    layers = find_layers(model_with(make), allow_low_coverage=True)
    found = swept(layers, batches(padded=False), random_changes(layers))
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
    layers = find_layers(model_with(FromElsewhere), allow_low_coverage=True)
    changes, some = random_changes(layers), batches(padded=False)
    found, (products, _, _) = swept(layers, some, changes), by_autograd(layers, some, changes)
    for name, expected in products.items():
        each = found[name].products
        assert each is not None
        torch.testing.assert_close(each, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_output_grams_of_siblings_or_of_the_block_stand_in_where_no_gradient_comes():
    layers = find_layers(model_with(Spare), allow_low_coverage=True)
    runner = BlockRunner(layers, [Batch(torch.randint(3, 120, (3, 12), generator=torch.Generator().manual_seed(0)))])
    inputs = states_of(runner)
    upstream = label_gradients(runner, inputs[-1], SEED)
    behind: dict[int, Gram] = {}
    # The sibling is swept too, though nobody asks for it.
    asked = [spec for spec in layers.specs if spec.name.endswith(("experts.1", "spare"))]
    swept_some = backward_sweep(runner, inputs, asked, upstream, behind=behind.__setitem__)
    some = {found.spec.name: found.output_gram or Gram(torch.eye(1), 0) for found in swept_some}
    swept_all = backward_sweep(runner, inputs, layers.specs, upstream)
    every = {found.spec.name: found.output_gram or Gram(torch.eye(1), 0) for found in swept_all}
    assert some.keys() == {spec.name for spec in asked}
    for block in range(2):
        mlp = f"model.layers.{block}.mlp"
        chosen, never, spare = (f"{mlp}.experts.0", f"{mlp}.experts.1", f"{mlp}.spare")
        assert every[chosen].tokens == 36
        for found in (some, every):
            assert found[never].tokens == 0
            torch.testing.assert_close(found[never].matrix, every[chosen].matrix)
            scale = behind[block].diagonal.mean()
            torch.testing.assert_close(found[spare].matrix, scale * torch.eye(5))
