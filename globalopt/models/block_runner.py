"""Run the decoder blocks of a model one at a time, each as a function of hidden states.

The model's own forward pass prepares the arguments of the blocks (masks, rotary embeddings, mask types by block)
and processes their result (final norm, head, softcap): it runs with stand-ins for the blocks, so that none of it
is written again here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import Cache

from globalopt.errors import CalibrationError, UnsupportedModelError
from globalopt.machine.memory import in_file
from globalopt.models.batch import Batch
from globalopt.models.context_length import context_length
from globalopt.models.decoder import token_embedding
from globalopt.models.hooks import stand_ins
from globalopt.models.layers import ModelLayers
from globalopt.models.portions import Portion


class BlockRunner:
    """Run the decoder blocks of a model as functions of hidden states, for a fixed set of batches.

    `logits(i, run(n-1, i, ... run(0, i, first(i))))` is the model's own forward pass on batch `i`.

    >>> from globalopt.models.finding import find_blocks
    >>> from globalopt.reference.tiny import tiny_llama
    >>> model, batch = tiny_llama(), Batch(torch.tensor([[5, 6, 7, 8]]))
    >>> runner = BlockRunner(find_blocks(model), [batch])
    >>> hidden = runner.run(1, 0, runner.run(0, 0, runner.first(0)))
    >>> torch.allclose(runner.logits(0, hidden), model(batch.input_ids).logits, atol=1e-5)
    True
    """

    def __init__(
        self,
        layers: ModelLayers,
        batches: Sequence[Batch],
        scratch: Path | None = None,
        portion: Portion | None = None,
    ) -> None:
        """Record the arguments of every block, by one pass per batch through stand-ins for the blocks.

        Args:
            layers: the model and its blocks.
            batches: at least one.
            scratch: folder of files that hold the hidden states of a walk; None: they are held in memory.
            portion: which windows of a text the batches are, where other processes run the others; None: they are all.

        Raises:
            CalibrationError: no batches, a token id outside the vocabulary, or more tokens than positions.
            UnsupportedModelError: the model does not simply pass each block's output to the next block.
        """
        self.layers = layers
        self.batches = tuple(batches)
        self.scratch = scratch
        self.portion = portion or Portion.all(len(batch.input_ids) for batch in self.batches)
        self._check_batches()
        with torch.no_grad():
            self._output_length = self._learn_output()
            pool = _TensorPool()
            self._calls = [self._record(i, pool.for_batch()) for i in range(len(self.batches))]

    def __len__(self) -> int:
        """Count the batches."""
        return len(self.batches)

    def some(self, every: int) -> BlockRunner:
        """Make a runner of one of `every` batches of the whole text, the first one among them."""
        batches = [self.batches[place] for place in self.portion.every(every)]
        return BlockRunner(self.layers, batches, self.scratch, self.portion.some(every))

    def first(self, i: int) -> Tensor:
        """Compute the hidden states (b, t, d) of batch `i` in front of the first block."""

        def stop(*args: Any, **kwargs: Any) -> Any:
            """Interrupt the forward pass at the first block."""
            raise _Stop(_Call.split(args, kwargs)[0])

        with torch.no_grad(), stand_ins([self.layers.blocks[0]], lambda _: stop):
            return self._interrupted(i)

    def keep(self, hidden: Tensor) -> Tensor:
        """Store hidden states until the next block reads them: in memory, or in a file of the scratch folder."""
        return hidden if self.scratch is None else in_file(hidden, self.scratch)

    def run(self, block: int, i: int, hidden: Tensor, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """Compute the output of a block, as it now is and on the device where it is, for batch `i`.

        Gradients are recorded if they are enabled where this is called.

        Args:
            block: index of the block. i: index of the batch.
            hidden: (b, t, d) inputs.
            tensors: replace parameters of the block in this call, by name within it.
        """
        module = self.layers.blocks[block]
        compute = module if tensors is None else partial(_with_tensors, module, tensors)
        return _hidden(self._calls[i][block].apply(compute, hidden, self.layers.device_of(block)))

    def logits(self, i: int, hidden: Tensor) -> Tensor:
        """Compute the logits (b, t, vocab) of batch `i` from outputs `hidden` of the last block, differentiably."""
        last = len(self.layers.blocks) - 1
        output = self._as_output(hidden.to(token_embedding(self.layers.model).weight.device))

        def stand_in(index: int) -> Callable[..., Any]:
            """Pass hidden states on; the last block returns `hidden` instead."""
            if index == last:
                return lambda *args, **kwargs: output
            return lambda *args, **kwargs: self._as_output(_Call.split(args, kwargs)[0])

        with stand_ins(self.layers.blocks, stand_in):
            return self._forward(i).logits

    def single_windows(self, i: int) -> list[BlockRunner]:
        """Make a runner of every window of batch `i` alone, for what needs as much memory as the logits of a batch.

        Raises:
            CalibrationError: a window is padding alone.
        """
        batch = self.batches[i]
        masks = [None] * len(batch.input_ids) if batch.attention_mask is None else batch.attention_mask.split(1)
        return [
            BlockRunner(self.layers, [Batch(ids, mask)])
            for ids, mask in zip(batch.input_ids.split(1), masks, strict=True)
        ]

    def _check_batches(self) -> None:
        """Check that there are batches, and that their token ids and lengths are within the model's."""
        if not self.batches:
            raise CalibrationError("There are no batches to run; give at least one window of text.")
        model = self.layers.model
        vocab = token_embedding(model).num_embeddings
        positions = context_length(model.config)
        for batch in self.batches:
            largest, tokens = int(batch.input_ids.max()), batch.input_ids.shape[1]
            if largest >= vocab:
                raise CalibrationError(
                    f"Token id {largest} is outside the model's vocabulary of {vocab}; "
                    "the text was not tokenized with this model's tokenizer."
                )
            if positions is not None and tokens > positions:
                raise CalibrationError(
                    f"A window of {tokens} tokens is longer than the model's {positions} positions; lower --seqlen."
                )

    def _forward(self, i: int) -> Any:
        """Run the model's own forward pass on batch `i`."""
        batch, device = self.batches[i], token_embedding(self.layers.model).weight.device
        mask = None if batch.attention_mask is None else batch.attention_mask.to(device)
        return self.layers.model(input_ids=batch.input_ids.to(device), attention_mask=mask, use_cache=False)

    def _interrupted(self, i: int) -> Any:
        """Run the forward pass on batch `i` until a stand-in raises `_Stop`, and return the value it carries."""
        try:
            self._forward(i)
        except _Stop as stop:
            return stop.value
        raise UnsupportedModelError(
            f"{type(self.layers.model).__name__} never calls its decoder blocks {self.layers.blocks_path}."
        )

    def _learn_output(self) -> int | None:
        """Return the length of the tuple that the first block returns, or None for a tensor.

        Stand-ins must return the same.
        """

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            """Interrupt the forward pass after the first block."""
            raise _Stop(output)

        handle = self.layers.blocks[0].register_forward_hook(stop)
        try:
            output = self._interrupted(0)
        finally:
            handle.remove()
        _hidden(output)
        return len(output) if isinstance(output, tuple) else None

    def _as_output(self, hidden: Tensor) -> Any:
        """Wrap hidden states as a block returns them."""
        return hidden if self._output_length is None else (hidden, *[None] * (self._output_length - 1))

    def _record(self, i: int, share: Callable[[Tensor], Tensor]) -> list[_Call]:
        """Record the arguments of all blocks for batch `i`, without their hidden states.

        Args:
            share: maps a tensor to an equal one that is kept already (`_TensorPool.for_batch`).
        """
        calls: list[_Call] = []
        blocks, previous = self.layers.blocks, None

        def stand_in(index: int) -> Callable[..., Any]:
            """Make the function that records the arguments of one block and returns its hidden states."""

            def record(*args: Any, **kwargs: Any) -> Any:
                nonlocal previous
                hidden, call = _Call.split(args, kwargs)
                if index != len(calls) or (index > 0 and hidden is not previous):
                    raise UnsupportedModelError(
                        f"{type(self.layers.model).__name__} does not pass the output of each block of "
                        f"{self.layers.blocks_path} straight to the next (block {index}); it cannot be walked."
                    )
                calls.append(call.map(share))
                if len(calls) == len(blocks):
                    raise _Stop(None)
                previous = hidden
                return self._as_output(hidden)

            return record

        with stand_ins(blocks, stand_in):
            self._interrupted(i)
        return calls


