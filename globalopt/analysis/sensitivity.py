"""Estimate the loss increase of every option of every layer by the block-diagonal Fisher, in one backward sweep.

With labels `y` drawn from the model's own predictions, `KL(dense || perturbed) = 1/2 dᵀ F d + O(|d|³)` and
`F = E[grad log p(y) grad log p(y)ᵀ]`. For an option c of a layer that changes its weight by `D(c)`, and the gradient
`G_n` with respect to the weight of `sum over tokens log p(y)` of sequence n with `T_n` tokens,

    error(c) = sum_n <G_n, D(c)>² / (2 sum_n T_n)      nats per token

is an unbiased estimate of the second-order loss of that option alone (block Fisher; cross terms between layers are left
out). It takes one inner product per sequence and option, and the options of a layer share their sums
(`kernels.sketch`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from globalopt.analysis.surfaces import project
from globalopt.errors import NumericalError
from globalopt.kernels.sketch import DenseSketch, PrefixSketch
from globalopt.models.walk import BlockRunner
from globalopt.values.layer import LayerSpec
from globalopt.values.metric import Gram


@dataclass(frozen=True, eq=False)
class Sketches:
    """Hold the weight changes of a layer whose inner products with the gradients are computed.

    Without any, only the output Gram of the layer is.

    Args:
        options: the parts of the weight that the layer's options drop; see `surfaces.sketches`.
        anchors: residuals of its anchor solutions, or None.

    >>> Sketches(options=[DenseSketch(torch.ones(3, 2, 2))]).options[0].project(torch.ones(1, 2, 2))
    tensor([[4., 4., 4.]], dtype=torch.float64)
    """

    options: Sequence[PrefixSketch | DenseSketch] = ()
    anchors: DenseSketch | None = None


@dataclass(frozen=True, eq=False)
class LayerSensitivity:
    """Hold the output Gram of one layer and the predicted losses of its options, from a backward sweep.

    Args:
        output_gram: `A`, the second moment per token of the gradients at the layer's output.
        error: predicted loss of every option, in nats per token.
        anchor_error: predicted loss of every anchor solution, in nats per token.
        products: (anchors, anchors) float64, `sum_n <G_n, D(c)> <G_n, D(d)> / (2 sum_n T_n)`, with `anchor_error` on
            the diagonal; None without anchor solutions.

    >>> from globalopt.values.layer import LayerSpec
    >>> LayerSensitivity(LayerSpec("up", 0, "in", "up", 2, 2), Gram(torch.eye(2), 4), (0.5, 0.0)).anchor_error
    ()
    """

    spec: LayerSpec
    output_gram: Gram
    error: tuple[float, ...]
    anchor_error: tuple[float, ...] = ()
    products: Tensor | None = None


def backward_sweep(
    runner: BlockRunner,
    inputs: Sequence[Sequence[Tensor]],
    specs: Sequence[LayerSpec],
    sketches_of: Callable[[LayerSpec], Sketches],
    seed: int,
    device: torch.device | None = None,
    behind: Callable[[int, Gram], None] = lambda block, outputs: None,
) -> Iterator[LayerSensitivity]:
    """Sweep backward over the blocks, recompute each with gradients, and yield the sensitivity of its layers.

    Weight gradients are not computed as such; a layer's inputs and output gradients suffice. Memory is needed for one
    block and its sketches, the stored inputs, and one gradient per sequence position.

    Args:
        runner: runs blocks and the model's tail on its batches.
        inputs: hidden states per block and batch, then once more for the last block's output (`blocks + 1` rows).
        specs: the layers whose sensitivities are computed.
        sketches_of: called once per layer, when its block is reached.
        seed: of the sampled labels.
        device: where a block is moved for its turn; None leaves it.
        behind: called per block with the output Gram `A` of the hidden states that leave it.
    Raises:
        NumericalError: the gradient at a layer is not finite.

    >>> from globalopt.models.layers import find_layers
    >>> from globalopt.models.walk import Batch
    >>> from globalopt.reference.tiny import tiny_llama
    >>> layers = find_layers(tiny_llama(), allow_low_coverage=True)
    >>> runner = BlockRunner(layers, [Batch(torch.arange(64).view(4, 16))])
    >>> states = [runner.first(0)]
    >>> for block in range(2):
    ...     states.append(runner.run(block, 0, states[-1]))
    >>> found = backward_sweep(runner, [[x] for x in states], layers.specs[:1], lambda spec: Sketches(), seed=0)
    >>> next(found).output_gram.matrix.shape
    torch.Size([16, 16])
    """
    generator = torch.Generator().manual_seed(seed)
    upstream = [_label_gradient(runner, i, inputs[-1][i], generator) for i in range(len(runner.batches))]
    layers = runner.layers
    tokens = sum(batch.tokens for batch in runner.batches)
    for index in reversed(range(len(layers.blocks))):
        behind(index, _second_moment(runner, upstream))
        taps = {spec.name: _Tap(spec, sketches_of(spec)) for spec in layers.of_block(index) if spec in specs}
        with layers.resident(index, device):
            hooks = [layers.module(name).register_forward_hook(tap.listen) for name, tap in taps.items()]
            try:
                for i, batch in enumerate(runner.batches):
                    for tap in taps.values():
                        tap.sequences = len(batch.input_ids)
                    with torch.enable_grad():
                        hidden = inputs[index][i].detach().requires_grad_()
                        output = runner.run(index, i, hidden)
                    torch.autograd.backward(output, upstream[i])
                    if hidden.grad is None:
                        raise NumericalError(
                            f"Block {index} passes no gradient to its input, so that the loss of its layers cannot be "
                            "predicted. Use --sensitivity none."
                        )
                    upstream[i] = hidden.grad
            finally:
                for hook in hooks:
                    hook.remove()
        for tap in reversed(taps.values()):
            yield tap.finish(tokens)


def _label_gradient(runner: BlockRunner, i: int, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """Compute the gradient of `sum over tokens log p(y)` at the last block's output, with `y` sampled from p."""
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


