"""How much the end loss minds an error in each layer: one backward sweep, labels sampled from the model.

With labels `y` drawn from the model's own predictions, `KL(dense || perturbed) = 1/2 dᵀ F d + O(|d|³)` and
`F = E[grad log p(y) grad log p(y)ᵀ]`. For an option c of a layer that changes its weight by `D(c)`, and the gradient
`G_n` of `sum over tokens log p(y)` of sequence n,

    error(c) = sum_n <G_n, D(c)>² / (2 sum_n T_n)      nats per token

estimates the loss of that option alone without bias (block Fisher; cross terms between layers are left out). One
inner product per sequence prices an option, and the options of a layer share their sums (`kernels.sketch`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from globalopt.capture import BlockRunner, resident
from globalopt.errors import NumericalError
from globalopt.kernels.sketch import DenseSketch, PrefixSketch
from globalopt.surface import project
from globalopt.types import Gram, LayerSpec

Sketches = Sequence[PrefixSketch | DenseSketch]


@dataclass(frozen=True, eq=False)
class LayerSensitivity:
    """One layer's answer: the output Gram `A`, and the predicted nats per token of every option asked about."""

    spec: LayerSpec
    outputs: Gram
    error: tuple[float, ...]


def backward_sweep(
    runner: BlockRunner,
    inputs: Sequence[Sequence[Tensor]],
    specs: Sequence[LayerSpec],
    sketches_of: Callable[[LayerSpec, Gram], Sketches],
    seed: int,
    device: torch.device | None = None,
) -> Iterator[LayerSensitivity]:
    """Walk the blocks from last to first, each recomputed with gradients; weights get no gradient of their own.

    A block is passed twice: for its output Grams, and, where options are asked about, for what these say of them.

    Memory: one block and its sketches, the stored inputs, and one gradient per sequence position.

    Args:
        runner: runs blocks and the model's tail on its batches.
        inputs: hidden states per block and batch, then once more for the last block's output
            (`blocks + 1` rows).
        specs: the layers asked about.
        sketches_of: a layer and its output Gram -> what its options drop, called once its block is reached; none
            leaves it at the Gram.
        seed: of the sampled labels.
        device: where a block is moved for its turn; None leaves it.
    Raises:
        NumericalError: the gradient at a layer is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    upstream = [_label_gradient(runner, i, inputs[-1][i], generator) for i in range(len(runner.batches))]
    layers = runner.layers
    tokens = sum(batch.tokens for batch in runner.batches)
    for index in reversed(range(len(layers.blocks))):
        asked = [spec for spec in layers.of_block(index) if spec in specs]
        with resident(layers.blocks[index], device):
            moments = {spec.name: _OutputMoment(spec) for spec in asked}
            behind = _pass_block(runner, index, inputs[index], upstream, moments)
            outputs = {spec: moments[spec.name].gram(tokens) for spec in asked}
            made = {spec: sketches_of(spec, gram) for spec, gram in outputs.items()}
            prices = {spec.name: _Prices(spec, sketches) for spec, sketches in made.items() if sketches}
            if prices:
                _pass_block(runner, index, inputs[index], upstream, prices)
            upstream = behind
        for spec, gram in reversed(outputs.items()):
            error = prices[spec.name].errors(tokens) if spec.name in prices else ()
            yield LayerSensitivity(spec, gram, error)


def _pass_block(
    runner: BlockRunner,
    index: int,
    inputs: Sequence[Tensor],
    upstream: Sequence[Tensor],
    taps: Mapping[str, _Tap],
) -> list[Tensor]:
    """One forward and backward pass through a block; the gradients at its input, batch by batch."""
    hooks = [runner.layers.module(name).register_forward_hook(tap.listen) for name, tap in taps.items()]
    behind = []
    try:
        for i, batch in enumerate(runner.batches):
            for tap in taps.values():
                tap.sequences = len(batch.input_ids)
            with torch.enable_grad():
                hidden = inputs[i].detach().requires_grad_()
                output = runner.run(index, i, hidden)
            torch.autograd.backward(output, upstream[i])
            if hidden.grad is None:
                raise NumericalError(f"Block {index} passes no gradient to its input; its layers have no price.")
            behind.append(hidden.grad)
    finally:
        for hook in hooks:
            hook.remove()
    return behind


def _label_gradient(runner: BlockRunner, i: int, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient of `sum over tokens log p(y)` at the last block's output, `y` sampled from p."""
    batch = runner.batches[i]
    with torch.enable_grad():
        hidden = hidden.detach().requires_grad_()
        log_p = runner.logits(i, hidden).float().log_softmax(-1)
        labels = torch.multinomial(log_p.detach().flatten(0, 1).exp().cpu(), 1, generator=generator)
        picked = log_p.gather(-1, labels.view(*log_p.shape[:2], 1).to(log_p.device)).squeeze(-1)
        if batch.attention_mask is not None:
            picked = picked * batch.attention_mask.to(picked)
    (gradient,) = torch.autograd.grad(picked.sum(), hidden)
    return gradient


class _Tap(ABC):
    """Listens at one linear layer for its inputs and the gradients at its outputs."""

    def __init__(self, spec: LayerSpec) -> None:
        self.spec = spec
        self.sequences = 0
        self.heard = False

    def listen(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0].detach()
        output.register_hook(lambda gradient: self._hear(x, gradient))

    def _hear(self, x: Tensor, gradient: Tensor) -> None:
        g = gradient.float().reshape(self.sequences, -1, self.spec.d_out)
        if not bool(torch.isfinite(g).all()):
            raise NumericalError(f"The gradient at layer {self.spec.name} is not finite; load the model in float32.")
        self.heard = True
        self.take(x, g)

    @abstractmethod
    def take(self, x: Tensor, g: Tensor) -> None:
        """Inputs of the layer, and gradients (sequences, tokens, d_out)."""


class _OutputMoment(_Tap):
    """Sums `g gᵀ`."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        self.second = torch.zeros(spec.d_out, spec.d_out)

    def take(self, x: Tensor, g: Tensor) -> None:
        rows = g.flatten(0, 1)
        self.second = self.second.to(rows.device) + rows.mT @ rows

    def gram(self, tokens: int) -> Gram:
        if not self.heard:
            raise NumericalError(f"No gradient reached layer {self.spec.name}; the model does not use it on this text.")
        return Gram(self.second.cpu() / tokens, tokens)


class _Prices(_Tap):
    """Sums, over the sequences, the squares of what the gradient says of every option."""

    def __init__(self, spec: LayerSpec, sketches: Sketches) -> None:
        super().__init__(spec)
        self.sketches = sketches
        self.squares: Tensor | float = 0.0

    def take(self, x: Tensor, g: Tensor) -> None:
        per_sequence = g.mT @ x.float().reshape(self.sequences, -1, self.spec.d_in)
        self.squares = self.squares + project(self.sketches, per_sequence).square().sum(0)

    def errors(self, tokens: int) -> tuple[float, ...]:
        return tuple((torch.as_tensor(self.squares) / (2 * tokens)).tolist())
