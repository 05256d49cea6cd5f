"""Load models, name them by what they are, and save them: the border to transformers and to the disk.

Whatever goes wrong at this border and has a known cause becomes one line; anything else is left as it is.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from globalopt.errors import ArtefactError, GlobalOptError, UnknownNameError, UnsupportedModelError, UsageError
from globalopt.machine.memory import WHOLE_COPIES, available, resident, size_text
from globalopt.models.layers import decoder_blocks
from globalopt.models.streaming import (
    INDEX,
    SINGLE,
    Checkpoint,
    LazyBlocks,
    Precision,
    Source,
    Zeros,
    fill,
    lazy_blocks,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model ready to be read: in eval mode, without gradients or cache.

    Args:
        name: how the user named it.
        checkpoint_dtype: the type its weights are stored in, which a compressed copy is saved in too.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    device: torch.device
    checkpoint_dtype: torch.dtype


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

    A local folder never asks the network. A model that does not fit is loaded lazily (`globalopt.lazy`): its decoder
    blocks are read when they are needed. Both kinds give the same results.

    Args:
        name_or_path: a folder in the Hugging Face format, or a hub id.
        dtype: "float32", "bfloat16", "float16", or "auto": float32 on a CPU, the checkpoint's own elsewhere.
        device: a torch device, or "auto": the first accelerator there is, else the CPU.
        trust_remote_code: run code that comes with the checkpoint.
        max_memory: bytes that the process may have on the device in the end, when `WHOLE_COPIES` of a whole model are
            there; None: what is available.
        tokens: how many tokens the hidden states of every block will be kept of.
        lazily: whether blocks are read when they are needed, where that is possible; None: if the rest says so.
        beside: a lazy model that is there already; a second one shares embeddings and head with it if they are equal.

    Raises:
        ArtefactError: the folder is missing, incomplete or broken, or the hub has no such model or is not reachable.
        UnsupportedModelError: the model is no causal language model that transformers knows.
        UnknownNameError, UsageError: `dtype` or `device` does not exist here, or `max_memory` is too little for any way
            of loading.
    """
    name = str(name_or_path)
    source, options = _source(name, trust_remote_code)
    place = resolve_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, ("auto", *DTYPES))
    with quiet():
        config = _load_config(source, options)
        folder = None if lazily is False else _weights_folder(source, options)
        if folder is None or not (lazily or not _fits(folder, config, dtype, place, max_memory, tokens)):
            model = _load_weights(source, config, options)
        else:
            try:
                model = _load_lazily(folder, config, options, dtype, place, max_memory, beside)
            except UnsupportedModelError:
                if max_memory is not None:
                    raise
                model = _load_weights(source, config, options)
        tokenizer = _load_tokenizer(source, options)
    stored = model.dtype
    lazy = lazy_blocks(model)
    if lazy is None:
        # The cast is for the type checker, which misreads the decorator transformers puts on `to`.
        cast("nn.Module", model).to(place, computed_dtype(dtype, place, stored))
    else:
        stored = lazy.precision.stored
    model.eval().requires_grad_(False)
    model.config.use_cache = False
    return LoadedModel(model, tokenizer, name, place, stored)


def load_structure(
    name_or_path: str | Path, dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, torch.dtype]:
    """A model with zeros for weights, which take no memory, and the type it is stored in, from its config alone.

    Args:
        dtype: what it computes in; "auto": float32.

    Raises:
        what `load_model` raises.
    """
    source, options = _source(str(name_or_path), trust_remote_code)
    if dtype != "auto" and dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, ("auto", *DTYPES))
    computed = DTYPES.get(dtype, torch.float32)
    with quiet():
        config = _load_config(source, options)
        model = _empty(source, config, options, computed)
        _fill(model, Zeros(model), Precision(computed, computed, torch.device("cpu")))
    model.config.use_cache = False
    stored = getattr(config, "dtype", None)
    return model.eval().requires_grad_(False), stored if isinstance(stored, torch.dtype) else torch.float32