@dataclass(frozen=True, eq=False)
class _Call:
    """Hold the arguments of a block except its hidden states; `keyword` is the name these were passed by, if any."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    keyword: str | None

    @classmethod
    def split(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, _Call]:
        """Split the arguments of a block into its hidden states and the rest."""
        if args and isinstance(args[0], Tensor):
            return args[0], cls(args[1:], kwargs, None)
        if isinstance(kwargs.get("hidden_states"), Tensor):
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            return kwargs["hidden_states"], cls(args, rest, "hidden_states")
        raise UnsupportedModelError("The decoder blocks are not called with hidden states; they cannot be walked.")

    def map(self, change: Callable[[Tensor], Tensor]) -> _Call:
        """Apply `change` to every tensor in the arguments."""
        args = _map_tensors(self.args, change)
        return _Call(args, _map_tensors(dict(self.kwargs), change), self.keyword)

    def apply(self, module: Callable[..., Any], hidden: Tensor, device: torch.device) -> Any:
        """Call `module` with hidden states and these arguments, moved to `device`."""
        here = self.map(lambda x: x.to(device))
        hidden = hidden.to(device)
        if self.keyword is None:
            return module(hidden, *here.args, **here.kwargs)
        return module(*here.args, **{self.keyword: hidden}, **here.kwargs)


class _TensorPool:
    """Keep one of several equal tensors, as most batches call the blocks with the same positions and masks."""

    DISTINCT = 8

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], list[Tensor]] = {}

    def for_batch(self) -> Callable[[Tensor], Tensor]:
        """Make a function that maps a tensor of one batch to an equal one that is kept already, or else to itself."""
        # All blocks of a batch get the same few objects: each is compared once, and held so that ids stay unique.
        done: dict[int, tuple[Tensor, Tensor]] = {}

        def share(x: Tensor) -> Tensor:
            """Map one tensor; objects that came before are not compared again."""
            if id(x) not in done:
                done[id(x)] = (x, self._share(x))
            return done[id(x)][1]

        return share

    def _share(self, x: Tensor) -> Tensor:
        """Return an equal tensor that is kept, or keep this one."""
        kept = self._kept.setdefault((x.shape, x.dtype, x.device), [])
        for other in kept:
            if torch.equal(other, x):
                return other
        # A few are enough for positions; padding masks differ by batch, and comparing them would be in vain.
        if len(kept) < self.DISTINCT:
            kept.append(x)
        return x


class _Stop(Exception):
    """End a forward pass early, and carry the value it was run for."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to every tensor in `value`.

    A cache becomes None, as a block must not remember an earlier call.
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Cache):
        return None
    if type(value) in (tuple, list):
        return type(value)(_map_tensors(item, change) for item in value)
    if type(value) is dict:
        return {name: _map_tensors(item, change) for name, item in value.items()}
    return value


def _hidden(output: Any) -> Tensor:
    """Return the hidden states from a block's output."""
    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(hidden, Tensor):
        raise UnsupportedModelError(
            f"A decoder block returns {type(output).__name__}, neither hidden states nor a tuple that starts with them."
        )
    return hidden


def _with_tensors(module: nn.Module, tensors: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """Call `module` with some of its parameters replaced by `tensors`."""
    return functional_call(module, dict(tensors), args, kwargs)
