"""Transformer matching: train the parameters of a compressed block to reproduce the outputs of the dense block.

    minimise  mean over tokens of loss(f(x; kept) - y),   y = (1 - share) f_dense(x) + share f_dense(x_dense)

over the kept entries, factors and norms of one block. `x` is the hidden state that the compressed blocks before it
produce, `x_dense` the one that the dense blocks would. Source: 3BASiL, arXiv:2603.01376, section on transformer
matching. Departures from it, all of them options: the norm of the error, steps relative to the size of the tensor they
change, early stopping on held-out windows, and supports that no step can leave (`globalopt.matching.parameters`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from globalopt.errors import UnknownNameError, UsageError
from globalopt.machine import ranks
from globalopt.matching.parameters import Trainable
from globalopt.matching.training import Autocast, Trained, Training, train
from globalopt.models.block_runner import BlockRunner
from globalopt.registry import at_least, read_options
from globalopt.values.decomposition import Decomposition
from globalopt.values.metric import Gram


class Loss(StrEnum):
    """Choose the loss of a token with the error `e` (d,) of its hidden state and the target state `y` (d,).

    `sum`: `|e|²`. `token`: `|e|² / |y|²`. `nats`: `eᵀ A e / 2` with the output Gram `A` (d, d) of the block: the
    second-order estimate of the increase of the model's loss, in nats. `both`: the mean of `token` and `nats`, each
    divided by its initial value. It guards against errors that `nats` does not see: `A` is the curvature at zero error,
    and later blocks may rely on directions in which it is small.

    >>> [loss.value for loss in Loss if loss.weighted]
    ['nats', 'both']
    """

    SUM = "sum"
    TOKEN = "token"
    NATS = "nats"
    BOTH = "both"

    @property
    def weighted(self) -> bool:
        """Tell whether the loss uses the output Gram `A`."""
        return self in (Loss.NATS, Loss.BOTH)


@dataclass(frozen=True)
class Matching(Training):
    """Set how a block is matched: the options of `Training`, and these.

    Args:
        loss: the loss of a token.
        damping: added to the diagonal of `A`, as a share of its mean diagonal.
        share: weight in the target of the dense block's output on the inputs of the dense model, in [0, 1]; the rest is
            its output on the inputs of the compressed model.
    Raises:
        UsageError: an option is out of its range.

    >>> Matching.read({"preset": "tm", "epochs": "3"}).epochs
    3
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
        """Parse options given as text; `preset` chooses the values of the options that are not given.

        Raises:
            UnknownNameError: there is no such preset or option.
            UsageError: a value cannot be parsed, or is out of its range.
        """
        given = dict(options)
        preset = given.pop("preset", "default")
        if preset not in PRESETS:
            raise UnknownNameError("preset of matching", preset, PRESETS)
        return replace(PRESETS[preset], **read_options(cls, "matching", given))


