"""Find the rotary embeddings of a GGUF file, which transformers reads as unscaled ones whatever the file says.

Llama 3.1 and its successors divide low frequencies by a factor. A config says so in four numbers, a GGUF file in a
tensor with the factor of every frequency.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from globalopt.errors import UnsupportedModelError

FACTORS = "rope_freqs.weight"
"""Name of the tensor of factors."""

_LLAMA3: Mapping[str, Any] = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_ORIGINAL = 8192
"""Length of the texts that all Llamas of this kind were first trained on."""
_SCALED = ("linear", "yarn", "longrope")


def rotary_parameters(
    source: str, config: Any, fields: Mapping[str, Any], factors: Tensor | None
) -> dict[str, Any] | None:
    """Make the `rope_parameters` of a config from what a GGUF file says; None where the config has them already.

    Args:
        source: the file, for the message.
        config: as transformers reads it from the file.
        fields: metadata of the file.
        factors: (head size / 2,) by which frequencies are divided, or None.
    Raises:
        UnsupportedModelError: the embeddings are scaled in another way than Llama's.

    >>> from transformers import LlamaConfig
    >>> config = LlamaConfig(hidden_size=64, num_attention_heads=1)
    >>> factors = llama3_factors(64, config.rope_parameters["rope_theta"], factor=8.0)
    >>> rotary_parameters("llama.gguf", config, {}, factors)["factor"]
    8.0
    """
    found = getattr(config, "rope_parameters", None) or {}
    # Models with two kinds of attention have parameters of each.
    each = [one for one in found.values() if isinstance(one, dict)] or [found]
    if any(one.get("rope_type", "default") != "default" for one in each):
        return None
    kind = fields.get(f"{fields.get('general.architecture')}.rope.scaling.type", "none")
    if kind in _SCALED:
        raise UnsupportedModelError(
            f"{source} scales its rotary embeddings ({kind}), which transformers does not read from a GGUF file. Use "
            "the model that it was made from."
        )
    if factors is None or bool((factors == 1).all()):
        return None
    theta, factor = float(found.get("rope_theta", 1e4)), round(float(factors.max()), 4)
    expected = llama3_factors(2 * len(factors), theta, factor)
    if not torch.allclose(factors.float(), expected, rtol=1e-3):
        raise UnsupportedModelError(
            f"{source} scales its rotary embeddings by factors ({FACTORS}) that are not those of Llama 3.1 and its "
            "successors, which no config can say. Use the model that it was made from."
        )
    return {**_LLAMA3, "rope_theta": theta, "factor": factor, "original_max_position_embeddings": _ORIGINAL}


def llama3_factors(size: int, theta: float, factor: float) -> Tensor:
    """Compute by what Llama 3.1 divides every frequency.

    Args:
        size: of a head.
        theta: base of the frequencies.
        factor: of the lowest frequencies; the highest have 1, and those between go from one to the other.
    Returns:
        (size / 2,) float32.

    >>> llama3_factors(64, 5e5, 32.0)[[0, -1]]
    tensor([ 1., 32.])
    """
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    lengths = 2 * math.pi * theta ** (torch.arange(0, size, 2).double() / size)
    share = ((_ORIGINAL / lengths - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - share) / factor + share)).float()
