"""Treat alike the modules that are linear layers, `nn.Linear` and GPT-2's `Conv1D`."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Linear = nn.Linear | Conv1D
"""Modules that are compressed: `Conv1D` is the linear layer of GPT-2, with its weight transposed."""


def as_linear(module: Linear) -> Tensor:
    """View the weight of a module as (d_out, d_in).

    >>> as_linear(Conv1D(nf=2, nx=3)).shape, as_linear(nn.Linear(3, 2)).shape
    (torch.Size([2, 3]), torch.Size([2, 3]))
    """
    weight = module.weight.detach()
    return weight.mT if isinstance(module, Conv1D) else weight
