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

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from globalopt.analysis.surfaces import project
from globalopt.errors import NumericalError
from globalopt.kernels.sketch import DenseSketch, PrefixSketch
from globalopt.models.reach import product_of
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
        output_gram: `A`, the second moment per token of the gradients at the layer's output. Where no gradient reached
            it (an expert without tokens), the one that stands in for it: the mean of its siblings', or a multiple of
            the identity with the mean square of the gradients behind the block.
        error: predicted loss of every option, in nats per token; empty where no gradient reached the layer.
        anchor_error: predicted loss of every anchor solution, in nats per token; empty likewise.
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
        outputs = _second_moment(runner, upstream)
        behind(index, outputs)
        wanted = [spec for spec in layers.of_block(index) if spec in specs]
        taps = {spec.name: _Tap(spec, sketches_of(spec)) for spec in wanted}
        for spec in wanted:
            for sibling in spec.siblings(layers.of_block(index)):
                # Its output Gram may have to stand in for another.
                taps.setdefault(sibling.name, _Tap(sibling, Sketches()))
        with layers.resident(index, device):
            hooks = [
                layers.module(name).register_forward_hook(tap.listen, with_kwargs=True) for name, tap in taps.items()
            ]
            try:
                for i, batch in enumerate(runner.batches):
                    for tap in taps.values():
                        tap.begin(*batch.input_ids.shape)
                    with torch.enable_grad():
                        hidden = inputs[index][i].detach().requires_grad_()
                        output = runner.run(index, i, hidden)
                    if not output.requires_grad:
                        raise NumericalError(
                            f"Block {index} runs without gradients, so that no loss can be predicted for its layers; "
                            "use --sensitivity none."
                        )
                    _find_sequences(taps.values(), output, hidden, upstream[i])
                    torch.autograd.backward(output, upstream[i])
                    for tap in taps.values():
                        tap.end()
                    if hidden.grad is None:
                        raise NumericalError(
                            f"Block {index} passes no gradient to its input, so that no loss can be predicted for the "
                            "layers before it; use --sensitivity none."
                        )
                    upstream[i] = hidden.grad
            finally:
                for hook in hooks:
                    hook.remove()
        for spec in reversed(wanted):
            yield _sensitivity(spec, taps, outputs, tokens)


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


def _find_sequences(taps: Iterable[_Tap], output: Tensor, hidden: Tensor, upstream: Tensor) -> None:
    """Find the sequence of every row that a layer was called with, where the shape does not tell.

    An expert is called with the rows that were routed to it, in any order. Sequences do not mix in a block, so that a
    gradient of some of them reaches no row of another: one backward pass per binary digit of their numbers finds them.
    A row that no gradient reaches adds nothing to any sum, whichever sequence it is counted to.
    """
    calls = [(tap, call) for tap in taps for call in tap.calls]
    unknown = [(tap, call) for tap, call in calls if call.sequence is not None]
    sequences = torch.arange(len(output), device=output.device)
    for digit in range((len(output) - 1).bit_length() if unknown else 0):
        for _, call in calls:
            call.digit = digit
        chosen = (sequences >> digit & 1).bool().view(-1, *[1] * (upstream.dim() - 1)).to(upstream.device)
        some = upstream.masked_fill(~chosen, 0)
        torch.autograd.grad(output, hidden, some, retain_graph=True, allow_unused=True)
    for _, call in calls:
        call.digit = None
    for tap, call in unknown:
        tap.learn_order(call)


def _sensitivity(spec: LayerSpec, taps: Mapping[str, _Tap], outputs: Gram, tokens: int) -> LayerSensitivity:
    """Return the sensitivity of a layer; where no gradient reached it, one made from its siblings or its block.

    Args:
        taps: of the layer and its siblings, by name.
        outputs: output Gram of the block.
        tokens: of all batches.
    """
    found = taps[spec.name].finish(tokens)
    # An expert that computes every token, and whose result is dropped, gets gradients of zero.
    if found is not None and bool(found.output_gram.matrix.any()):
        return found
    siblings = spec.siblings(tap.spec for tap in taps.values())
    others = [made.output_gram for sibling in siblings if (made := taps[sibling.name].finish(tokens)) is not None]
    known = [gram for gram in others if bool(gram.matrix.any())]
    if found is not None and not known:
        return found
    return LayerSensitivity(spec, Gram.stand_in(known, spec.d_out, float(outputs.diagonal.double().mean())), ())


@dataclass(eq=False)
class _Call:
    """Hold the input of one call of a layer until its gradient arrives.

    Args:
        x: (..., d_in).
        sequence: (rows,) the sequence of every row, found digit by digit; None where rows follow the tokens in order.
        digit: the binary digit that the coming gradient tells of; None for the gradient to be taken.
    """

    x: Tensor
    sequence: Tensor | None = None
    digit: int | None = None


