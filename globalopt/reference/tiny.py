"""Build a random Llama of a few thousand weights, for examples and quick trials."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def tiny_llama(seed: int = 0, blocks: int = 2) -> PreTrainedModel:
    """Build a Llama with random weights: width 16, two heads, 24 channels, a vocabulary of 64, in evaluation mode.

    Its predictions are of no use, but every stage runs on it within milliseconds.

    Args:
        seed: of the weights.
        blocks: decoder blocks, each of seven linear layers.

    >>> model = tiny_llama()
    >>> sum(parameter.numel() for parameter in model.parameters())
    6480
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=blocks,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()
