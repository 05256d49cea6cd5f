"""The loss of a model some of whose layers are replaced: the KL divergence from the dense model on given text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from globalopt.errors import NumericalError, UsageError
from globalopt.kernels.precision import RoughLinear, cpu_has_bfloat16
from globalopt.kernels.top_kl import TOP, Teacher
from globalopt.machine import ranks, shares
from globalopt.models.block_runner import BlockRunner
from globalopt.models.decoder import token_embedding
from globalopt.protocols import Candidate
from globalopt.values.budget import Target
from globalopt.values.layer import LayerSpec
from globalopt.values.span import Mask

WEIGHTS_AT_ONCE = 2**31
"""Bytes of candidates' weights that are held in memory, so that they need not be made again for every chunk."""

LAZY_SHARE = 16
"""A lazy model holds one part in so many of the bytes that others hold, because memory is short there."""

Weight = Tensor | Callable[[], Tensor]
"""A weight (d_out, d_in) in place of a layer's own, or a function that makes it when it is needed."""

Materialise = Callable[[LayerSpec, Target | Mask], Tensor]
"""Makes the weight (d_out, d_in) that a layer has at a target or with the components of a mask."""

Weights = Mapping[tuple[str, Target | Mask], Weight]
"""Weights by layer name and what the layer keeps."""


