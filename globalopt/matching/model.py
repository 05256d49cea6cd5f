"""Model matching: what a compressed model keeps is trained until the model predicts as the dense one does.

    minimise  mean over positions of KL(dense || compressed)

on calibration text, over kept entries, factors and norms of the whole model, supports fixed. The dense predictions are
kept as their most probable tokens with the rest as one symbol (`kernels.top_kl.Teacher`). Beyond the papers on
sparse plus low-rank layers; it is plain distillation (arXiv:1503.02531) on what they leave.
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
from globalopt.matching.training import Trained, Training, train
from globalopt.models.layers import ModelLayers, token_embedding
from globalopt.models.walk import Batch
from globalopt.registry import read_options
from globalopt.values.decomposition import Decomposition

VERSION = 1
"""Raised whenever matched models change."""


@dataclass(frozen=True)
class Distillation(Training):
    """How a whole model is matched."""

    epochs: int = 6
    rate: float = 0.005
    patience: int = 3

    @classmethod
    def read(cls, options: Mapping[str, str]) -> Distillation:
        """From texts by option."""
        return cls(**read_options(cls, "model matching", options))


@torch.no_grad()
def teachers(model: PreTrainedModel, batches: Sequence[Batch]) -> list[Teacher]:
    """Predictions of the dense `model` on every batch."""
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
) -> tuple[Trainable, Trained]:
    """Train what the layers keep; the model itself is not changed.

    Memory: beside the model four times its kept parameters in float32, and the activations of one batch.

    Args:
        dense: predictions by batch.
        values: all layers as they were fitted or matched.
        checkpoint: where to write after every epoch, and to go on from.
    """
    trainable = Trainable(layers, values, [""])
    device = token_embedding(layers.model).weight.device

    def loss_of(i: int) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=options.autocast):
            logits = _logits(layers.model, batches[i], trainable.tensors())
        return dense[i].kl(logits).mean()

    return trainable, train(trainable, loss_of, len(batches), options, seed, "model", checkpoint, advance)


def _logits(model: PreTrainedModel, batch: Batch, tensors: Mapping[str, Tensor]) -> Tensor:
    """(b, t - 1, vocabulary) of the positions whose next token is in the window."""
    ids = batch.input_ids.to(token_embedding(model).weight.device)
    call = {"input_ids": ids, "use_cache": False}
    return functional_call(model, dict(tensors), (), call).logits[:, :-1]
