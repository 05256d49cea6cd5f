"""Load models and tokenizers from folders and the hub, as a whole or block by block.

At this border to transformers and the disk every error becomes one line that names the file or folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file

from globalopt.errors import ArtefactError, UnknownNameError, UnsupportedModelError, UsageError
from globalopt.machine.memory import WHOLE_COPIES, available, resident, size_text
from globalopt.models.checkpoint import Checkpoint, Precision
from globalopt.models.config import load_config
from globalopt.models.decoder import decoder_blocks
from globalopt.models.device import DTYPES, computed_dtype, resolve_device
from globalopt.models.load_errors import first_line
from globalopt.models.location import locate, weights_folder
from globalopt.models.quiet import quiet
from globalopt.models.refusals import (
    ADAPTER_CONFIG,
    PACKED_METHOD,
    check_config,
    check_folder,
    check_towers,
    check_types,
    check_unused,
    quantisation,
    stored_types,
    suspicious,
)
from globalopt.models.streaming import lazy_blocks
from globalopt.models.structure import empty_model, fill_empty
from globalopt.models.tokenizer import load_tokenizer
from globalopt.models.weights import load_weights


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """Hold a model in evaluation mode, without gradients or cache, and its tokenizer.

    Args:
        model, tokenizer: of transformers.
        name: as the user gave it.
        device: where the model computes.
        checkpoint_dtype: the type its weights are stored in, in which a compressed copy is saved too.
        unused: trained tensors of the checkpoint that the model's class declares it does not use, such as those of
            layers for multi-token prediction; a compressed copy lacks them.

    >>> from globalopt.reference import reference_folder
    >>> loaded = load_model(reference_folder(), device="cpu")
    >>> loaded.checkpoint_dtype, loaded.model.dtype, loaded.model.training
    (torch.bfloat16, torch.float32, False)
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    device: torch.device
    checkpoint_dtype: torch.dtype
    unused: tuple[str, ...] = ()


def load_model(
    name_or_path: str | Path,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    max_memory: int | None = None,
    tokens: int = 0,
    lazily: bool | None = None,
    beside: PreTrainedModel | None = None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer from a local folder or the hub.

    A local folder never uses the network. A model that does not fit into memory is loaded lazily: its decoder blocks
    are read when they are needed (`globalopt.models.streaming`). Both kinds give the same results.

    Args:
        name_or_path: a folder in the Hugging Face format, or a hub id.
        dtype: "float32", "bfloat16", "float16", or "auto": float32 on a CPU, the checkpoint's own elsewhere.
        device: a torch device, or "auto": the first accelerator there is, else the CPU.
        trust_remote_code: run code that comes with the checkpoint.
        max_memory: bytes that the process may use on the device; a model is loaded whole if `WHOLE_COPIES` of it fit
            in. None: the available memory decides.
        tokens: number of tokens whose hidden states will be kept in front of every block, beside the model.
        lazily: True: read blocks when they are needed, where the checkpoint allows it. False: load the model whole.
            None: the memory decides.
        beside: a lazy model that is in memory; the new one shares embeddings and head with it if they are equal.

    Raises:
        ArtefactError: the folder is missing, incomplete or broken, or the hub has no such model or is not reachable.
        UnsupportedModelError: the model is no causal language model that transformers knows; or it does not fit into
            memory and cannot be read block by block.
        UnknownNameError, UsageError: `dtype` or `device` does not exist here, or `max_memory` is too little for any way
            of loading.

    >>> from globalopt.reference import reference_folder
    >>> loaded = load_model(reference_folder(), device="cpu")
    >>> ids = loaded.tokenizer("The United", return_tensors="pt").input_ids
    >>> loaded.tokenizer.decode(loaded.model(input_ids=ids).logits[0, -1].argmax())
    ' States'
    """
    name = str(name_or_path)
    source, options = locate(name, trust_remote_code)
    place = resolve_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, ("auto", *DTYPES))
    with quiet():
        config = load_config(source, options)
        check_config(source, config)
        folder = weights_folder(source, options)
        _check_files(source, folder, config, options)
        if lazily is False:
            folder = None
        short = None
        if folder is not None and not lazily:
            short = _memory_short(folder, config, dtype, place, max_memory, tokens)
        if folder is None or not (lazily or short):
            model, names = load_weights(source, config, options)
        else:
            try:
                model, names = _load_lazily(folder, config, options, dtype, place, max_memory, beside)
            except UnsupportedModelError as error:
                if short:
                    raise UnsupportedModelError(f"{name} {short} {error}") from error
                if max_memory is not None:
                    raise
                model, names = load_weights(source, config, options)
        check_towers(source, config, model)
        unused = check_unused(source, model, names)
        tokenizer = load_tokenizer(source, options)
    stored = model.dtype
    lazy = lazy_blocks(model)
    if lazy is None:
        # The cast is for the type checker, which misreads the decorator transformers puts on `to`.
        cast("nn.Module", model).to(place, computed_dtype(dtype, place, stored))
    else:
        stored = lazy.precision.stored
    model.eval().requires_grad_(False)
    model.config.use_cache = False
    return LoadedModel(model, tokenizer, name, place, stored, unused)


def _check_files(source: str, folder: Path | None, config: Any, options: dict[str, Any]) -> None:
    """Refuse files that are read as they should not be: an adapter, a second checkpoint, quantised weights.

    Args:
        folder: of the safetensors files; None if there are none.
    """
    if not options["local_files_only"] and find_adapter_config_file(source) is not None:
        raise ArtefactError(f"{source} holds an adapter ({ADAPTER_CONFIG}); merge it into its base first.")
    place = Path(source) if options["local_files_only"] else folder
    if place is None or quantisation(config) == PACKED_METHOD:
        return
    check_folder(place)
    if found := suspicious(stored_types(place)):
        check_types(source, found, empty_model(source, config, options, torch.float32))


def _stored(folder: Path, config: Any) -> torch.dtype:
    """Return the type that the weights are stored in: the config's, else that of the checkpoint."""
    named = getattr(config, "dtype", None)
    return named if isinstance(named, torch.dtype) else Checkpoint(folder).dtype()


def _memory_short(
    folder: Path, config: Any, dtype: str, place: torch.device, max_memory: int | None, tokens: int
) -> str | None:
    """Compare the memory that a run with the whole model needs with what it may use.

    A run needs up to `WHOLE_COPIES` of the model, and the hidden states of `tokens` tokens in front of every block.

    Returns:
        None if the memory suffices, else the words that follow the model's name in an error message.
    """
    stored = _stored(folder, config)
    item = computed_dtype(dtype, place, stored).itemsize
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) * item // stored.itemsize
    text = config.get_text_config(decoder=True)
    width, depth = getattr(text, "hidden_size", 0), getattr(text, "num_hidden_layers", 0)
    needed = WHOLE_COPIES * size + tokens * width * (depth + 1) * item
    free = available(place) if max_memory is None else max_memory - resident()
    if needed <= free:
        return None
    return (
        f"does not fit into memory: a run that loads it whole needs {size_text(needed)}, and {size_text(max(0, free))} "
        f"are {'available' if max_memory is None else 'left of --max-memory'}."
    )