class ModelObjective:
    """Compute the KL divergence from the dense model to the model with some of its layers replaced.

        loss = mean over positions of KL(p_dense || p_replaced), nats per token, for each window

    Each batch of the runner is a chunk. Several processes share candidates and chunks, and all get the losses. The
    candidates of a call are run in an order in which neighbours share as many leading blocks as possible, and
    blocks before the first layer that differs are not run again.

    Between calls the model's layers may hold replacements; `close` puts the dense weights back.

    >>> import torch
    >>> from globalopt.models.batch import Batch
    >>> from globalopt.models.finding import find_layers
    >>> from globalopt.reference.tiny import tiny_llama
    >>> layers = find_layers(tiny_llama(), allow_low_coverage=True)
    >>> windows = torch.arange(48).reshape(3, 16)
    >>> objective = ModelObjective(BlockRunner(layers, [Batch(windows)]))
    >>> name = layers.specs[-1].name  # the last down projection
    >>> losses = objective.losses_of([{}, {name: torch.ones(16, 24)}], chunks=[0])
    >>> losses.shape
    torch.Size([2, 3])
    >>> bool(losses[0].abs().max() < 1e-6), bool(losses[1].min() > 1e-4)  # no layer replaced; one replaced
    (True, True)
    >>> objective.close()
    """

    def __init__(self, runner: BlockRunner, top: int = TOP, rough: bool = False) -> None:
        """Keep the dense weights (but those of a lazy model), and the dense model's predictions on every chunk.

        Args:
            runner: of the dense model, on windows without padding.
            top: most probable tokens kept per position; see `Teacher`.
            rough: whether linear layers of the replaced model multiply in bfloat16 where a CPU is faster at it
                (`RoughLinear`). From a loss what the dense model itself loses by that is subtracted: with noise on all
                weights of two models, losses of .0002 to 3 then are within 4 % of those in float32.

        Raises:
            UsageError: a batch is padded.
        """
        if any(batch.real is not None for batch in runner.batches):
            raise UsageError("A loss is the mean over whole windows; give text without padding.")
        self.top = top
        self._runner = runner
        self._dense = runner.layers.originals()
        self._placed: dict[str, Weight] = {}
        # The head runs on one window at a time: with a large vocabulary, logits of a chunk would take the most memory.
        self._heads = [runner.single_windows(chunk) for chunk in range(self.chunks)]
        self._teachers: list[list[Teacher]] = []
        self._floors: list[Tensor] = []
        self._rough = False
        device = token_embedding(runner.layers.model).weight.device
        own = {chunk: self._teachers_of(chunk) for chunk in range(self.chunks) if ranks.owns(chunk)}
        for chunk in range(self.chunks):
            if chunk in own:
                self._teachers.append(own[chunk])
            # One chunk at a time: on its way the predictions of a chunk are held a second time.
            if ranks.several():
                sent = [teacher.to(torch.device("cpu")) for teacher in own.get(chunk, [])]
                found = ranks.told(sent, by=chunk % ranks.count())
                if chunk not in own:
                    self._teachers.append([teacher.to(device) for teacher in found])
        self._rough = rough and device.type == "cpu" and cpu_has_bfloat16()
        if self._rough:
            floors = ranks.merged({chunk: self._losses(chunk, self._states(chunk)[-1]) for chunk in own})
            self._floors = [floors[chunk] for chunk in range(self.chunks)]

    @property
    def chunks(self) -> int:
        """The number of chunks."""
        return len(self._runner)

    @property
    def chunk_tokens(self) -> int:
        """Tokens of the largest chunk."""
        return max(batch.tokens for batch in self._runner.batches)

    @property
    def specs(self) -> tuple[LayerSpec, ...]:
        """The layers that may be replaced, in model order."""
        return self._runner.layers.specs

    @property
    def lazy(self) -> bool:
        """Whether the blocks of the model are read from disk when they are run."""
        return self._runner.layers.lazy is not None

    @property
    def tail(self) -> float:
        """Mean probability of the tokens outside of the `top` most probable ones."""
        tails = [teacher.tail.flatten() for chunk in self._teachers for teacher in chunk]
        return float(torch.cat(tails).double().mean())

    def losses_of(self, replacements: Sequence[Mapping[str, Weight]], chunks: Sequence[int]) -> Tensor:
        """Compute the losses of models with replaced layers.

        Two candidates have a layer in common where they give the same object for it, or neither names it.

        Args:
            replacements: for every candidate the weights of its replaced layers, by name; layers that are not named
                are dense. A function is called whenever its weight is put into the model.
            chunks: numbers of the chunks.
        Returns:
            (candidates, windows of the chunks) float64, windows in the order of `chunks`.

        Raises:
            UnknownNameError: a name is none of the layers.
            NumericalError: a loss is not finite.
        """
        for name in {name for replaced in replacements for name in replaced}:
            self._runner.layers.module(name)
        order = self._order(replacements)
        rows, columns = shares.grid(len(order), len(chunks), ranks.number(), ranks.count())
        found: dict[tuple[int, int], Tensor] = {}
        for column in columns:
            chunk, states = chunks[column], []
            for i in (order[row] for row in rows):
                states = self._states(chunk, states[: self._place(replacements[i]) + 1])
                found[i, column] = self._above_floor(chunk, self._losses(chunk, states[-1]))
        found = ranks.merged(found)
        return torch.stack(
            [torch.cat([found[i, column] for column in range(len(chunks))]) for i in range(len(replacements))]
        )

    def hidden_states(self, replaced: Mapping[str, Weight], chunk: int) -> list[Tensor]:
        """Put the weights of `replaced` into the model and compute its hidden states on a chunk.

        Returns:
            hidden states before every block, and after the last.
        """
        self._place(replaced)
        return self._states(chunk)

    def kl_gradient(self, chunk: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the losses of the windows of a chunk from the last block's output, and their gradient there.

        Returns:
            (windows,) float64, and the gradient of their sum, of the shape of `hidden`.
        """
        losses, gradients = [], []
        for i, window in enumerate(hidden.detach().split(1)):
            with torch.enable_grad():
                window = window.requires_grad_()
                loss = self._kl(chunk, i, window)
            losses.append(loss.detach())
            gradients.append(torch.autograd.grad(loss.sum(), window)[0])
        return self._above_floor(chunk, torch.cat(losses)), torch.cat(gradients)

    @property
    def runner(self) -> BlockRunner:
        """The runner, whose model holds the replacements of the latest call."""
        return self._runner

    def close(self) -> None:
        """Put the dense weights back."""
        for name in self._placed:
            self._runner.layers.restore(name, self._dense)
        self._placed = {}

    def dense(self, name: str) -> Tensor:
        """Return the dense weight of a layer, (d_out, d_in) float32, whatever the model holds now."""
        return self._dense[name]

    def _order(self, replacements: Sequence[Mapping[str, Weight]]) -> list[int]:
        """Sort candidates by their layers, so that those with the same leading layers are neighbours."""
        numbers: dict[str, dict[int, int]] = {spec.name: {id(None): 0} for spec in self.specs}

        def key(replaced: Mapping[str, Weight]) -> tuple[int, ...]:
            return tuple(known.setdefault(id(replaced.get(name)), len(known)) for name, known in numbers.items())

        keys = [key(replaced) for replaced in replacements]
        return sorted(range(len(keys)), key=keys.__getitem__)

    def _place(self, replaced: Mapping[str, Weight]) -> int:
        """Put a candidate's weights into the model; return the first block that changed, or the number of blocks."""
        layers = self._runner.layers
        first = len(layers.blocks)
        for spec in self.specs:
            weight = replaced.get(spec.name)
            if self._placed.get(spec.name) is weight:
                continue
            if weight is None:
                layers.restore(spec.name, self._dense)
                del self._placed[spec.name]
            else:
                layers.place(spec.name, partial(_made, weight))
                self._placed[spec.name] = weight
            first = min(first, spec.block)
        return first

    @torch.no_grad()
    def _states(self, chunk: int, known: Sequence[Tensor] = ()) -> list[Tensor]:
        """Hidden states before every block and after the last, from those of the first blocks that are `known`."""
        states = list(known) or [self._runner.first(chunk)]
        with RoughLinear(self._rough):
            for block in range(len(states) - 1, len(self._runner.layers.blocks)):
                states.append(self._runner.run(block, chunk, states[-1]))
        return states

    @torch.no_grad()
    def _losses(self, chunk: int, hidden: Tensor) -> Tensor:
        """Losses (windows,) of a chunk from the last block's output, with what rounding costs the dense model."""
        return torch.cat([self._kl(chunk, i, window) for i, window in enumerate(hidden.split(1))])

    def _above_floor(self, chunk: int, losses: Tensor) -> Tensor:
        """Check losses (windows,) of a chunk, and subtract what rounding alone costs the dense model."""
        if not bool(torch.isfinite(losses).all()):
            raise NumericalError(f"The loss of a candidate on selection chunk {chunk} is not finite.")
        return losses - self._floors[chunk] if self._rough else losses

    @torch.no_grad()
    def _teachers_of(self, chunk: int) -> list[Teacher]:
        """Predictions of the dense model on the windows of a chunk."""
        windows = self._states(chunk)[-1].split(1)
        return [Teacher.of(self._logits(chunk, i, x), self.top) for i, x in enumerate(windows)]

    def _logits(self, chunk: int, window: int, hidden: Tensor) -> Tensor:
        """Logits (1, t - 1, vocabulary) of one window of a chunk, from the last block's output (1, t, d)."""
        with RoughLinear(self._rough):
            return self._heads[chunk][window].logits(0, hidden)[:, :-1]

    def _kl(self, chunk: int, window: int, hidden: Tensor) -> Tensor:
        """Loss (1,) of one window of a chunk, from the last block's output (1, t, d)."""
        return self._teachers[chunk][window].kl(self._logits(chunk, window, hidden))


def _made(weight: Weight) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight()


class TargetObjective:
    """Compute the losses of candidates that are given by a target or a mask for every layer.

    The weights of the candidates are made by `materialise` and the latest ones are held in memory, up to
    `WEIGHTS_AT_ONCE` bytes.

    Args:
        model: computes the losses of the weights.
        materialise: makes the weight of a layer from what it keeps; a function of its arguments alone.

    >>> import torch
    >>> from globalopt.models.batch import Batch
    >>> from globalopt.models.finding import find_layers
    >>> from globalopt.reference.tiny import tiny_llama
    >>> layers = find_layers(tiny_llama(), allow_low_coverage=True)
    >>> model = ModelObjective(BlockRunner(layers, [Batch(torch.arange(48).reshape(3, 16))]))
    >>> def largest(spec, kept):  # magnitude pruning
    ...     weight = model.dense(spec.name)
    ...     least = weight.abs().flatten().topk(kept.nnz).values[-1]
    ...     return torch.where(weight.abs() >= least, weight, 0.0)
    >>> objective = TargetObjective(model, largest)
    >>> candidates = [{spec.name: Target(0, int(kept * spec.numel)) for spec in layers.specs} for kept in (0.9, 0.3)]
    >>> high, low = objective.losses(candidates, chunks=[0]).mean(1).tolist()
    >>> high < low
    True
    >>> objective.close()
    """

    def __init__(self, model: ModelObjective, materialise: Materialise) -> None:
        self.model = model
        largest = max(spec.numel for spec in model.specs)
        held = WEIGHTS_AT_ONCE // (4 * largest * (LAZY_SHARE if model.lazy else 1))
        self._make = lru_cache(max(1, held))(materialise)
        self._weights: dict[tuple[str, Target | Mask], Weight] = {}

    def losses(self, candidates: Sequence[Candidate], chunks: Sequence[int]) -> Tensor:
        """Compute the losses of candidates: (candidates, windows of the chunks) float64; see `Objective.losses`.

        Raises:
            NumericalError: a loss is not finite.
        """
        before, self._weights = self._weights, {}
        specs = self.model.specs
        replacements = [{spec.name: self._weight(spec, each, before) for spec in specs} for each in candidates]
        return self.model.losses_of(replacements, chunks)

    def weights(self, candidate: Candidate) -> dict[str, Weight]:
        """Return the weights of a candidate, by layer name."""
        return {spec.name: self._weight(spec, candidate, self._weights) for spec in self.model.specs}

    def close(self) -> None:
        """Put the dense weights back and let go of the weights that are held."""
        self.model.close()
        self._make.cache_clear()
        self._weights = {}

    def _weight(self, spec: LayerSpec, candidate: Candidate, before: Weights) -> Weight:
        """Return one object for equal targets of a layer, also that of the call before, which the model may hold."""
        key = spec.name, candidate[spec.name]
        if key not in self._weights:
            self._weights[key] = before[key] if key in before else partial(self._make, spec, key[1])
        return self._weights[key]