PRESETS = {
    "default": Matching(),
    "tm": Matching(
        epochs=19,
        rate=2e-5,
        floor=0.2,
        relative=False,
        held_out=0.0,
        patience=19,
        autocast=Autocast.OFF,
        loss=Loss.SUM,
        windows=8,
    ),
}
"""`default`, and `tm` as published by 3BASiL; the first of its twenty epochs only evaluates, which leaves 19."""


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
    """Train the kept parameters of block `index` to reproduce `targets`; the model is not changed.

    Several processes share the windows of every step and add up their gradients; all end with the same parameters.

    Args:
        inputs: hidden states (b, t, d) that enter the block, by batch.
        targets: hidden states (b, t, d) that should leave it, by batch.
        values: the decompositions of its layers, by name.
        outputs: output Gram `A` (d, d) of the block, for the losses that use it.
        seed: of the order of the batches.
    Returns:
        The trained parameters, and the losses before and after.
    Raises:
        NumericalError: a loss is not finite.
        UsageError: the loss needs `outputs`, and there are none.

    >>> from globalopt.models.batch import Batch
    >>> from globalopt.models.finding import find_layers
    >>> from globalopt.reference.tiny import tiny_llama
    >>> layers = find_layers(tiny_llama().requires_grad_(False))
    >>> runner = BlockRunner(layers, [Batch(torch.arange(i, i + 24).reshape(2, 12)) for i in range(4)])
    >>> inputs = [runner.first(i) for i in range(4)]
    >>> dense = [runner.run(0, i, inputs[i]) for i in range(4)]
    >>> pruned = {spec.name: layers.weight(spec.name) for spec in layers.of_block(0)}
    >>> pruned = {name: W * (W.abs() > 0.02) for name, W in pruned.items()}
    >>> values = {name: Decomposition(S, S[:, :0], S[:0]) for name, S in pruned.items()}
    >>> trained, found = match_block(runner, 0, inputs, dense, values, Matching(loss=Loss.TOKEN), None, seed=0)
    >>> found.after < 0.9 * found.before
    True
    """
    layers = runner.layers
    root = f"{layers.blocks_path}.{index}"
    trainable = Trainable(layers, values, [root])
    device = layers.module(next(iter(values))).weight.device
    mean_loss = _MeanLoss(options, outputs, device)

    def found_and_target(i: int) -> tuple[Tensor, Tensor]:
        with options.autocast.context(device):
            found = runner.run(index, i, inputs[i], trainable.tensors(f"{root}."))
        batch = runner.batches[i]
        return batch.select(found), batch.select(targets[i]).to(found.device)

    portion = runner.portion

    def loss_of(number: int) -> Tensor:
        place = portion.place(number)
        if place is None:
            return torch.zeros((), device=device)
        return mean_loss(*found_and_target(place)) * portion.weight(number)

    if options.loss is Loss.BOTH:
        with torch.no_grad():
            mean_loss.normalise((found_and_target(i) for i in range(len(runner))), portion.weights, portion.whole)

    return trainable, train(trainable, loss_of, portion.whole, options, seed, f"block {index}")


class _MeanLoss:
    """Compute `mean over tokens of loss(found - target)`.

    Args:
        outputs: output Gram `A` (d, d), for the losses that use it.
    Raises:
        UsageError: the loss needs `outputs`, and there are none.
    """

    def __init__(self, options: Matching, outputs: Gram | None, device: torch.device) -> None:
        self.loss = options.loss
        self.units = (1.0, 1.0)
        if self.loss.weighted:
            if outputs is None:
                raise UsageError(f"Matching with loss={self.loss} needs the output Gram of the block; use loss=token.")
            values, vectors = torch.linalg.eigh(outputs.damped(options.damping).matrix.double())
            # eᵀ A e / 2 as |Fᵀ e|²: one product, and never below zero.
            self.factor = (vectors * (values.clamp_min(0) / 2).sqrt()).float().to(device)

    def normalise(self, pairs: Iterable[tuple[Tensor, Tensor]], weights: Sequence[float], count: int) -> None:
        """Normalise each term of `both` by its initial mean.

        Args:
            pairs: found and target states, by batch.
            weights: the share of each batch that this process has.
            count: the number of batches of all processes.
        """
        terms = torch.stack([torch.stack([self._token(*pair), self._nats(*pair)]) for pair in pairs]).double()
        sums = ranks.total((terms * terms.new_tensor(weights)[:, None]).sum(0)) / count
        # A term that is zero at the start cannot be lowered.
        self.units = tuple(1 / (2 * value) if value > 0 else 0.0 for value in sums.tolist())

    def __call__(self, found: Tensor, target: Tensor) -> Tensor:
        if self.loss is Loss.NATS:
            return self._nats(found, target)
        if self.loss is Loss.TOKEN:
            return self._token(found, target)
        if self.loss is Loss.BOTH:
            return self.units[0] * self._token(found, target) + self.units[1] * self._nats(found, target)
        return (found.float() - target.float()).square().sum(-1).mean()

    def _nats(self, found: Tensor, target: Tensor) -> Tensor:
        """Compute the mean of `eᵀ A e / 2`."""
        return ((found.float() - target.float()) @ self.factor).square().sum(-1).mean()

    def _token(self, found: Tensor, target: Tensor) -> Tensor:
        """Compute the mean of `|e|² / |y|²`."""
        target = target.float()
        return ((found.float() - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)).mean()
