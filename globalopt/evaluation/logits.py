"""Compute the logits of a batch of windows a few positions at a time, after one pass through the blocks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from globalopt.models.hooks import stand_ins


def takes(model: PreTrainedModel, argument: str) -> bool:
    """Tell whether a model of a class of transformers takes an argument; code of a checkpoint is not relied upon.

    Such code is often written for another version of transformers, where the same word meant something else.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> takes(tiny_llama(), "logits_to_keep"), takes(tiny_llama(), "encoder_outputs")
    (True, False)
    """
    own = type(model).__module__.startswith("transformers.")
    return own and argument in inspect.signature(model.forward).parameters


def in_parts(model: PreTrainedModel) -> bool:
    """Tell whether `logits_at` computes the logits of some positions without those of all others.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> in_parts(tiny_llama())
    True
    """
    return takes(model, "logits_to_keep") and model.base_model is not model


def logits_at(model: PreTrainedModel, ids: Tensor) -> Callable[[slice], Tensor]:
    """Return a function from positions to their logits (b, positions, vocabulary).

    The part of the model below its head runs once, in the first call; the model's own forward pass does the rest, on
    the positions asked for. Where a model has no such part, or no argument for positions, all logits are held.

    Args:
        ids: (b, t) token ids.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> model, ids = tiny_llama(), torch.arange(24).reshape(2, 12)
    >>> logits = logits_at(model, ids)
    >>> torch.allclose(torch.cat([logits(slice(0, 5)), logits(slice(5, 12))], 1), model(ids).logits, atol=1e-6)
    True
    """
    here = ids.to(model.device)
    every: list[Tensor] = []

    def whole(positions: slice) -> Tensor:
        if not every:
            every.append(model(input_ids=here, use_cache=False).logits)
        return every[0][:, positions]

    if not in_parts(model):
        return whole
    base: Any = model.base_model
    below, outputs = base.forward, []

    def once(*args: Any, **kwargs: Any) -> Any:
        if not outputs:
            outputs.append(below(*args, **kwargs))
        return outputs[0]

    def part(positions: slice) -> Tensor:
        wanted = torch.arange(here.shape[1], device=here.device)[positions]
        if not every:
            with stand_ins([base], lambda _: once):
                found = model(input_ids=here, use_cache=False, logits_to_keep=wanted).logits
            if outputs and found.shape[1] == len(wanted):
                return found
        # The head reads something else than the output of the base model, or takes no list of positions.
        outputs.clear()
        return whole(positions)

    return part