class _Tap:
    """Sum over the gradients at one linear layer: `g gᵀ` of tokens, and squared inner products of sequences."""

    def __init__(self, spec: LayerSpec, sketches: Sketches) -> None:
        self.spec = spec
        self.sketches = sketches
        self.shape: tuple[int, int] = (0, 0)
        self.calls: list[_Call] = []
        self.in_order = False
        self.of_options: Tensor | None = None
        self.of_anchors: Tensor | None = None
        self.squares: Tensor | None = None
        self.anchor_squares: Tensor | None = None
        self.products: Tensor | None = None
        self.second: Tensor | None = None

    def begin(self, sequences: int, tokens: int) -> None:
        """Begin a batch of `sequences` of `tokens` each."""
        self.shape = sequences, tokens
        self.calls = []
        self.of_options = self.of_anchors = None

    def listen(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Note a call of the layer, and wait for the gradient at its output."""
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        if not x.numel() or not torch.is_grad_enabled():
            return
        y = product_of(module, x, output)
        if y is None:
            raise NumericalError(
                f"Layer {self.spec.name} does not return the product of its weight and its input, so that no loss can "
                "be predicted for it; use --sensitivity none."
            )
        if not y.requires_grad:
            # Its inputs do not come from the hidden states that enter the block.
            y.requires_grad_()
        sequences, tokens = self.shape
        rows = y.numel() // self.spec.d_out
        known = sequences == 1 or y.shape[:2] == self.shape or (self.in_order and rows == sequences * tokens)
        call = _Call(x, None if known else torch.zeros(rows, dtype=torch.int64, device=y.device))
        self.calls.append(call)
        y.register_hook(lambda gradient: self._arrived(call, gradient))

    def learn_order(self, call: _Call) -> None:
        """Note that the layer sees all tokens in their order, flattened, if a call shows it."""
        sequences, tokens = self.shape
        assert call.sequence is not None
        if len(call.sequence) == sequences * tokens:
            order = torch.arange(sequences, device=call.sequence.device).repeat_interleave(tokens)
            if torch.equal(call.sequence, order):
                call.sequence, self.in_order = None, True

    def _arrived(self, call: _Call, gradient: Tensor) -> None:
        if call.digit is None:
            self._take(call, gradient)
        elif call.sequence is not None:
            call.sequence |= gradient.flatten(0, -2).ne(0).any(1).long() << call.digit

    def _take(self, call: _Call, gradient: Tensor) -> None:
        g = gradient.float()
        if not bool(torch.isfinite(g).all()):
            raise NumericalError(f"The gradient at layer {self.spec.name} is not finite; load the model in float32.")
        rows = g.flatten(0, -2)
        self.second = _plus(self.second, rows.mT @ rows)
        options, anchors = self.sketches.options, self.sketches.anchors
        if options or anchors is not None:
            per_sequence = self._per_sequence(call, rows)
            # A layer may be called more than once in a batch: its sums are squared when the batch is done.
            if options:
                self.of_options = _plus(self.of_options, project(options, per_sequence))
            if anchors is not None:
                self.of_anchors = _plus(self.of_anchors, anchors.project(per_sequence))

    def _per_sequence(self, call: _Call, rows: Tensor) -> Tensor:
        """Compute the gradient of the weight of every sequence, (sequences, d_out, d_in)."""
        sequences, _ = self.shape
        x = call.x.float().flatten(0, -2)
        if call.sequence is None:
            return rows.view(sequences, -1, self.spec.d_out).mT @ x.view(sequences, -1, self.spec.d_in)
        members = (call.sequence == sequence for sequence in range(sequences))
        return torch.stack([rows[some].mT @ x[some] for some in members])

    def end(self) -> None:
        """End a batch: add the squares of the products of every sequence to the sums."""
        self.calls = []
        if self.of_options is not None:
            self.squares = _plus(self.squares, self.of_options.square().sum(0))
        if self.of_anchors is not None:
            self.anchor_squares = _plus(self.anchor_squares, self.of_anchors.square().sum(0))
            self.products = _plus(self.products, self.of_anchors.mT @ self.of_anchors)

    def finish(self, tokens: int) -> LayerSensitivity | None:
        """Divide the sums by the number of tokens of all batches; None if no gradient arrived."""
        if self.second is None:
            return None
        error, anchor_error = (
            () if squares is None else tuple((squares / (2 * tokens)).tolist())
            for squares in (self.squares, self.anchor_squares)
        )
        products = None if self.products is None else self.products.cpu() / (2 * tokens)
        return LayerSensitivity(self.spec, Gram(self.second.cpu() / tokens, tokens), error, anchor_error, products)


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    """Add to a total that may not have begun."""
    return part if total is None else total + part
