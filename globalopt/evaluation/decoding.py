"""Go on with prompts token by token, reading every token once where a model keeps a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from globalopt.evaluation.logits import takes

CACHE_NAMES = ("cache", "past_key_values")
"""Argument of a model that takes its cache, and field of the output that holds it, the newer name first."""


def likeliest(logits: Tensor) -> Tensor:
    """Choose the token of the greatest logit: (n, vocabulary) to (n,).

    >>> likeliest(torch.tensor([[0.1, 0.7, 0.2]]))
    tensor([1])
    """
    return logits.argmax(-1)


@torch.no_grad()
def continued(
    model: PreTrainedModel, prompts: Tensor, new: int, choose: Callable[[Tensor], Tensor] = likeliest
) -> Tensor:
    """Continue `prompts` (n, t) by `new` tokens: (n, new) token ids on the CPU, past any end-of-text token.

    Keys and values of earlier tokens are cached where the model is a class of transformers that returns a cache of
    them; other models (code that came with a checkpoint, recurrent models) read all tokens again for each new one.

    Args:
        choose: the next token of every row (n,) from its logits (n, vocabulary); called `new` times.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> continued(tiny_llama(), torch.tensor([[1, 2, 3], [4, 5, 6]]), new=4).shape
    torch.Size([2, 4])
    """
    ids = prompts.to(model.device)
    name = next((each for each in CACHE_NAMES if takes(model, each)), None)
    last: dict[str, Any] = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}
    cache: Cache | None = None
    for _ in range(new):
        given = {} if cache is None or name is None else {name: cache}
        output = model(input_ids=ids[:, -1:] if given else ids, use_cache=name is not None, **given, **last)
        found = None if name is None else getattr(output, name, None)
        cache = found if isinstance(found, Cache) else None
        token = choose(output.logits[:, -1])
        ids = torch.cat([ids, token[:, None].to(ids.device)], 1)
    return ids[:, prompts.shape[1] :].cpu()
