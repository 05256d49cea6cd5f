"""Walk the decoder blocks one at a time, and accumulate the Gram of every input site.

The model's own forward pass prepares the arguments of the blocks (masks, rotary embeddings, mask types by block)
and processes their result (final norm, head, softcap): it runs with stand-ins for the blocks, so that none of it
is written again here.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import Cache, PreTrainedConfig

from globalopt.errors import CalibrationError, UnknownNameError, UnsupportedModelError
from globalopt.kernels.second_moment import add_second_moment, mirror
from globalopt.machine import ranks
from globalopt.machine.memory import in_file, trim_memory
from globalopt.models.layers import ModelLayers, input_hooks, token_embedding
from globalopt.models.portions import Portion
from globalopt.values.layer import LayerSpec
from globalopt.values.metric import Gram

CONTEXT_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_target_positions",
    "model_max_length",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "context_length",
    "n_ctx",
    "seq_length",
    "seq_len",
)
"""Names of the longest context in model configs, the most exact first: the last ones may be a length in training."""

TEXT_CONFIGS = ("llm_config", "language_config", "text_config")
"""Names of the text part's config that `PreTrainedConfig.get_text_config` may not know."""


def context_length(config: PreTrainedConfig) -> int | None:
    """Find the longest context of a model in its config, in tokens; None where it does not tell.

    The config of the text part is asked first: where a model has several parts, the outer one may describe another.

    >>> from transformers import GPT2Config, MptConfig, PreTrainedConfig
    >>> context_length(MptConfig(max_seq_len=64)), context_length(GPT2Config(n_positions=32))
    (64, 32)
    >>> context_length(PreTrainedConfig()) is None
    True
    """
    parts = [config.get_text_config(decoder=True), *(getattr(config, name, None) for name in TEXT_CONFIGS), config]
    for part in parts:
        for name in CONTEXT_NAMES:
            found = part.get(name) if isinstance(part, Mapping) else getattr(part, name, None)
            if isinstance(found, int) and found > 0:
                return found
    return None


@dataclass(frozen=True, eq=False)
class Batch:
    """Hold the token ids of one forward pass, and a mask of the real tokens among them.

    Args:
        input_ids: (b, t) int64.
        attention_mask: (b, t), 1 for a real token and 0 for padding, or None if all are real.
    Raises:
        CalibrationError: the ids or the mask have another shape or type, or no token is real.

    >>> batch = Batch(torch.tensor([[5, 6, 7], [8, 0, 0]]), attention_mask=torch.tensor([[1, 1, 1], [1, 0, 0]]))
    >>> batch.tokens, tuple(batch.select(torch.zeros(2, 3, 16)).shape)
    (4, (4, 16))
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None

    def __post_init__(self) -> None:
        ids, mask = self.input_ids, self.attention_mask
        if ids.ndim != 2 or not ids.numel() or ids.dtype != torch.long:
            raise CalibrationError(f"A batch is (b, t) int64 token ids; got {tuple(ids.shape)} of {ids.dtype}.")
        if mask is not None and mask.shape != ids.shape:
            raise CalibrationError(f"The mask {tuple(mask.shape)} does not match the token ids {tuple(ids.shape)}.")
        if mask is not None and not bool(mask.any()):
            raise CalibrationError("The mask of a batch leaves no token; drop the batch.")

    @property
    def real(self) -> Tensor | None:
        """Return the mask of the real tokens, (b t,) bool, or None if all are real."""
        if self.attention_mask is None or bool(self.attention_mask.all()):
            return None
        return self.attention_mask.bool().flatten()

    @property
    def tokens(self) -> int:
        """Count the real tokens."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.count_nonzero())

    def select(self, x: Tensor) -> Tensor:
        """Select the rows of real tokens from `x` (b, t, d) or (b t, d), as (tokens, d).

        Raises:
            CalibrationError: the batch is padded, and `x` does not have a row per token, as in a model that routes
                tokens.
        """
        rows = x.reshape(-1, x.shape[-1])
        real = self.real
        if real is None:
            return rows
        if len(rows) != len(real):
            raise CalibrationError(
                f"{len(rows)} rows came out of a padded batch of {len(real)} tokens, so padding cannot be told apart: "
                "the model routes tokens. Use windows without padding."
            )
        return rows[real.to(rows.device)]