def computed_dtype(dtype: str, place: torch.device, stored: torch.dtype) -> torch.dtype:
    """What `dtype` means on a device, for weights stored in `stored`; "auto" is float32 on a CPU."""
    return DTYPES.get(dtype, torch.float32 if place.type == "cpu" else stored)


def resolve_device(device: str) -> torch.device:
    """The torch device called `device` ("auto": an accelerator if there is one); `UsageError` if it is not here."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device == "auto":
        return accelerator or torch.device("cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"--device {device} is no torch device; use auto, cpu, cuda, cuda:0 or mps.") from error
    here = 1 if place.type == "cpu" else 0
    if accelerator is not None and place.type == accelerator.type:
        here = torch.accelerator.device_count()
    if (place.index or 0) >= here:
        raise UsageError(f"--device {device} is not available here; use --device auto or cpu.")
    return place


def reference_folder() -> Path:
    """Folder of the reference model that comes with the package; `ArtefactError` if it was not installed."""
    folder = Path(str(resources.files("globalopt"))) / "reference" / "model"
    if not (folder / "config.json").is_file():
        raise ArtefactError(f"The bundled reference model is not at {folder}; install the package again.")
    return folder


def _source(name: str, trust_remote_code: bool) -> tuple[str, dict[str, Any]]:
    """What transformers is asked for, and how."""
    local = _is_local(name)
    source = str(Path(name).expanduser()) if local else name
    return source, {"local_files_only": local, "trust_remote_code": trust_remote_code}


def _is_local(name: str) -> bool:
    """Whether `name` is a model folder; False for what can only be a hub id."""
    folder = Path(name).expanduser()
    if not folder.exists():
        if _HUB_ID.fullmatch(name):
            return False
        raise ArtefactError(f"There is no model folder {name}.")
    if not folder.is_dir():
        raise ArtefactError(f"{name} is a file; give the folder that holds config.json, the weights and the tokenizer.")
    if not (folder / "config.json").is_file():
        raise ArtefactError(f"Folder {name} has no config.json; it is no model in the Hugging Face format.")
    return True


def _load_config(source: str, options: dict[str, Any]) -> Any:
    try:
        return AutoConfig.from_pretrained(source, **options)
    except OSError as error:
        if options["local_files_only"]:
            raise ArtefactError(f"The config.json of {source} cannot be read: {_first_line(error)}") from error
        raise ArtefactError(
            f"Model {source} is neither a local folder nor to be had from the hub ({_first_line(error)}) "
            "Check the name and the network; a local folder works without one."
        ) from error
    except StrictDataclassError as error:
        reason = " ".join(str(error).split())
        raise UnsupportedModelError(f"The config.json of {source} is not usable: {reason}") from error
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise _remote_code(source) from error
        raise UnsupportedModelError(f"The config.json of {source} is not usable: {_first_line(error)}") from error


def _load_weights(source: str, config: Any, options: dict[str, Any]) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype="auto", output_loading_info=True, **options
        )
    except SafetensorError as error:
        raise ArtefactError(f"The weights of {source} are broken or cut off: {error}. Fetch them again.") from error
    except OSError as error:
        raise ArtefactError(f"The weights of {source} cannot be read: {_first_line(error)}") from error
    except ValueError as error:
        if known := _known(source, config, error):
            raise known from error
        raise
    except RuntimeError as error:
        if "ignore_mismatched_sizes" in str(error):
            raise ArtefactError(f"The weights of {source} do not have the shapes its config.json says.") from error
        raise
    model, report = loaded
    # transformers would go on with random numbers in their place.
    if missing := sorted(report["missing_keys"]):
        raise ArtefactError(
            f"The weights of {source} lack {len(missing)} tensors, {missing[0]} among them; the checkpoint is "
            "incomplete or for another model."
        )
    return model


def _weights_folder(source: str, options: dict[str, Any]) -> Path | None:
    """Folder of the model's safetensors files, fetched where they are on the hub; None if it has none."""
    if options["local_files_only"]:
        folder = Path(source)
        return folder if any((folder / name).is_file() for name in (INDEX, SINGLE)) else None
    try:
        try:
            index = Path(hf_hub_download(source, INDEX))
            for file in set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()):
                hf_hub_download(source, file)
        except EntryNotFoundError:
            index = Path(hf_hub_download(source, SINGLE))
    # Whatever it is, the whole load has it too, and a better word for it.
    except (EntryNotFoundError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return index.parent


def _stored(folder: Path, config: Any) -> torch.dtype:
    named = getattr(config, "dtype", None)
    return named if isinstance(named, torch.dtype) else Checkpoint(folder).dtype()


def _fits(folder: Path, config: Any, dtype: str, place: torch.device, max_memory: int | None, tokens: int) -> bool:
    """Whether whole copies of the model fit, beside the hidden states of `tokens` tokens in front of every block."""
    stored = _stored(folder, config)
    item = computed_dtype(dtype, place, stored).itemsize
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) * item // stored.itemsize
    text = config.get_text_config(decoder=True)
    width, depth = getattr(text, "hidden_size", 0), getattr(text, "num_hidden_layers", 0)
    needed = WHOLE_COPIES * size + tokens * width * (depth + 1) * item
    return needed <= (available(place) if max_memory is None else max_memory - resident())


