"""The loss of a compressed model, and the share of every layer in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Attribution:
    """Hold the loss of a model all of whose layers are replaced, and the share of every layer in it.

    Args:
        losses: (windows,) float64, KL to the dense model in nats per token.
        shares: by layer name, (windows,) float64; their sum over layers is about the loss, and noise may make some
            negative.

    >>> import torch
    >>> Attribution(torch.ones(2), {"up": torch.tensor([0.5, 0.7])}).losses.mean()
    tensor(1.)
    """

    losses: Tensor
    shares: Mapping[str, Tensor]
