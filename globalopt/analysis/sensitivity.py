"""Compute gradients of a loss at the layers of a model, block by block, in one backward sweep.

Two things are made of them. With labels `y` drawn from the model's own predictions, the second moments of the gradients
of `log p(y)` at the output of a layer are its output Gram `A`: `tr(A E G Eᵀ) / 2` is then an estimate of
`KL(dense || perturbed)` where the weight changes by `E` (block-diagonal Fisher, Kronecker-factored; Martens and Grosse
2015, arXiv:1503.05671). And the inner products of the gradients of a loss with a change of every layer's weight, one
per sequence, say what each layer has to do with that loss (`attribution`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from globalopt.errors import NumericalError
from globalopt.kernels.precision import RoughLinear, rough_product, rough_products
from globalopt.kernels.second_moment import add_second_moment, mirror
from globalopt.machine import ranks
from globalopt.models.block_runner import BlockRunner
from globalopt.models.reach import product_of
from globalopt.values.layer import LayerSpec
from globalopt.values.metric import Gram


@dataclass(frozen=True, eq=False)
class LayerGradients:
    """Hold what a backward sweep found at one layer.

    Args:
        output_gram: `A`, the second moment per token of the gradients at the layer's output; None where inner products
            were computed instead. Where no gradient reached the layer (an expert without tokens), the one that stands
            in for it: the mean of its siblings', or a multiple of the identity with the mean square of the gradients
            behind the block.
        products: (sequences,) float64, `<G_n, E>` of the gradients of the weight and its change; None without changes.

    >>> LayerGradients(LayerSpec("up", 0, "in", "up", 2, 2), Gram(torch.eye(2), 4)).products is None
    True
    """

    spec: LayerSpec
    output_gram: Gram | None = None
    products: Tensor | None = None


def label_gradients(runner: BlockRunner, hidden: Sequence[Tensor], seed: int, rough: bool = False) -> list[Tensor]:
    """Compute the gradients of `sum over tokens log p(y)` at the last block's output, with `y` sampled from p.

    Args:
        hidden: output of the last block, by batch.
        seed: of the labels.
        rough: as in `backward_sweep`.

    >>> from globalopt.models.batch import Batch
    >>> from globalopt.models.finding import find_layers
    >>> from globalopt.reference.tiny import tiny_llama
    >>> layers = find_layers(tiny_llama(), allow_low_coverage=True)
    >>> runner = BlockRunner(layers, [Batch(torch.arange(64).view(4, 16))])
    >>> [gradient.shape for gradient in label_gradients(runner, [torch.ones(4, 16, 16)], seed=0)]
    [torch.Size([4, 16, 16])]
    """
    generator = torch.Generator().manual_seed(seed)
    found, drawn = [], 0
    for i, states in enumerate(hidden):
        # One window at a time: with a large vocabulary, logits of a batch would take the most memory of a search.
        windows = zip(runner.portion.windows[i], runner.single_windows(i), states.split(1), strict=True)
        gradients = []
        for number, one, window in windows:
            for _ in range(drawn, number):
                # Of a window of another process: every window has the labels that it would have in one process.
                torch.rand(1, window.shape[1], 1, generator=generator)
            drawn = number + 1
            gradients.append(_label_gradient(one, window, generator, rough))
        found.append(torch.cat(gradients))
    return found


def backward_sweep(
    runner: BlockRunner,
    inputs: Sequence[Sequence[Tensor]],
    specs: Sequence[LayerSpec],
    upstream: Sequence[Tensor],
    device: torch.device | None = None,
    changes: Callable[[LayerSpec], Tensor] | None = None,
    behind: Callable[[int, Gram], None] | None = None,
    rough: bool = False,
) -> Iterator[LayerGradients]:
    """Sweep backward over the blocks, recompute each with gradients, and yield what is found at its layers.

    Weight gradients are not computed as such; a layer's inputs and output gradients suffice. Memory is needed for one
    block, the stored inputs, and one gradient per sequence position.

    Args:
        runner: runs blocks and the model's tail on its batches.
        inputs: hidden states per block and batch; more rows are not read.
        specs: the layers at which gradients are taken.
        upstream: gradients of the loss at the last block's output, by batch.
        device: where a block is moved for its turn; None leaves it.
        changes: gives the change `E` (d_out, d_in) of a layer's weight, whose inner products are computed in place of
            output Grams; called once per layer, when its block is reached.
        behind: called per block with the output Gram `A` of the hidden states that leave it.
        rough: whether linear layers multiply in bfloat16 where a CPU is faster at it (`RoughLinear`).
    Raises:
        NumericalError: the gradient at a layer is not finite, or none reaches it.

    >>> from globalopt.models.batch import Batch
    >>> from globalopt.models.finding import find_layers
    >>> from globalopt.reference.tiny import tiny_llama
    >>> layers = find_layers(tiny_llama(), allow_low_coverage=True)
    >>> runner = BlockRunner(layers, [Batch(torch.arange(64).view(4, 16))])
    >>> states = [runner.first(0)]
    >>> for block in range(2):
    ...     states.append(runner.run(block, 0, states[-1]))
    >>> upstream = label_gradients(runner, states[-1:], seed=0)
    >>> found = backward_sweep(runner, [[x] for x in states], layers.specs[:1], upstream)
    >>> next(found).output_gram.matrix.shape
    torch.Size([16, 16])
    """
    upstream = list(upstream)
    wanted = set(specs)
    layers = runner.layers
    tokens = 0 if changes is not None else _tokens(runner)
    for index in reversed(range(len(layers.blocks))):
        here = [spec for spec in layers.of_block(index) if spec in wanted]
        outputs = None
        if behind is not None:
            outputs = _second_moment(runner, upstream, index)
            behind(index, outputs)
        taps = {spec.name: _Tap(spec, None if changes is None else changes(spec), rough) for spec in here}
        if changes is None:
            outputs = _second_moment(runner, upstream, index) if outputs is None else outputs
            for spec in here:
                for sibling in spec.siblings(layers.of_block(index)):
                    # Its output Gram may have to stand in for another.
                    taps.setdefault(sibling.name, _Tap(sibling, None, rough))
        with layers.resident(index, device):
            hooks = [
                layers.module(name).register_forward_hook(tap.listen, with_kwargs=True) for name, tap in taps.items()
            ]
            try:
                for i, batch in enumerate(runner.batches):
                    for tap in taps.values():
                        tap.begin(*batch.input_ids.shape)
                    hidden = inputs[index][i].detach().requires_grad_()
                    with torch.enable_grad(), RoughLinear(rough):
                        output = runner.run(index, i, hidden)
                    if not output.requires_grad:
                        raise NumericalError(
                            f"Block {index} runs without gradients, so that no loss can be predicted for its layers; "
                            "use --sensitivity none."
                        )
                    if changes is not None:
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
        if changes is None:
            _add_up(list(taps.values()), layers.device_of(index))
        for spec in reversed(here):
            if outputs is None or changes is not None:
                yield LayerGradients(spec, products=torch.cat(taps[spec.name].products))
            else:
                yield LayerGradients(spec, _output_gram(spec, taps, outputs, tokens))


def _label_gradient(runner: BlockRunner, hidden: Tensor, generator: torch.Generator, rough: bool) -> Tensor:
    """Compute the gradient of `sum over tokens log p(y)` at the last block's output, with `y` sampled from p.

    At the logits it is the indicator of `y` less `p`: the vocabulary is gone through a few times only.

    Args:
        runner: of one batch.
    """
    (batch,) = runner.batches
    hidden = hidden.detach().requires_grad_()
    with torch.enable_grad(), RoughLinear(rough):
        logits = runner.logits(0, hidden)
    p = logits.detach().float().softmax(-1)
    labels = _sample(p, generator)
    at_logits = p.neg_().scatter_add_(-1, labels, torch.ones_like(labels, dtype=p.dtype))
    if batch.attention_mask is not None:
        at_logits *= batch.attention_mask.to(at_logits).unsqueeze(-1)
    (gradient,) = torch.autograd.grad(logits, hidden, at_logits.to(logits.dtype))
    return gradient


def _sample(p: Tensor, generator: torch.Generator) -> Tensor:
    """Sample one index (..., 1) from every distribution `p` (..., v), by the inverse of its cumulative sums."""
    sums = p.cumsum(-1)
    drawn = torch.rand(*p.shape[:-1], 1, generator=generator).to(p.device) * sums[..., -1:]
    return torch.searchsorted(sums, drawn, right=True).clamp_max_(p.shape[-1] - 1)


def _output_gram(spec: LayerSpec, taps: Mapping[str, _Tap], outputs: Gram, tokens: int) -> Gram:
    """Return the output Gram of a layer; where no gradient reached it, one made from its siblings or its block.

    Args:
        taps: of the layer and its siblings, by name.
        outputs: output Gram of the block.
        tokens: of all batches.
    """
    found = taps[spec.name].output_gram(tokens)
    # An expert that computes every token, and whose result is dropped, gets gradients of zero.
    if found is not None and bool(found.matrix.any()):
        return found
    siblings = spec.siblings(tap.spec for tap in taps.values())
    others = [gram for sibling in siblings if (gram := taps[sibling.name].output_gram(tokens)) is not None]
    known = [gram for gram in others if bool(gram.matrix.any())]
    if found is not None and not known:
        return found
    return Gram.stand_in(known, spec.d_out, float(outputs.diagonal.double().mean()))


def _second_moment(runner: BlockRunner, gradients: Sequence[Tensor], block: int) -> Gram:
    """Compute the second moment per token of the gradients of the hidden states that leave a block."""
    if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
        raise NumericalError(f"The gradient behind block {block} is not finite; load the model in float32.")
    size = gradients[0].shape[-1]
    total = torch.zeros(size, size, device=gradients[0].device)
    for batch, gradient in zip(runner.batches, gradients, strict=True):
        add_second_moment(total, batch.select(gradient).float())
    tokens = _tokens(runner)
    return Gram(mirror(ranks.total(total)).cpu() / tokens, tokens)


def _tokens(runner: BlockRunner) -> int:
    """Count the tokens of all processes."""
    return int(ranks.total(torch.tensor(sum(batch.tokens for batch in runner.batches))))


def _add_up(taps: Sequence[_Tap], device: torch.device) -> None:
    """Add up the second moments of all processes; a process in which no gradient arrived at a layer adds zero."""
    if ranks.several():
        arrived = ranks.total(torch.tensor([tap.second is not None for tap in taps], dtype=torch.int64))
        for tap, processes in zip(taps, arrived.tolist(), strict=True):
            if processes:
                size = tap.spec.d_out
                tap.second = ranks.total(torch.zeros(size, size, device=device) if tap.second is None else tap.second)


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
    """Sum over the gradients at one linear layer: `g gᵀ` of tokens, or inner products of sequences with a change."""

    def __init__(self, spec: LayerSpec, change: Tensor | None, rough: bool) -> None:
        self.spec = spec
        self.change = change
        self.shape: tuple[int, int] = (0, 0)
        self.calls: list[_Call] = []
        self.in_order = False
        self.rough = rough
        self.second: Tensor | None = None
        self.products: list[Tensor] = []

    def begin(self, sequences: int, tokens: int) -> None:
        """Begin a batch of `sequences` of `tokens` each."""
        self.shape = sequences, tokens
        self.calls = []
        if self.change is not None:
            self.products.append(torch.zeros(sequences, dtype=torch.float64))

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
        # Their sum is one pass over them; a mask of all would be several.
        if not bool(torch.isfinite(g.sum())):
            raise NumericalError(f"The gradient at layer {self.spec.name} is not finite; load the model in float32.")
        rows = g.flatten(0, -2)
        if self.change is None:
            if self.second is None:
                self.second = rows.new_zeros(rows.shape[1], rows.shape[1])
            add_second_moment(self.second, rows, self.rough)
        else:
            # A layer may be called more than once in a batch.
            self.products[-1] += self._per_sequence(call, rows, self.change)

    def _per_sequence(self, call: _Call, rows: Tensor, change: Tensor) -> Tensor:
        """Compute `sum of g (E x)` over the tokens of every sequence, (sequences,) float64."""
        sequences, _ = self.shape
        x = call.x.float().flatten(0, -2)
        changed = rough_product(x, change.mT) if self.rough and rough_products(change) else x @ change.mT
        each = (rows * changed).sum(1).double().cpu()
        if call.sequence is None:
            return each.view(sequences, -1).sum(1)
        return torch.zeros(sequences, dtype=torch.float64).index_add_(0, call.sequence.cpu(), each)

    def end(self) -> None:
        """End a batch."""
        self.calls = []

    def output_gram(self, tokens: int) -> Gram | None:
        """Divide the second moment of all batches by the number of tokens; None if no gradient arrived."""
        if self.second is None:
            return None
        # It may be asked for again, as one that stands in for a sibling's.
        return Gram(mirror(self.second).cpu() / tokens, tokens)
