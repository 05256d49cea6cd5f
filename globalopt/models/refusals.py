"""Refuse checkpoints that would be read wrongly: quantised, incomplete, ambiguous, or of a model that is not causal.

transformers loads many of these without an error: it ignores tensors that the class has no place for, and reads a
causal class out of an encoder or out of one half of an image-text model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from globalopt.errors import ArtefactError, UnsupportedModelError, one_line
from globalopt.models.checkpoint import INDEX, SINGLE, Checkpoint

PACKED_METHOD = "globalopt"
"""The `quant_method` of our own packed exports, the one kind of quantised weights that can be read."""
GGUF_METHOD = "gguf"
"""The method in the config of a model that transformers has read from a GGUF file."""
DEQUANTISED = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}
"""Methods that transformers dequantises without further packages or devices, with its class of their options."""
ADAPTER_CONFIG = "adapter_config.json"
"""File that marks the folder of a PEFT adapter."""
PICKLED = "pytorch_model.bin"
"""File of a checkpoint that is not in safetensors; its index has the same name and the suffix `.index.json`."""

_PLAIN = ("F64", "F32", "F16", "BF16", "BOOL", "C64")
_SIDE_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")
_NOT_CAUSAL = re.compile(r"For(Masked(LM|Generation)|PreTraining|\w*Classification|QuestionAnswering|MultipleChoice)$")
_TOWERS = ("vision", "visual", "image", "audio", "video", "speech", "vq")
_SHOWN = 3


def check_config(source: str, config: Any) -> None:
    """Refuse a config of a quantised model, of an encoder-decoder, or of an encoder.

    Args:
        source: folder or hub id, for the message.
        config: of transformers.

    Raises:
        UnsupportedModelError: names the kind and the way out.

    >>> from transformers import T5Config
    >>> check_config("t5", T5Config())
    Traceback (most recent call last):
        ...
    globalopt.errors.UnsupportedModelError: t5 is an encoder-decoder (sequence-to-sequence) model of type t5; ...
    """
    method = quantisation(config)
    if method is not None and method != PACKED_METHOD:
        raise UnsupportedModelError(f"{source} is quantised ({method}). {_way_out(method)}")
    kind = f"of type {config.model_type}"
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{source} is an encoder-decoder (sequence-to-sequence) model {kind}; only decoder-only causal language "
            "models can be compressed."
        )
    names = [name for name in getattr(config, "architectures", None) or () if _NOT_CAUSAL.search(str(name))]
    # Some decoders (GPT-2) were published as their class for pre-training; only an encoder says it is no decoder.
    pretrained = names and names[0].endswith("ForPreTraining") and getattr(config, "is_decoder", None) is not False
    if names and not pretrained and not getattr(config, "is_decoder", False):
        raise UnsupportedModelError(
            f"{source} is a {names[0]} {kind}, which is no causal language model (an encoder sees the tokens that "
            "follow); only decoder-only causal language models can be compressed."
        )


_DEQUANTISE = (
    "Its weights cannot be compressed as they are; use the model that it was made from, or dequantise this one to "
    "bfloat16 and save it."
)

_WAYS = {
    "gptq": "transformers cannot dequantise these weights; use the model that it was made from.",
    "awq": "transformers cannot dequantise these weights; use the model that it was made from.",
    "bitsandbytes": "Use the model that it was made from, or dequantise this one where bitsandbytes is installed: "
    "model.dequantize() of transformers, then save_pretrained().",
    "compressed-tensors": "Use the model that it was made from, or dequantise this one where compressed-tensors is "
    "installed: from_pretrained(..., quantization_config=CompressedTensorsConfig(dequantize=True)) of transformers, "
    "then save_pretrained().",
}
"""What to do with a model by how it is quantised, where that is more than `_DEQUANTISE`."""


def _way_out(method: str) -> str:
    """Say what to do with a model that is quantised by `method`."""
    if method in DEQUANTISED:
        return (
            f"Give its folder or hub id to a command, which dequantises it first, or load it with quantization_config="
            f"{DEQUANTISED[method]}(dequantize=True)."
        )
    return _WAYS.get(method, _DEQUANTISE)


def quantisation(config: Any) -> str | None:
    """Return the method by which the weights of a config, or of a part of it, are quantised; None if they are not.

    >>> from transformers import LlamaConfig
    >>> quantisation(LlamaConfig(quantization_config={"quant_method": "gptq", "bits": 4}))
    'gptq'
    """
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ())]
    for part in parts:
        for field in ("quantization_config", "quantization", "compression_config", "quant_config"):
            found = part.get(field) if isinstance(part, Mapping) else getattr(part, field, None)
            if found:
                values = found if isinstance(found, Mapping) else getattr(found, "__dict__", {})
                method = values.get("quant_method") or values.get("quant_algo") or values.get("mode") or field
                return str(getattr(method, "value", method))
    return None


def without_quantisation(config: Any) -> Any:
    """Remove from a config, and from the parts of it, how the weights are quantised; return the config.

    >>> from transformers import LlamaConfig
    >>> config = without_quantisation(LlamaConfig(quantization_config={"quant_method": "fp8"}))
    >>> quantisation(config) is None
    True
    """
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ())):
        for field in ("quantization_config", "_pre_quantization_dtype"):
            if hasattr(part, field):
                delattr(part, field)
    return config


def check_folder(folder: Path) -> None:
    """Refuse a folder whose weights are ambiguous, quantised by a file beside them, or cannot be read at all.

    Raises:
        ArtefactError: an adapter or a second checkpoint lies beside the weights, or a weight file is none.
        UnsupportedModelError: a file of a quantiser lies beside the weights.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> tiny_llama().save_pretrained("tiny")
    >>> _ = Path("tiny/adapter_config.json").write_text("{}")
    >>> check_folder(Path("tiny"))
    Traceback (most recent call last):
        ...
    globalopt.errors.ArtefactError: tiny holds an adapter (adapter_config.json) beside its weights; ...
    """
    if (folder / ADAPTER_CONFIG).is_file():
        raise ArtefactError(
            f"{folder} holds an adapter ({ADAPTER_CONFIG}) beside its weights; move the adapter's files away if it is "
            "merged into the weights, or merge it first."
        )
    for name in _SIDE_FILES:
        if (folder / name).is_file():
            raise UnsupportedModelError(f"{folder} is quantised (it has a {name}). {_DEQUANTISE}")


def suspicious(types: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, str]:
    """Select the tensors that look like quantised weights: 8-bit floats of any shape, integers of two or more axes.

    Args:
        types: dtype (as safetensors writes it) and shape of every tensor by name.

    Returns:
        dtypes by name.

    >>> suspicious({"a.weight": ("F8_E4M3", (4, 4)), "b.qweight": ("I32", (4, 4)), "c.weight": ("BF16", (4, 4))})
    {'a.weight': 'F8_E4M3', 'b.qweight': 'I32'}
    """
    return {
        name: dtype
        for name, (dtype, shape) in types.items()
        if dtype not in _PLAIN and (dtype.startswith("F") or len(shape) > 1)
    }


def check_types(source: str, found: Mapping[str, str], model: PreTrainedModel) -> None:
    """Refuse tensors that look like quantised weights unless the model has an integer tensor of that name.

    Args:
        found: of `suspicious`.
        model: of the checkpoint; its parameters may be on the meta device.

    Raises:
        UnsupportedModelError: names the first tensor.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> check_types("tiny", {}, tiny_llama())
    >>> check_types("tiny", {"model.norm.weight": "F8_E4M3"}, tiny_llama())
    Traceback (most recent call last):
        ...
    globalopt.errors.UnsupportedModelError: tiny is quantised: its tensor model.norm.weight is stored as F8_E4M3. ...
    """
    own = {name for name, tensor in model.state_dict().items() if not tensor.is_floating_point()}
    ignored = ignorable(model)
    left = sorted(name for name in found if name not in own and not (ignored and ignored.search(name)))
    if left:
        raise UnsupportedModelError(
            f"{source} is quantised: its tensor {left[0]} is stored as {found[left[0]]}. {_DEQUANTISE}"
        )


def stored_types(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Read the dtype and shape of every tensor of a model folder, without its values.

    Raises:
        ArtefactError: a file is missing, broken, or no checkpoint.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> tiny_llama().save_pretrained("tiny")
    >>> stored_types(Path("tiny"))["model.norm.weight"]
    ('F32', (16,))
    """
    if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
        return Checkpoint(folder).types()
    return {name: entry for path in _pickles(folder) for name, entry in _pickled_types(path).items()}