def _load_lazily(
    folder: Path,
    config: Any,
    options: dict[str, Any],
    dtype: str,
    place: torch.device,
    max_memory: int | None,
    beside: PreTrainedModel | None,
) -> PreTrainedModel:
    checkpoint = Checkpoint(folder)
    stored = _stored(folder, config)
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(f"{folder} is quantised. Load the unquantised checkpoint.")
    computed = computed_dtype(dtype, place, stored)
    model = _empty(str(folder), config, options, stored)
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
    _fill(model, checkpoint, Precision(stored, computed, place), beside)
    if (folder / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _kept_in_float32(model: PreTrainedModel, stored: torch.dtype) -> str:
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if stored == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return ", ".join(sorted(kept))


def _empty(source: str, config: Any, options: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """The model with its parameters on the meta device; buffers are real, and made in `dtype` as in a whole load."""
    trust = options["trust_remote_code"]
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=dtype, trust_remote_code=trust
            )
    except ValueError as error:
        if known := _known(source, config, error):
            raise known from error
        raise
    # Parameters that move to the meta device as they are made are not tied any more.
    model.tie_weights()
    return model


def _fill(
    model: PreTrainedModel, source: Source, precision: Precision, beside: PreTrainedModel | None = None
) -> LazyBlocks:
    path, blocks = decoder_blocks(model)
    return fill(model, list(blocks), path, source, precision, beside)


def _load_tokenizer(source: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    # A tokenizer.json without one of its fields ends in a KeyError.
    except (OSError, ValueError, KeyError) as error:
        raise ArtefactError(
            f"There is no usable tokenizer with {source} ({_first_line(error)}) "
            "Put its tokenizer.json and tokenizer_config.json beside the weights."
        ) from error


def _known(source: str, config: Any, error: ValueError) -> GlobalOptError | None:
    if "trust_remote_code" in str(error):
        return _remote_code(source)
    if "Unrecognized configuration class" in str(error):
        return UnsupportedModelError(
            f"{source} is of type {config.model_type}, which is no causal language model in transformers."
        )
    return None


def _remote_code(source: str) -> ArtefactError:
    return ArtefactError(f"{source} comes with code of its own; read it, then pass --trust-remote-code to run it.")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    line = lines[0].strip().rstrip(":") if lines else type(error).__name__
    return line if line.endswith(".") else f"{line}."


@contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars and load reports of transformers off a terminal that shows our own."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
