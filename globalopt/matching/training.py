"""Train the kept parameters of a compressed model by Adam, with early stopping on held-out windows."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch
from torch import Tensor

from globalopt.errors import ArtefactError, NumericalError
from globalopt.kernels.precision import RoughLinear
from globalopt.machine import ranks
from globalopt.matching.parameters import Trainable
from globalopt.registry import at_least
from globalopt.runs.files import read_tensors, write_tensors

BACK_OFF = 0.1
"""Factor on the step size after an epoch that did not lower the held-out loss."""


class Autocast(StrEnum):
    """Choose whether gradients are computed by products in bfloat16: `auto`, `on` or `off`.

    Parameters and sums stay in float32, and so do the losses that decide which epoch is kept: the error of a block is
    a small difference of large outputs. `auto` is on for large linear layers on a CPU with instructions for such
    products (`RoughLinear`), `on` is the autocast of torch, on any device.

    >>> with torch.enable_grad(), Autocast("on").context(torch.device("cpu")):
    ...     product = torch.ones(2, 2) @ torch.ones(2, 2)
    >>> product.dtype
    torch.bfloat16
    """

    AUTO = "auto"
    ON = "on"
    OFF = "off"

    def context(self, device: torch.device) -> AbstractContextManager[object]:
        """Return the context manager in which a forward pass on `device` multiplies as chosen."""
        if self is Autocast.AUTO:
            return RoughLinear(torch.is_grad_enabled())
        return torch.autocast(device.type, torch.bfloat16, enabled=self is Autocast.ON and torch.is_grad_enabled())


@dataclass(frozen=True)
class Training:
    """Set how parameters are trained.

    An epoch after which the loss on held-out windows is no lower than the best so far is refused: it is undone, with
    Adam's moments, and the step size falls by `BACK_OFF`.

    Args:
        epochs: passes over the calibration windows at most.
        rate: first step size of Adam; it falls along half a cosine.
        floor: last step size, as a share of the first.
        relative: steps are in units of the root mean square of the tensor they change, else absolute.
        held_out: share of the batches that is not trained on and decides which epoch is kept; 0 keeps the last.
        patience: refused epochs in a row after which training ends.
        windows: calibration windows per step, at most as many as `--batch-size`.
        autocast: whether gradients are computed in bfloat16: auto (where a CPU is faster at it), on or off.
    Raises:
        UsageError: an option is out of its range.

    >>> Training(epochs=0)
    Traceback (most recent call last):
    globalopt.errors.UsageError: Option epochs must be finite and at least 1; got 0.
    """

    epochs: int = 4
    rate: float = 0.01
    floor: float = 0.1
    relative: bool = True
    held_out: float = 0.125
    patience: int = 2
    windows: int = 2
    autocast: Autocast = Autocast.AUTO

    def __post_init__(self) -> None:
        at_least(1, epochs=self.epochs, patience=self.patience, windows=self.windows)
        at_least(0, rate=self.rate, floor=self.floor, held_out=self.held_out)


@dataclass(frozen=True)
class Trained:
    """Report a training.

    Args:
        before, after: mean losses, on held-out batches where there are any, else on all.
        epochs: how many were done.
        kept_epoch: the one whose parameters were kept; 0 is the start.

    >>> Trained(before=0.5, after=0.2, epochs=4, kept_epoch=3).after
    0.2
    """

    before: float
    after: float
    epochs: int
    kept_epoch: int


def train(
    trainable: Trainable,
    loss_of: Callable[[int], Tensor],
    batches: int,
    options: Training,
    seed: int,
    where: str,
    checkpoint: Path | None = None,
    advance: Callable[[str], None] = lambda detail: None,
) -> Trained:
    """Minimise the mean of `loss_of(i)` over the batches `i`, and set the parameters to those of the best epoch.

    The start counts as epoch 0, so that the loss of held-out batches never rises. At least one batch is trained on.
    Several processes add up their losses and gradients, and so take the same steps.

    Args:
        trainable: the parameters, which are changed in place.
        loss_of: loss of a batch, differentiable in the parameters; with several processes the part of this one, or a
            zero that is not differentiable.
        batches: how many there are.
        seed: of the order of the batches.
        where: what is trained, for messages.
        checkpoint: file that is written after every epoch; a later call resumes from it and ends with the same bits.
        advance: called after every epoch with its loss as text.
    Raises:
        ArtefactError: the checkpoint is of another training.
        NumericalError: a loss is not finite.

    >>> from globalopt.models.finding import find_layers
    >>> from globalopt.reference.tiny import tiny_llama
    >>> trainable = Trainable(find_layers(tiny_llama()), {}, ["model.norm"])
    >>> (norm,) = trainable.parameters()
    >>> found = train(trainable, lambda i: (norm - 1.5).square().mean(), 8, Training(rate=0.1), seed=0, where="a norm")
    >>> found.before, round(found.after, 2), found.kept_epoch
    (0.25, 0.0, 4)
    """
    held = min(batches - 1, math.ceil(options.held_out * batches))
    judged = range(batches - held, batches) if held else range(batches)
    parameters = trainable.parameters()
    units = trainable.units() if options.relative else [1.0] * len(parameters)
    adam = torch.optim.Adam([{"params": [p]} for p in parameters])

    def finite(loss: float) -> float:
        if not math.isfinite(loss):
            raise NumericalError(f"Training of {where}: the loss is {loss}. Lower its rate, or leave it out.")
        return loss

    @torch.no_grad()
    def judge() -> float:
        return finite(float(ranks.total(torch.stack([loss_of(i).double() for i in judged])).mean()))

    progress = _Progress(trainable, adam)
    if checkpoint is None or not ranks.told(checkpoint.exists()) or not progress.read(checkpoint):
        progress.start(judge())
    steps = options.epochs * (batches - held)
    step = progress.epoch * (batches - held)
    while progress.epoch < options.epochs and progress.refused < options.patience:
        epoch = progress.epoch + 1
        # A generator of its own for every epoch: its order does not depend on where a run was resumed.
        order = random.Random(f"{seed} {epoch}").sample(range(batches - held), batches - held)
        seen = []
        for i in order:
            cosine = (1 + math.cos(math.pi * step / steps)) / 2
            rate = progress.scale * options.rate * (options.floor + (1 - options.floor) * cosine)
            for group, unit in zip(adam.param_groups, units, strict=True):
                group["lr"] = rate * unit
            adam.zero_grad()
            with torch.enable_grad():
                loss = loss_of(i)
                if loss.requires_grad:
                    loss.backward()
            for parameter in parameters:
                if parameter.grad is None:
                    # An expert that no token of the batch was routed to.
                    parameter.grad = torch.zeros_like(parameter)
            ranks.total_of_all([parameter.grad for parameter in parameters if parameter.grad is not None])
            seen.append(loss.detach().double())
            adam.step()
            step += 1
        # Where every epoch is kept, the mean loss of its steps is enough for all but the last.
        loss = judge() if held or epoch == options.epochs else finite(float(ranks.total(torch.stack(seen)).mean()))
        progress.tell(epoch, loss, accept=not held or loss < progress.best)
        if checkpoint is not None and ranks.writer():
            progress.write(checkpoint)
        advance(f"{where}, epoch {epoch}: {loss:.4g}")
    trainable.restore(progress.kept)
    return Trained(progress.before, progress.best, progress.epoch, progress.kept_epoch)


class _Progress:
    """Hold the state of a training: its parameters, Adam's moments, and the best parameters so far."""

    COUNTERS = ("epoch", "before", "best", "kept_epoch", "refused", "scale")

    def __init__(self, trainable: Trainable, adam: torch.optim.Adam) -> None:
        self._trainable = trainable
        self._adam = adam
        self.epoch = self.kept_epoch = self.refused = 0
        self.scale = 1.0
        self.before = self.best = math.nan
        self.kept: list[Tensor] = []

    def start(self, loss: float) -> None:
        """Keep the parameters at the start, with their loss, as epoch 0."""
        self.before = self.best = loss
        self.kept = self._trainable.state()

    def tell(self, epoch: int, loss: float, accept: bool) -> None:
        """Accept the parameters of an epoch as the best, or undo it, reset Adam's moments and reduce the step size.

        Moments of refused steps would lead the next ones the same way.
        """
        self.epoch = epoch
        if accept:
            self.best, self.kept, self.kept_epoch, self.refused = loss, self._trainable.state(), epoch, 0
        else:
            self._trainable.restore(self.kept)
            for state in self._adam.state.values():
                for moment in state.values():
                    moment.zero_()
            self.refused += 1
            self.scale *= BACK_OFF

    def write(self, path: Path) -> None:
        """Write the state as tensors, with the counters as metadata."""
        tensors = {}
        for k, (parameter, kept) in enumerate(zip(self._trainable.parameters(), self.kept, strict=True)):
            state = self._adam.state[parameter]
            parts = {"now": parameter, "kept": kept, "first": state["exp_avg"], "second": state["exp_avg_sq"]}
            tensors.update({f"{part}:{k}": tensor for part, tensor in parts.items()})
            tensors[f"step:{k}"] = state["step"]
        write_tensors(path, tensors, {name: getattr(self, name) for name in self.COUNTERS})

    @torch.no_grad()
    def read(self, path: Path) -> bool:
        """Restore a written state and return True; False if there is none, `ArtefactError` if it does not fit."""
        if not path.exists():
            return False
        tensors, counters = read_tensors(path)
        count = len(self._trainable.parameters())
        wanted = {f"{part}:{k}" for part in ("now", "kept", "first", "second", "step") for k in range(count)}
        if set(tensors) != wanted or not set(self.COUNTERS) <= counters.keys():
            raise ArtefactError(f"{path} is of another training. Delete it and run the same command again.")
        for name in self.COUNTERS:
            setattr(self, name, counters[name])
        self.kept = []
        for k, parameter in enumerate(self._trainable.parameters()):
            parameter.copy_(tensors[f"now:{k}"])
            self.kept.append(tensors[f"kept:{k}"].to(parameter.device))
            self._adam.state[parameter] = {
                "step": tensors[f"step:{k}"],
                "exp_avg": tensors[f"first:{k}"].to(parameter.device),
                "exp_avg_sq": tensors[f"second:{k}"].to(parameter.device),
            }
        return True