def _pickles(folder: Path) -> list[Path]:
    """List the pickled weight files of a folder, one or as many as the index names; empty if there are none."""
    if (folder / PICKLED).is_file():
        return [folder / PICKLED]
    index = folder / f"{PICKLED}.index.json"
    if not index.is_file():
        return []
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [folder / str(name) for name in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ArtefactError(f"{index} is no index of weights; fetch it again.") from None
    for path in files:
        if not path.is_file():
            raise ArtefactError(f"{folder} lacks the file {path.name} that its index names. Fetch it again.")
    return files


def _pickled_types(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Read names, dtypes and shapes from a pickled checkpoint, with its values left on the disk."""
    try:
        with path.open("rb") as file:
            pointer = file.read(40).startswith(b"version https://git-lfs")
        if pointer:
            raise ArtefactError(f"{path} is a Git LFS pointer and no checkpoint; fetch the file itself (git lfs pull).")
        found: Any = torch.load(path, map_location="meta", weights_only=True)
    except (ArtefactError, MemoryError):
        raise
    # The unpickler raises errors of any kind for what is no pickle, or for one with objects that are no tensors.
    except Exception as cause:
        reason = one_line(cause, 120)
        raise ArtefactError(f"{path} is no checkpoint that torch can read ({reason}). Fetch it again.") from cause
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ArtefactError(f"{path} holds other things than tensors by name; it is no checkpoint of a model.")
    return {str(name): (_NAMES.get(value.dtype, str(value.dtype)), tuple(value.shape)) for name, value in found.items()}


_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
}


def ignorable(model: PreTrainedModel) -> re.Pattern[str] | None:
    """Compile the names of tensors that the class of a model declares it does not need; None if there are none.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> bool(ignorable(tiny_llama()).search("model.layers.0.self_attn.rotary_emb.inv_freq"))
    True
    """
    patterns = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    # Buffers that older versions of transformers saved in every checkpoint.
    patterns |= {r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.masked_bias$"}
    return re.compile("|".join(f"({pattern})" for pattern in sorted(patterns)))


def check_unused(source: str, model: PreTrainedModel, names: Iterable[str]) -> tuple[str, ...]:
    """Refuse tensors of a checkpoint that the model has no place for, unless its class declares them ignorable.

    Args:
        source: folder or hub id, for the message.
        names: of the tensors without a place.

    Returns:
        Names of trained tensors (`*.weight`) that the class declares ignorable and that a saved copy will lack, such as
        those of a layer for multi-token prediction.

    Raises:
        UnsupportedModelError: names the first tensors.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> check_unused("tiny", tiny_llama(), ["model.rotary_emb.inv_freq"])
    ()
    >>> check_unused("tiny", tiny_llama(), ["model.layers.2.eh_proj.weight"])
    Traceback (most recent call last):
        ...
    globalopt.errors.UnsupportedModelError: LlamaForCausalLM does not use 1 tensor of the checkpoint: ...
    """
    names, pattern = sorted(names), ignorable(model)
    declared = [name for name in names if pattern and pattern.search(name)]
    if left := sorted(set(names) - set(declared)):
        raise UnsupportedModelError(
            f"{type(model).__name__} does not use {listed(left)}. They would be lost or the weights misread; remove "
            "them from the checkpoint, or load it with the class it was saved from."
        )
    lost = tuple(name for name in declared if name.endswith(".weight"))
    if towers := [name for name in lost if any(tower in name.lower() for tower in _TOWERS)]:
        raise UnsupportedModelError(_tower_lost(source, type(model).__name__, towers[0]))
    return lost


def listed(names: Sequence[str]) -> str:
    """Write how many tensors of a checkpoint there are, and the first of them.

    >>> listed(["a", "b", "c", "d"])
    '4 tensors of the checkpoint: a, b, c, ...'
    """
    return f"{len(names)} tensor{'s' * (len(names) > 1)} of the checkpoint: {shown(names)}"


def shown(names: Sequence[str]) -> str:
    """Write the first of some names.

    >>> shown(["a", "b", "c", "d"])
    'a, b, c, ...'
    """
    return ", ".join([*names[:_SHOWN], *["..."] * (len(names) > _SHOWN)])


def check_towers(source: str, config: Any, model: PreTrainedModel) -> None:
    """Refuse an image-text or audio-text checkpoint that the causal class would reduce to its text part.

    Args:
        config: of the checkpoint.
        model: of the causal class; its parameters may be on the meta device.

    Raises:
        UnsupportedModelError: names the part that would be lost.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> from transformers import LlavaConfig
    >>> check_towers("llava", LlavaConfig(), tiny_llama())
    Traceback (most recent call last):
        ...
    globalopt.errors.UnsupportedModelError: llava is a multimodal (image-text) checkpoint, ...
    """
    towers = [
        name
        for name in getattr(config, "sub_configs", None) or ()
        if any(tower in name for tower in _TOWERS) and getattr(config, name, None) is not None
    ]
    if towers and type(model.config) is not type(config):
        raise UnsupportedModelError(_tower_lost(source, type(model).__name__, towers[0]))


def tower_of(config: Any) -> str:
    """Describe what a multimodal config reads beside text; "" for others.

    >>> from transformers import LlavaConfig
    >>> tower_of(LlavaConfig())
    'image-text (vision_config)'
    """
    for name in getattr(config, "sub_configs", None) or ():
        if any(tower in name for tower in _TOWERS):
            return f"{'audio-text' if 'audio' in name or 'speech' in name else 'image-text'} ({name})"
    return ""


def _tower_lost(source: str, model: str, part: str) -> str:
    """Write the error for a multimodal checkpoint whose causal class has its text part alone."""
    return (
        f"{source} is a multimodal (image-text) checkpoint, and {model} would lose its vision or audio part ({part}); "
        "save its language model as a checkpoint of its own and compress that."
    )