class BlockRunner:
    """Run the decoder blocks of a model as functions of hidden states, for a fixed set of batches.

    `logits(i, run(n-1, i, ... run(0, i, first(i))))` is the model's own forward pass on batch `i`.

    >>> from globalopt.models.layers import find_blocks
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


class BlockVisit:
    """Give access to one block during a walk: its module, its layers, and its inputs.

    `inputs` are the hidden states (b, t, d) that enter the block, by batch.

    >>> from globalopt.models.layers import find_layers
    >>> from globalopt.reference.tiny import tiny_llama
    >>> runner = BlockRunner(find_layers(tiny_llama()), [Batch(torch.tensor([[5, 6, 7, 8]]))])
    >>> visit = next(walk_blocks(runner))
    >>> {site.removeprefix("model.layers.0."): tuple(gram.matrix.shape) for site, gram in visit.grams().items()}
    {'self_attn.q_proj': (16, 16), 'self_attn.o_proj': (16, 16), 'mlp.gate_proj': (16, 16), 'mlp.down_proj': (24, 24)}
    """

    def __init__(self, runner: BlockRunner, index: int, inputs: list[Tensor]) -> None:
        self.index = index
        self.module: nn.Module = runner.layers.blocks[index]
        self.specs: tuple[LayerSpec, ...] = runner.layers.of_block(index)
        self.inputs = inputs
        self.layers = runner.layers
        self.runner = runner
        self._outputs: list[Tensor] | None = None

    def grams(self, sites: Sequence[str] | None = None) -> dict[str, Gram]:
        """Compute the Gram `G = mean over real tokens of x xᵀ` of each input site, in one forward pass of the block.

        With several processes the mean is over the tokens of all, and all get it. The outputs of that pass are kept, so
        that an unchanged block is not run again when the walk goes on. Where no token reached a site, its Gram is the
        mean of those of the site's siblings (`LayerSpec.siblings`: the other experts), or the identity, which is about
        what a norm leaves; its `tokens` are 0.

        Args:
            sites: which sites; all of this block by default.

        Raises:
            UnknownNameError: a site is not one of this block.
            CalibrationError: a site's inputs are not finite.
        """
        known = dict.fromkeys(spec.site for spec in self.specs)
        wanted = tuple(known) if sites is None else tuple(sites)
        for site in wanted:
            if site not in known:
                raise UnknownNameError("site", site, known)
        found = self._moments(wanted)
        if lacking := [site for site, gram in found.items() if gram is None]:
            stands_for = {site: next(spec for spec in self.specs if spec.site == site) for site in lacking}
            beside = {site: [spec.site for spec in stands_for[site].siblings(self.specs)] for site in lacking}
            found |= self._moments([site for sites in beside.values() for site in sites if site not in found])
            for site, sites in beside.items():
                known = [gram for sibling in dict.fromkeys(sites) if (gram := found[sibling]) is not None]
                found[site] = Gram.stand_in(known, stands_for[site].d_in)
        if self.layers.lazy is not None:
            trim_memory()
        return {site: gram for site in wanted if (gram := found[site]) is not None}

    def _moments(self, sites: Iterable[str]) -> dict[str, Gram | None]:
        """Compute the Gram of every site in one forward pass of the block; None where no token reached it."""
        moments = {site: _Moment(site) for site in sites}
        if not moments:
            return {}
        self._outputs = [self._observed(i, moments) for i in range(len(self.runner))]
        tokens = ranks.total(torch.tensor([moment.tokens for moment in moments.values()]))
        widths = {spec.site: spec.d_in for spec in self.specs}
        for moment, count in zip(moments.values(), tokens.tolist(), strict=True):
            moment.add_up(count, widths[moment.site], self.runner.layers.device_of(self.index))
        # Each sum is freed when its Gram is made: with wide layers the sums are larger than the block.
        return {site: moments.pop(site).gram() for site in tuple(moments)}

    def outputs(self) -> list[Tensor]:
        """Compute the outputs (b, t, d) of the block, by batch; they are kept until `replaced` is called."""
        if self._outputs is None:
            self._outputs = [self._output(i) for i in range(len(self.runner))]
        return self._outputs

    def replaced(self) -> None:
        """Discard the outputs that are kept, after the block's weights have changed."""
        self._outputs = None

    def _observed(self, i: int, moments: Mapping[str, _Moment]) -> Tensor:
        """Run batch `i` through the block, and add the inputs of its sites to `moments`."""
        batch, layers = self.runner.batches[i], self.runner.layers
        with input_hooks({site: layers.module(site) for site in moments}, lambda s, x: moments[s].add(batch.select(x))):
            return self._output(i)

    @torch.no_grad()
    def _output(self, i: int) -> Tensor:
        """Run batch `i` through the block; `CalibrationError` if the output is not finite."""
        hidden = self.inputs[i]
        output = self.runner.run(self.index, i, hidden).to(hidden.device)
        if not bool(torch.isfinite(self.runner.batches[i].select(output)).all()):
            raise CalibrationError(
                f"Block {self.runner.layers.blocks_path}.{self.index} returns values that are not finite; "
                "use --dtype float32 or bfloat16, and check the layers changed last."
            )
        return self.runner.keep(output)


