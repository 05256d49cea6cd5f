"""Configs of tiny models of many families, as different in build as decoders get."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers as tf
from torch import nn

VOCAB = 128

_IDS: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_PLACES: dict[str, Any] = {**_IDS, "max_position_embeddings": 64}
_DECODER: dict[str, Any] = {
    **_PLACES,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_GROUPED: dict[str, Any] = {**_DECODER, "num_key_value_heads": 2}
_HEADS: dict[str, Any] = {**_GROUPED, "head_dim": 8}
_N: dict[str, Any] = {**_IDS, "n_embd": 32, "n_layer": 2, "n_head": 4}
_MOE: dict[str, Any] = {**_HEADS, "num_experts_per_tok": 2}
_MAMBA: dict[str, Any] = {**_IDS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}

COVERED: Mapping[str, Callable[[], tf.PreTrainedConfig]] = {
    "apertus": lambda: tf.ApertusConfig(**_GROUPED),
    "arcee": lambda: tf.ArceeConfig(**_GROUPED),
    "biogpt": lambda: tf.BioGptConfig(**_DECODER),
    "bitnet": lambda: tf.BitNetConfig(**_GROUPED),
    "bloom": lambda: tf.BloomConfig(**_IDS, hidden_size=32, n_layer=2, n_head=4),
    "codegen": lambda: tf.CodeGenConfig(**_N, n_positions=64, n_ctx=64, rotary_dim=4),
    "cohere": lambda: tf.CohereConfig(**_GROUPED),
    "cohere2": lambda: tf.Cohere2Config(**_GROUPED, sliding_window=4),
    "ernie4_5": lambda: tf.Ernie4_5Config(**_HEADS),
    "exaone4": lambda: tf.Exaone4Config(**_GROUPED, sliding_window=4),
    "falcon": lambda: tf.FalconConfig(**_IDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "falcon_mamba": lambda: tf.FalconMambaConfig(**_MAMBA),
    "gemma": lambda: tf.GemmaConfig(**_HEADS),
    "gemma2": lambda: tf.Gemma2Config(**_HEADS, sliding_window=4),
    "gemma3": lambda: tf.Gemma3TextConfig(**_HEADS, sliding_window=4),
    "gemma3n": lambda: tf.Gemma3nTextConfig(
        **_HEADS,
        num_kv_shared_layers=0,
        layer_types=["full_attention"] * 2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB,
        laurel_rank=4,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0, 0.0],
    ),
    "glm": lambda: tf.GlmConfig(**_HEADS),
    "glm4": lambda: tf.Glm4Config(**_HEADS),
    "gpt2": lambda: tf.GPT2Config(**_N, n_positions=64),
    "gpt_bigcode": lambda: tf.GPTBigCodeConfig(**_N, n_positions=64),
    "gpt_neo": lambda: tf.GPTNeoConfig(
        **_PLACES, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=4
    ),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**_DECODER),
    "gptj": lambda: tf.GPTJConfig(**_N, n_positions=64, rotary_dim=4),
    "granite": lambda: tf.GraniteConfig(**_GROUPED),
    "helium": lambda: tf.HeliumConfig(**_HEADS),
    "llama": lambda: tf.LlamaConfig(**_GROUPED, attention_bias=True, mlp_bias=True),
    "mamba": lambda: tf.MambaConfig(**_MAMBA),
    "mamba2": lambda: tf.Mamba2Config(**_MAMBA, num_heads=4, head_dim=16, n_groups=1, chunk_size=8),
    "mistral": lambda: tf.MistralConfig(**_GROUPED, sliding_window=4),
    "mpt": lambda: tf.MptConfig(vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4, max_seq_len=64, expansion_ratio=2),
    "nemotron": lambda: tf.NemotronConfig(**_GROUPED),
    "olmo": lambda: tf.OlmoConfig(**_DECODER),
    "olmo2": lambda: tf.Olmo2Config(**_GROUPED),
    "opt": lambda: tf.OPTConfig(
        **_PLACES, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=16
    ),
    "persimmon": lambda: tf.PersimmonConfig(**_DECODER),
    "phi": lambda: tf.PhiConfig(**_DECODER),
    "phi3": lambda: tf.Phi3Config(**_GROUPED),
    "qwen2": lambda: tf.Qwen2Config(**_GROUPED, tie_word_embeddings=True),
    "qwen3": lambda: tf.Qwen3Config(**_HEADS),
    "recurrent_gemma": lambda: tf.RecurrentGemmaConfig(
        **_DECODER, lru_width=32, attention_window_size=8, block_types=("recurrent", "attention")
    ),
    "smollm3": lambda: tf.SmolLM3Config(**_GROUPED),
    "stablelm": lambda: tf.StableLmConfig(**_GROUPED),
    "starcoder2": lambda: tf.Starcoder2Config(**_GROUPED),
    "xglm": lambda: tf.XGLMConfig(**_PLACES, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4),
    "lfm2": lambda: tf.Lfm2Config(**_GROUPED, layer_types=["conv", "full_attention"]),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(**_MOE, moe_intermediate_size=16, num_experts=4, mlp_only_layers=[0]),
    "deepseek_v3": lambda: tf.DeepseekV3Config(
        **{**_DECODER, "num_key_value_heads": 4},
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        moe_intermediate_size=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
    ),
    "mixtral": lambda: tf.MixtralConfig(**_MOE, num_local_experts=4),
    "olmoe": lambda: tf.OlmoeConfig(**_MOE, num_experts=4),
    "granitemoe": lambda: tf.GraniteMoeConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "gpt_oss": lambda: tf.GptOssConfig(**_MOE, num_local_experts=4, sliding_window=4),
    "ctrl": lambda: tf.CTRLConfig(vocab_size=VOCAB, n_positions=64, n_embd=32, dff=48, n_layer=2, n_head=4),
    "rwkv": lambda: tf.RwkvConfig(**_IDS, hidden_size=32, num_hidden_layers=2, context_length=64),
    "bamba": lambda: tf.BambaConfig(
        **_GROUPED,
        attn_layer_indices=[1],
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_n_groups=1,
        mamba_d_state=8,
        mamba_chunk_size=8,
    ),
    "jamba": lambda: tf.JambaConfig(
        **_GROUPED,
        num_experts=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
}

REFUSED: Mapping[str, tuple[str, Callable[[], tf.PreTrainedConfig]]] = {
    "openai-gpt": ("A decoder block returns list", lambda: tf.OpenAIGPTConfig(**_N, n_positions=64)),
    "xlnet": (
        "is an encoder here",
        lambda: tf.XLNetConfig(vocab_size=VOCAB, d_model=32, n_layer=2, n_head=4, d_inner=48),
    ),
    "zamba": (
        "use the same weight",
        lambda: tf.ZambaConfig(
            **{**_GROUPED, "num_hidden_layers": 4, "layer_types": ["mamba", "hybrid", "mamba", "hybrid"]},
            mamba_d_state=8,
            n_mamba_heads=1,
            use_mamba_kernels=False,
        ),
    ),
}
"""Families that cannot be compressed: words of the one line that says why, and the config."""


def family_model(name: str, seed: int = 0) -> tf.PreTrainedModel:
    """A tiny model with random weights, large enough to do something, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = tf.AutoModelForCausalLM.from_config(COVERED[name]() if name in COVERED else REFUSED[name][1]())
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.1)
            else:
                parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)
