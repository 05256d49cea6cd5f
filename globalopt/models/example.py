"""Write small GGUF files, for examples and tests; needs the package `gguf`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def example_gguf(path: Path = Path("tiny.gguf"), quantisation: str = "Q8_0") -> Path:
    """Write a GGUF file of a tiny Llama with random weights.

    Returns:
        `path`.

    >>> example_gguf().read_bytes()[:4]
    b'GGUF'
    """
    return write_gguf(path, gguf_llama(), quantisation)


def gguf_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Make a tiny Llama whose rows are multiples of 32 long, as the blocks of quantised types ask.

    Args:
        seed: of the weights.
        changes: fields of the config.

    >>> gguf_llama(num_hidden_layers=1).config.num_hidden_layers
    1
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(
        **{**sizes, **ids, "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 128, **changes}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            # Larger than a fresh model's, so that attention is far from uniform and norms are not neutral.
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def write_gguf(path: Path, model: LlamaForCausalLM, quantisation: str = "F16", **fields: Any) -> Path:
    """Write a Llama and a tokenizer of one token per character to a GGUF file, as llama.cpp converts them.

    Args:
        quantisation: a type that `gguf` can write, such as "F32", "F16", "Q8_0" or "Q4_1"; norms stay in float32.
        fields: further metadata by name, with `_` for a dot.
    Returns:
        `path`.

    >>> write_gguf(Path("half.gguf"), gguf_llama()).stat().st_size > 2 * gguf_llama().num_parameters()
    True
    """
    import gguf

    kind, config = gguf.GGMLQuantizationType[quantisation], cast("Any", model.config)
    rotary = config.rope_parameters
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if quantisation == 'F32' else 'MOSTLY'}_{quantisation}"])
    writer.add_name("tiny")
    writer.add_license("mit")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rotary["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    for name, value in fields.items():
        add: Any = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(name.replace("_", "."), value)
    _add_tokenizer(writer, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        stem = names.get_name(name.removesuffix(".weight"))
        if stem is None or (stem == "output" and config.tie_word_embeddings):
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        values = (tensor if heads is None else _interleaved(tensor, heads)).float().numpy()
        if values.ndim == 1:
            writer.add_tensor(f"{stem}.weight", values)
        else:
            writer.add_tensor(f"{stem}.weight", gguf.quantize(values, kind), raw_dtype=kind)
    if rotary["rope_type"] == "llama3":
        from globalopt.models.rotary_factors import FACTORS, llama3_factors

        writer.add_tensor(FACTORS, llama3_factors(config.head_dim, rotary["rope_theta"], rotary["factor"]).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: Any, size: int) -> None:
    """Add special tokens, one that is merged, and characters from the blank on, as byte-level tokenizers spell them."""
    tokens = [*SPECIAL, "th", "Ġ", *(chr(code) for code in range(33, 127))]
    tokens += [f"<{index}>" for index in range(len(tokens), size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens[:size])
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens[:size]])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Order the rows of a projection as llama.cpp does: the two halves of every rotary pair follow each other."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns).contiguous()
