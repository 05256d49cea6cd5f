"""Transformer matching: what a compressed block keeps is trained until the block answers as the dense one does.

    minimise  mean over tokens of loss(f(x; kept) - y),   y = (1 - share) f_dense(x) + share f_dense(x_dense)

over kept entries, factors and norms of one block, where `x` is what the compressed prefix really produces and `x_dense`
what the dense model would. Source: 3BASiL, arXiv:2603.01376, section on transformer matching. Departures, all options:
the norm that errors are measured in, steps relative to the size of what they change, an end that held-out windows
decide, and supports that no step can leave (`globalopt.trainable`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from globalopt.errors import UnknownNameError, UsageError
from globalopt.matching.parameters import Trainable
from globalopt.matching.training import Trained, Training, train
from globalopt.models.walk import BlockRunner
from globalopt.registry import at_least, read_options
from globalopt.values.decomposition import Decomposition
from globalopt.values.metric import Gram


class Loss(StrEnum):
    """How the error `e` of a token's hidden state is measured, `y` being the state it should be.

    `sum`: `|e|²`. `token`: `|e|² / |y|²`. `nats`: `eᵀ A e / 2`, `A` the output Gram of the block, so that a token costs
    what the end loss minds. `both`: the mean of `token` and `nats`, each over what it is at the start: `A` is curvature
    at no loss, and a state that it hardly feels may still be one that later blocks rely on.
    """

    SUM = "sum"
    TOKEN = "token"
    NATS = "nats"
    BOTH = "both"

    @property
    def weighted(self) -> bool:
        """Whether it reads `A`."""
        return self in (Loss.NATS, Loss.BOTH)


@dataclass(frozen=True)
class Matching(Training):
    """How a block is matched.

    Args:
        loss: see `Loss`.
        damping: of `A`, as a share of its mean diagonal.
        share: of the target that is the dense block's answer to dense inputs.
    """

    loss: Loss = Loss.NATS
    damping: float = 0.01
    share: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, damping=self.damping, share=self.share)
        if self.share > 1:
            raise UsageError(f"Option share of matching is a fraction of the target; got {self.share:g}.")

    @classmethod
    def read(cls, options: Mapping[str, str]) -> Matching:
        """From texts by option; `preset` sets what the other options then change."""
        given = dict(options)
        preset = given.pop("preset", "default")
        if preset not in PRESETS:
            raise UnknownNameError("preset of matching", preset, PRESETS)
        return replace(PRESETS[preset], **read_options(cls, "matching", given))


PRESETS = {
    "default": Matching(),
    "tm": Matching(
        epochs=19, rate=2e-5, floor=0.2, relative=False, held_out=0.0, patience=19, loss=Loss.SUM, windows=8
    ),
}
"""`tm`: as published; of its twenty epochs the first only evaluates."""


def match_block(
    runner: BlockRunner,
    index: int,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    values: Mapping[str, Decomposition],
    options: Matching,
    outputs: Gram | None,
    seed: int,
) -> tuple[Trainable, Trained]:
    """Train what block `index` keeps; the block itself is not changed.

    Args:
        inputs: hidden states (b, t, d) that enter it, by batch.
        targets: those that should leave it.
        values: its layers as they were fitted.
        outputs: `A` (d, d) of the hidden states behind the block, for `Loss.NATS`.
        seed: of the order of the batches.
    Raises:
        NumericalError: a loss is not finite.
        UsageError: there is no `outputs`, and the loss needs it.
    """
    layers = runner.layers
    root = f"{layers.blocks_path}.{index}"
    trainable = Trainable(layers, values, [root])
    device = layers.module(next(iter(values))).weight.device
    norm = _Norm(options, outputs, device)

    def errors(i: int) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=options.autocast):
            found = runner.run(index, i, inputs[i], trainable.tensors(f"{root}."))
        batch = runner.batches[i]
        return batch.select(found), batch.select(targets[i]).to(found.device)

    def loss_of(i: int) -> Tensor:
        return norm(*errors(i))

    if options.loss is Loss.BOTH:
        with torch.no_grad():
            norm.settle(errors(i) for i in range(len(runner)))

    return trainable, train(trainable, loss_of, len(runner), options, seed, f"block {index}")


class _Norm:
    """`mean over tokens of loss(found - wanted)`."""

    def __init__(self, options: Matching, outputs: Gram | None, device: torch.device) -> None:
        self.loss = options.loss
        self.units = (1.0, 1.0)
        if self.loss.weighted:
            if outputs is None:
                raise UsageError(f"Matching with loss={self.loss} needs the output Gram of the block; use loss=token.")
            values, vectors = torch.linalg.eigh(outputs.damped(options.damping).matrix.double())
            # eᵀ A e / 2 as |Fᵀ e|²: one product, and never below zero.
            self.factor = (vectors * (values.clamp_min(0) / 2).sqrt()).float().to(device)

    def settle(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Make one the mean of each error of `both` over `pairs` of what is found and wanted."""
        sums = torch.stack([torch.stack([self._token(*pair), self._nats(*pair)]) for pair in pairs]).double().mean(0)
        # Nothing is lost yet: then nothing is to be gained either.
        self.units = tuple(1 / (2 * value) if value > 0 else 0.0 for value in sums.tolist())

    def __call__(self, found: Tensor, wanted: Tensor) -> Tensor:
        if self.loss is Loss.NATS:
            return self._nats(found, wanted)
        if self.loss is Loss.TOKEN:
            return self._token(found, wanted)
        if self.loss is Loss.BOTH:
            return self.units[0] * self._token(found, wanted) + self.units[1] * self._nats(found, wanted)
        return (found.float() - wanted.float()).square().sum(-1).mean()

    def _nats(self, found: Tensor, wanted: Tensor) -> Tensor:
        return ((found.float() - wanted.float()) @ self.factor).square().sum(-1).mean()

    def _token(self, found: Tensor, wanted: Tensor) -> Tensor:
        wanted = wanted.float()
        return ((found.float() - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-12)).mean()
