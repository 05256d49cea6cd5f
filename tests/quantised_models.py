"""Tiny models whose weights are quantised as published ones are, with the values that they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM

from globalopt.models.checkpoint import SINGLE
from globalopt.models.example import gguf_llama
from tests.tiny_models import tiny_tokenizer

BLOCK = 16
LARGEST = torch.finfo(torch.float8_e4m3fn).max
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def _change(folder: Path, tensors: dict[str, Tensor], quantisation: dict[str, Any]) -> None:
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))


def save_fp8(folder: Path, blocks: bool) -> dict[str, Tensor]:
    """Write a Llama in fp8 with a scale per block of 16 x 16 (as DeepSeek-V3) or per tensor; return its weights."""
    model: Any = gguf_llama().to(torch.bfloat16)  # pyright: ignore[reportArgumentType]
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    found = load_file(folder / SINGLE)
    stored, real = dict(found), dict(found)
    for name in [name for name in found if "proj" in name]:
        rows, columns = found[name].shape
        side = (BLOCK, BLOCK) if blocks else (rows, columns)
        parts = found[name].float().reshape(rows // side[0], side[0], columns // side[1], side[1])
        scales = parts.abs().amax((1, 3)) / LARGEST
        codes = (parts / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        real[name] = (codes.float() * scales[:, None, :, None]).reshape(rows, columns).to(torch.bfloat16)
        stored[name] = codes.reshape(rows, columns)
        stored[f"{name}_scale_inv"] = scales if blocks else scales.squeeze()
    size = [BLOCK, BLOCK] if blocks else None
    scheme = "dynamic" if blocks else "static"
    _change(folder, stored, {"quant_method": "fp8", "activation_scheme": scheme, "weight_block_size": size})
    return real


def save_mxfp4(folder: Path) -> Tensor:
    """Write a gpt-oss whose experts are in mxfp4; return the real weights of the first `down_proj`."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2, "head_dim": 16}
    ids = {"vocab_size": 128, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model: Any = GptOssForCausalLM(GptOssConfig(**sizes, **experts, **ids)).to(torch.bfloat16)  # pyright: ignore
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    stored, generator = load_file(folder / SINGLE), torch.Generator().manual_seed(0)
    for name in [name for name in stored if name.endswith(("gate_up_proj", "experts.down_proj"))]:
        count, inputs, outputs = stored.pop(name).shape
        shape = (count, outputs, inputs // 32)
        stored[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        stored[f"{name}_scales"] = torch.randint(118, 123, shape, generator=generator, dtype=torch.uint8)
    _change(folder, stored, {"quant_method": "mxfp4"})
    first = "model.layers.0.mlp.experts.down_proj"
    codes, scales = stored[f"{first}_blocks"].int(), stored[f"{first}_scales"].int()
    # The lower half of a byte comes first; the highest bit of a half is the sign.
    halves = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
    values = FP4[halves & 7] * (1 - 2 * (halves >> 3)) * 2.0 ** (scales[..., None] - 127)
    return values.flatten(2).transpose(1, 2).to(torch.bfloat16)