def _load_lazily(
    folder: Path,
    config: Any,
    options: dict[str, Any],
    dtype: str,
    place: torch.device,
    max_memory: int | None,
    beside: PreTrainedModel | None,
) -> tuple[PreTrainedModel, set[str]]:
    """Load the model with its blocks unread; embeddings, head and norms outside the blocks are read now.

    Returns:
        The model, and the names of the tensors that its class has no place for.

    Raises:
        UnsupportedModelError: the checkpoint cannot be read block by block.
        UsageError: `max_memory` is too little even so.
    """
    checkpoint = Checkpoint(folder)
    stored = _stored(folder, config)
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(f"{folder} is packed, which cannot be read block by block. Raise --max-memory.")
    computed = computed_dtype(dtype, place, stored)
    model = empty_model(str(folder), config, options, stored)
    if stored != torch.float32 and (kept := _kept_in_float32(model, stored)):
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps {kept} in float32, which cannot be done block by block. Raise --max-memory "
            "so that it is loaded whole."
        )
    _, blocks = decoder_blocks(model)
    inside = sum(p.numel() for p in blocks.parameters())
    outside = sum(p.numel() for p in model.parameters()) - inside
    largest = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    narrow = min(stored.itemsize, computed.itemsize)
    least = resident() + outside * narrow + 2 * largest * computed.itemsize
    if max_memory is not None and beside is None and least > max_memory:
        raise UsageError(
            f"--max-memory {size_text(max_memory)} is too little: even block by block {folder.name} needs more than "
            f"{size_text(least)} in {str(computed)[6:]}."
        )
    fill_empty(model, checkpoint, Precision(stored, computed, place), beside)
    if (folder / "generation_config.json").is_file() and model.can_generate():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        # As a config, it can hold anything.
        except Exception as error:
            raise ArtefactError(
                f"The generation_config.json of {folder} is not usable: {first_line(error)} Correct or remove it."
            ) from error
    return model, set(checkpoint.shapes()) - set(model.state_dict())


def _kept_in_float32(model: PreTrainedModel, stored: torch.dtype) -> str:
    """Name the modules that transformers keeps in float32 whatever the dtype of the model, or ""."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if stored == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return ", ".join(sorted(kept))