def _second_moment(runner: BlockRunner, gradients: Sequence[Tensor]) -> Gram:
    """Compute the second moment per token of the gradients of hidden states."""
    rows = (batch.select(g).float() for batch, g in zip(runner.batches, gradients, strict=True))
    total = sum((g.mT @ g for g in rows), torch.zeros(()))
    tokens = sum(batch.tokens for batch in runner.batches)
    return Gram(total.cpu() / tokens, tokens)


class _Tap:
    """Sum over the gradients at one linear layer: `g gᵀ` of tokens, and squared inner products of sequences."""

    def __init__(self, spec: LayerSpec, sketches: Sketches) -> None:
        self.spec = spec
        self.sketches = sketches
        self.sequences = 0
        self.squares: Tensor | None = None
        self.anchor_squares: Tensor | None = None
        self.products: Tensor | None = None
        self.second: Tensor | None = None

    def listen(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Register a hook on the gradient at the output of a forward pass."""
        x = args[0].detach()
        output.register_hook(lambda gradient: self._take(x, gradient))

    def _take(self, x: Tensor, gradient: Tensor) -> None:
        """Add the gradients of one batch with inputs `x`."""
        g = gradient.float().reshape(self.sequences, -1, self.spec.d_out)
        if not bool(torch.isfinite(g).all()):
            raise NumericalError(f"The gradient at layer {self.spec.name} is not finite; load the model in float32.")
        rows = g.flatten(0, 1)
        self.second = _plus(self.second, rows.mT @ rows)
        options, anchors = self.sketches.options, self.sketches.anchors
        if options or anchors is not None:
            per_sequence = g.mT @ x.float().reshape(self.sequences, -1, self.spec.d_in)
            if options:
                self.squares = _plus(self.squares, project(options, per_sequence).square().sum(0))
            if anchors is not None:
                projected = anchors.project(per_sequence)
                self.anchor_squares = _plus(self.anchor_squares, projected.square().sum(0))
                self.products = _plus(self.products, projected.mT @ projected)

    def finish(self, tokens: int) -> LayerSensitivity:
        """Divide the sums by the number of tokens of all batches."""
        if self.second is None:
            raise NumericalError(f"No gradient reached layer {self.spec.name}; the model does not use it on this text.")
        error, anchor_error = (
            () if squares is None else tuple((squares / (2 * tokens)).tolist())
            for squares in (self.squares, self.anchor_squares)
        )
        products = None if self.products is None else self.products.cpu() / (2 * tokens)
        return LayerSensitivity(self.spec, Gram(self.second.cpu() / tokens, tokens), error, anchor_error, products)


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    """Add to a total that may not have begun."""
    return part if total is None else total + part
