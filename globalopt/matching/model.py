"""Model matching: train the kept parameters of a whole model to reproduce the predictions of the dense model.

    minimise  mean over positions of KL(dense || compressed)

on calibration text, over kept entries, factors and norms of the whole model, supports fixed. The dense predictions are
stored as their most probable tokens, with all other tokens as one (`kernels.top_kl.Teacher`). This is distillation
(Hinton et al., arXiv:1503.02531) on fixed supports; no paper on sparse plus low-rank layers has this step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from globalopt.kernels.top_kl import Teacher
from globalopt.matching.parameters import Trainable
from globalopt.matching.training import Autocast, Trained, Training, train
from globalopt.models.batch import Batch
from globalopt.models.decoder import token_embedding
from globalopt.models.layers import ModelLayers
from globalopt.models.portions import Portion
from globalopt.registry import read_options
from globalopt.values.decomposition import Decomposition

VERSION = 3
"""Raised whenever matched models change."""


@dataclass(frozen=True)
class Distillation(Training):
    """Set how a whole model is matched: the options of `Training` with other defaults.

    >>> Distillation.read({"rate": "0.01"})
    Distillation(epochs=6, rate=0.01, ... patience=3, ...)
    """

    epochs: int = 6
    rate: float = 0.005
    patience: int = 3
    # What it does to the loss of a whole model was not measured.
    autocast: Autocast = Autocast.OFF

    @classmethod
    def read(cls, options: Mapping[str, str]) -> Distillation:
        """Parse options given as text; errors as for `Matching.read`."""
        return cls(**read_options(cls, "model matching", options))


@torch.no_grad()
def teacher_distributions(model: PreTrainedModel, batches: Sequence[Batch]) -> list[Teacher]:
    """Compute the next-token distributions of the dense `model` on every batch, for `match_model`.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> model, batch = tiny_llama(), Batch(torch.arange(24).reshape(2, 12))
    >>> dense = teacher_distributions(model, [batch])
    >>> dense[0].kl(model(batch.input_ids).logits[:, :-1]).abs().max().item() < 1e-5
    True
    """
    return [Teacher.of(_logits(model, batch, {})) for batch in batches]


def match_model(
    layers: ModelLayers,
    batches: Sequence[Batch],
    dense: Sequence[Teacher],
    values: Mapping[str, Decomposition],
    options: Distillation,
    seed: int,
    checkpoint: Path | None = None,
    advance: Callable[[str], None] = lambda detail: None,
    portion: Portion | None = None,
) -> tuple[Trainable, Trained]:
    """Train the kept parameters of all layers to reproduce the predictions `dense`; the model is not changed.

    Memory: beside the model four times its kept parameters in float32, and the activations of one batch.

    Args:
        dense: next-token distributions of the dense model, by batch.
        values: the decompositions of all layers, by name.
        seed: of the order of the batches.
        checkpoint: file that is written after every epoch, and resumed from if it exists.
        advance: called after every epoch with its loss as text.
        portion: which windows the batches are, where other processes have the others; None: they are all.
    Returns:
        The trained parameters, and the losses before and after.

    >>> from globalopt.models.finding import find_layers
    >>> from globalopt.reference.tiny import tiny_llama
    >>> layers = find_layers(tiny_llama().requires_grad_(False))
    >>> batches = [Batch(torch.arange(i, i + 24).reshape(2, 12)) for i in range(4)]
    >>> dense = teacher_distributions(layers.model, batches)
    >>> pruned = {spec.name: layers.weight(spec.name) for spec in layers.specs}
    >>> pruned = {name: W * (W.abs() > 0.02) for name, W in pruned.items()}
    >>> values = {name: Decomposition(S, S[:, :0], S[:0]) for name, S in pruned.items()}
    >>> trained, found = match_model(layers, batches, dense, values, Distillation(rate=0.02), seed=0)
    >>> found.after < 0.9 * found.before
    True
    """
    trainable = Trainable(layers, values, [""])
    device = token_embedding(layers.model).weight.device

    portion = portion or Portion.all(len(batch.input_ids) for batch in batches)

    def loss_of(number: int) -> Tensor:
        place = portion.place(number)
        if place is None:
            return torch.zeros((), device=device)
        with options.autocast.context(device):
            logits = _logits(layers.model, batches[place], trainable.tensors())
        return dense[place].kl(logits).mean() * portion.weight(number)

    return trainable, train(trainable, loss_of, portion.whole, options, seed, "model", checkpoint, advance)


def _logits(model: PreTrainedModel, batch: Batch, tensors: Mapping[str, Tensor]) -> Tensor:
    """Compute the logits (b, t - 1, vocabulary) of the positions whose next token is in the window.

    Args:
        tensors: parameters that replace those of the model, by name.
    """
    ids = batch.input_ids.to(token_embedding(model).weight.device)
    call = {"input_ids": ids, "use_cache": False}
    return functional_call(model, dict(tensors), (), call).logits[:, :-1]