def walk_blocks(runner: BlockRunner, device: torch.device | str | None = None) -> Generator[BlockVisit, None, None]:
    """Visit the decoder blocks in order, each with the outputs of the one before as its inputs.

    A consumer that only reads sees the dense model; one that changes the block's weights and calls
    `BlockVisit.replaced` makes all later blocks see the changed model. A visit is valid until the next one: its
    inputs are released when the walk goes on.

    Args:
        runner: the model's blocks and the batches.
        device: where to compute; each block is moved there for its visit and back. Hidden states stay where the
            model's embeddings are, or in the runner's scratch folder. By default nothing is moved.

    >>> from globalopt.models.layers import find_layers
    >>> from globalopt.reference.tiny import tiny_llama
    >>> runner = BlockRunner(find_layers(tiny_llama()), [Batch(torch.tensor([[5, 6, 7, 8]]))])
    >>> [(visit.index, len(visit.specs), tuple(visit.inputs[0].shape)) for visit in walk_blocks(runner)]
    [(0, 7, (1, 4, 16)), (1, 7, (1, 4, 16))]
    """
    blocks = runner.layers.blocks
    hidden = [runner.keep(runner.first(i)) for i in range(len(runner))]
    for index in range(len(blocks)):
        with runner.layers.resident(index, device):
            visit = BlockVisit(runner, index, hidden)
            yield visit
            if index + 1 < len(blocks):
                hidden = visit.outputs()
        visit.inputs = []


class _Moment:
    """Accumulate the sum of `x xᵀ` over the tokens of one site, in float32."""

    def __init__(self, site: str) -> None:
        self.site = site
        self.tokens = 0
        self.sum: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Add rows `x` (tokens, d)."""
        x = rows.float()
        if self.sum is None:
            self.sum = x.new_zeros(x.shape[1], x.shape[1])
        add_second_moment(self.sum, x)
        self.tokens += len(x)

    def add_up(self, tokens: int, width: int, device: torch.device) -> None:
        """Add the sums of all processes, which have `tokens` tokens together; one that has none adds zero."""
        if tokens and ranks.several():
            self.sum = ranks.total(torch.zeros(width, width, device=device) if self.sum is None else self.sum)
        self.tokens = tokens

    def gram(self) -> Gram | None:
        """Compute the Gram, the sum divided by the number of tokens, made exactly symmetric; the sum is freed.

        Returns:
            The Gram, or None where no token reached the site.
        Raises:
            CalibrationError: the sum is not finite.
        """
        if self.sum is None or self.tokens == 0:
            return None
        if not bool(torch.isfinite(self.sum).all()):
            raise CalibrationError(
                f"The inputs of layer {self.site} are not finite: the activations overflow or a weight before it is "
                "NaN. Use --dtype float32 or bfloat16."
            )
        mean, self.sum = self.sum.div_(self.tokens), None
        return Gram(mirror(mean), self.tokens)


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


@contextmanager
def stand_ins(
    blocks: Sequence[nn.Module] | nn.ModuleList, stand_in: Callable[[int], Callable[..., Any]]
) -> Iterator[None]:
    """Replace `forward` of `blocks[k]` by `stand_in(k)` while the context is open; other attributes stay readable.

    >>> block = nn.Linear(2, 2)
    >>> with stand_ins([block], lambda index: lambda x: x + 1):
    ...     block(torch.zeros(2))
    tensor([1., 1.])
    """
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for index, block in enumerate(blocks):
            block.forward = stand_in(index)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = forward
