"""Tiny causal language models, made from configs, one for every way a decoder is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from globalopt.models.finding import find_layers
from globalopt.models.layers import ModelLayers

VOCAB = 128
BLOCKS = 2

_SPECIAL_IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SHARED: dict[str, Any] = {"vocab_size": VOCAB, "max_position_embeddings": 128, **_SPECIAL_IDS}
_DECODER: dict[str, Any] = {
    **_SHARED,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
}
_GROUPED_QUERY: dict[str, Any] = {**_DECODER, "num_key_value_heads": 2}

_HEAD_DIM = {**_GROUPED_QUERY, "head_dim": 8}

_CONFIGS: Mapping[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_GROUPED_QUERY),
    "qwen2": lambda: Qwen2Config(**_GROUPED_QUERY),
    "qwen3": lambda: Qwen3Config(**_HEAD_DIM),
    "mistral": lambda: MistralConfig(**_GROUPED_QUERY, sliding_window=4),
    "gemma2": lambda: Gemma2Config(
        **_HEAD_DIM,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_positions=128, n_embd=32, n_layer=BLOCKS, n_head=4, n_inner=64, **_SPECIAL_IDS
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**_DECODER, use_parallel_residual=True),
    "opt": lambda: OPTConfig(
        **_SHARED, hidden_size=32, ffn_dim=48, num_hidden_layers=BLOCKS, num_attention_heads=4, word_embed_proj_dim=32
    ),
    "phi3": lambda: Phi3Config(**_GROUPED_QUERY),
    "qwen3_moe": lambda: Qwen3MoeConfig(**_HEAD_DIM, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2),
}

KINDS = tuple(_CONFIGS)
COVERED_KINDS = tuple(kind for kind in KINDS if kind != "qwen3_moe")
# The soft cap of Gemma 2 is not available under sdpa.
SDPA_KINDS = tuple(kind for kind in KINDS if kind != "gemma2")


def tiny_model(kind: str, seed: int = 0) -> PreTrainedModel:
    """A model of architecture `kind` (one of `KINDS`) in float32 and eval mode, frozen.

    Weights are larger than a fresh model's, so that attention is far from uniform, and biases and norms are not at
    their neutral values: a mistake in any of them then shows in the logits.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(_CONFIGS[kind]())
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.25)
            else:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def tiny_tokenizer(vocab: int = VOCAB) -> PreTrainedTokenizerFast:
    """One token per printable ASCII character, as many as `vocab` has room for; anything else is `<unk>`."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    characters = [*"\n abcdefghijklmnopqrstuvwxyz.,ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"]
    characters += [chr(code) for code in range(33, 127) if chr(code) not in characters]
    ids = {token: index for index, token in enumerate((special + characters)[:vocab])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def save_tiny(folder: str | Path, kind: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Write a tiny model and its tokenizer as a Hugging Face folder, and return the folder."""
    tiny_model(kind, seed).to(dtype).save_pretrained(folder)  # pyright: ignore[reportArgumentType]
    tiny_tokenizer().save_pretrained(folder)
    return Path(folder)


def tiny_ids(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """(batch, tokens) random token ids without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCAB, (batch, tokens), generator=generator)


def padded_ids(tokens: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Two windows, one padded on the left and one on the right, and their mask."""
    ids = tiny_ids(2, tokens)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[1, 8:] = 0
    return ids, mask


def tiny_layers(kind: str, attention: str | None = None) -> ModelLayers:
    """The layers of a tiny model, which computes by the `attention` that is asked for."""
    model = tiny_model(kind)
    if attention is not None:
        model.set_attn_implementation(attention)
    return find_layers(model, allow_low_coverage=True)


def parameter_count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
