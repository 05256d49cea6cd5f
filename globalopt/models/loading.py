"""Load models and tokenizers from folders and the hub, as a whole or block by block.

At this border to transformers and the disk every error becomes one line that names the file or folder.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
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
from transformers.utils.peft_utils import find_adapter_config_file

from globalopt.errors import (
    ArtefactError,
    GlobalOptError,
    UnknownNameError,
    UnsupportedModelError,
    UsageError,
    one_line,
)
from globalopt.machine.memory import WHOLE_COPIES, available, resident, size_text
from globalopt.models.checkpoint import INDEX, SINGLE, Checkpoint, Precision, Source, Zeros
from globalopt.models.decoder import decoder_blocks
from globalopt.models.hub import offline_without_hub
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
    tower_of,
)
from globalopt.models.streaming import LazyBlocks, fill, lazy_blocks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Floating-point types by the name that a user gives."""

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


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

    >>> loaded = load_model(reference_folder(), device="cpu")
    >>> ids = loaded.tokenizer("The United", return_tensors="pt").input_ids
    >>> loaded.tokenizer.decode(loaded.model(input_ids=ids).logits[0, -1].argmax())
    ' States'
    """
    name = str(name_or_path)
    source, options = _source(name, trust_remote_code)
    place = resolve_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, ("auto", *DTYPES))
    with quiet():
        config = load_config(source, options)
        check_config(source, config)
        folder = _weights_folder(source, options)
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


def load_structure(
    name_or_path: str | Path, dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, torch.dtype]:
    """Make a model with zeros for weights, which take no memory, from its config alone; also return its stored type.

    Args:
        name_or_path: a folder in the Hugging Face format, or a hub id.
        dtype: the type it computes in; "auto": float32.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        ArtefactError, UnsupportedModelError, UnknownNameError: as `load_model`.

    >>> model, stored = load_structure(reference_folder())
    >>> stored, model.num_parameters() > 10**6
    (torch.bfloat16, True)
    """
    source, options = _source(str(name_or_path), trust_remote_code)
    with quiet():
        config = load_config(source, options)
    check_config(source, config)
    return config_structure(source, config, dtype, trust_remote_code)


def config_structure(
    source: str, config: Any, dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, torch.dtype]:
    """Make a model with zeros for weights from a config; also return the type that the config says it is stored in.

    Args:
        source: file, folder or hub id of the config, for messages.
        dtype, trust_remote_code: as for `load_structure`.
    Raises:
        UnsupportedModelError, UnknownNameError: as `load_model`.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> model, stored = config_structure("tiny", tiny_llama().config)
    >>> model.num_parameters(), stored
    (6480, torch.float32)
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, ("auto", *DTYPES))
    computed = DTYPES.get(dtype, torch.float32)
    options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    with quiet():
        model = _empty(source, config, options, computed)
        _fill(model, Zeros(model), Precision(computed, computed, torch.device("cpu")))
    model.config.use_cache = False
    stored = getattr(config, "dtype", None)
    return model.eval().requires_grad_(False), stored if isinstance(stored, torch.dtype) else torch.float32


def computed_dtype(dtype: str, place: torch.device, stored: torch.dtype) -> torch.dtype:
    """Choose the type to compute in on the device `place`, for weights stored in `stored`.

    Args:
        dtype: a name of `DTYPES`, or "auto": float32 on a CPU, `stored` elsewhere.

    >>> computed_dtype("auto", torch.device("cpu"), torch.bfloat16)
    torch.float32
    >>> computed_dtype("auto", torch.device("cuda"), torch.bfloat16)
    torch.bfloat16
    """
    return DTYPES.get(dtype, torch.float32 if place.type == "cpu" else stored)


def resolve_device(device: str) -> torch.device:
    """Choose the torch device called `device`; "auto" is an accelerator if there is one, else the CPU.

    Raises:
        UsageError: there is no such device here.

    >>> resolve_device("cpu:1")
    Traceback (most recent call last):
        ...
    globalopt.errors.UsageError: --device cpu:1 is not available here; use --device auto or cpu.
    """
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
    """Return the folder of the bundled reference model.

    Raises:
        ArtefactError: it was not installed.

    >>> (reference_folder() / "config.json").is_file()
    True
    """
    folder = Path(str(resources.files("globalopt"))) / "reference" / "model"
    if not (folder / "config.json").is_file():
        raise ArtefactError(f"The bundled reference model is not at {folder}; install the package again.")
    return folder


def _source(name: str, trust_remote_code: bool) -> tuple[str, dict[str, Any]]:
    """Return the first argument and the options for transformers' `from_pretrained`."""
    local = _is_local(name)
    if not local:
        offline_without_hub()
    source = str(Path(name).expanduser()) if local else name
    return source, {"local_files_only": local, "trust_remote_code": trust_remote_code}


def _is_local(name: str) -> bool:
    """Tell whether `name` is a model folder; False for a name that can only be a hub id.

    Raises:
        ArtefactError: it is neither, or a folder without a model.
    """
    folder = Path(name).expanduser()
    if not folder.exists():
        if _HUB_ID.fullmatch(name):
            return False
        raise ArtefactError(f"There is no model folder {name}.")
    if not folder.is_dir():
        raise ArtefactError(f"{name} is a file; give the folder that holds config.json, the weights and the tokenizer.")
    if not (folder / "config.json").is_file():
        if (folder / ADAPTER_CONFIG).is_file():
            raise ArtefactError(f"Folder {name} is an adapter and no model; merge it into its base first.")
        raise ArtefactError(f"Folder {name} has no config.json; it is no model in the Hugging Face format.")
    return True


def load_config(source: str, options: dict[str, Any]) -> Any:
    """Load the config, with errors of known cause as one line.

    Args:
        source: folder or hub id.
        options: of `from_pretrained`: `local_files_only` and `trust_remote_code`.

    >>> load_config(str(reference_folder()), {"local_files_only": True, "trust_remote_code": False}).model_type
    'llama'
    """
    try:
        return AutoConfig.from_pretrained(source, **options)
    except OSError as error:
        if options["local_files_only"]:
            raise ArtefactError(f"The config.json of {source} cannot be read: {_first_line(error)}") from error
        raise ArtefactError(
            f"Model {source} is neither a local folder nor to be had from the hub ({_first_line(error)}) "
            "Check the name and the network; a local folder works without one."
        ) from error
    except (MemoryError, RecursionError, GlobalOptError):
        raise
    # A config can hold anything, and transformers raises errors of any kind for it.
    except Exception as error:
        raise _unusable(source, options, error) from error


def _unusable(source: str, options: dict[str, Any], error: Exception) -> GlobalOptError:
    """Translate any error for a config.json, or for code that comes with the model, into one line."""
    if "trust_remote_code" in str(error):
        return _remote_code(source)
    if isinstance(error, ImportError):
        return ArtefactError(f"The code of {source} cannot be imported: {_first_line(error)} Install what it needs.")
    reason = one_line(error, None) if isinstance(error, StrictDataclassError) else _first_line(error)
    if isinstance(error, KeyError | AttributeError | TypeError | AssertionError | IndexError):
        # Their messages are a word alone, or of the inside of transformers.
        reason = f"{type(error).__name__}: {reason}"
    return UnsupportedModelError(f"The config.json of {source} is not usable: {_field(source, options, error)}{reason}")


def _field(source: str, options: dict[str, Any], error: Exception) -> str:
    """Name the fields of a local config.json whose words the message of `error` quotes, or return ""."""
    if not options["local_files_only"]:
        return ""
    try:
        config = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    quoted = set(re.findall(r"'([^']+)'", str(error)))
    fields = [f"{name} = {value!r}" for name, value in _leaves(config) if isinstance(value, str) and value in quoted]
    return f"{', '.join(fields)}: " if fields else ""


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over the values of nested JSON objects by their dotted names."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}.{name}" if path else str(name))
    else:
        yield path, value


def load_weights(
    source: str, config: Any, options: dict[str, Any], dtype: torch.dtype | str = "auto"
) -> tuple[PreTrainedModel, set[str]]:
    """Load the whole model; also return the names of the tensors that its class has no place for.

    Args:
        source, options: as for `load_config`, with further options of `from_pretrained`.
        dtype: of the weights; "auto" is that of the checkpoint.

    >>> options = {"local_files_only": True, "trust_remote_code": False}
    >>> config = load_config(str(reference_folder()), options)
    >>> model, unused = load_weights(str(reference_folder()), config, options)
    >>> model.dtype, unused
    (torch.bfloat16, set())
    """
    unused: set[str] = set()
    try:
        with _recorded(unused):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, config=config, dtype=dtype, output_loading_info=True, **options
            )
    except (GlobalOptError, MemoryError, torch.OutOfMemoryError):
        raise
    except SafetensorError as error:
        raise ArtefactError(f"The weights of {source} are broken or cut off: {error}. Fetch them again.") from error
    except OSError as error:
        raise ArtefactError(f"The weights of {source} cannot be read: {_first_line(error)}") from error
    # For configs, code and weights that do not fit together transformers raises errors of any kind.
    except Exception as error:
        if "ignore_mismatched_sizes" in str(error):
            raise ArtefactError(f"The weights of {source} do not have the shapes its config.json says.") from error
        raise _known(source, config, error) or _unusable(source, options, error) from error
    model, report = loaded
    check_report(source, report)
    return model, unused | set(report["unexpected_keys"])


def check_report(source: str, report: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that lacks tensors, or has some of other shapes: transformers takes random numbers for them.

    Args:
        source: file, folder or hub id, for the message.
        report: the loading info of `from_pretrained`.

    >>> check_report("tiny", {"missing_keys": {"lm_head.weight"}})
    Traceback (most recent call last):
        ...
    globalopt.errors.ArtefactError: The weights of tiny lack 1 tensors, lm_head.weight among them; ...
    """
    if missing := sorted(report["missing_keys"]):
        raise ArtefactError(
            f"The weights of {source} lack {len(missing)} tensors, {missing[0]} among them; the checkpoint is "
            "incomplete or for another model."
        )
    if mismatched := sorted(str(entry[0]) for entry in report.get("mismatched_keys", ())):
        raise ArtefactError(
            f"The weights of {source} do not have the shapes its config.json says: {mismatched[0]} has another."
        )


@contextmanager
def _recorded(unused: set[str]) -> Iterator[None]:
    """Add to `unused` the tensors that a model loaded meanwhile has no place for, also those its class ignores.

    transformers removes the ones that a class declares ignorable from its report; trained weights are among them.
    """
    kept = getattr(PreTrainedModel, "_adjust_missing_and_unexpected_keys", None)
    if kept is None:
        yield
        return

    def adjust(model: PreTrainedModel, loading_info: Any) -> None:
        unused.update(loading_info.unexpected_keys)
        kept(model, loading_info)

    PreTrainedModel._adjust_missing_and_unexpected_keys = adjust  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        PreTrainedModel._adjust_missing_and_unexpected_keys = kept


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
        check_types(source, found, _empty(source, config, options, torch.float32))


def _weights_folder(source: str, options: dict[str, Any]) -> Path | None:
    """Return the folder of the model's safetensors files, fetched where they are on the hub; None if it has none."""
    if options["local_files_only"]:
        folder = Path(source)
        return folder if any((folder / name).is_file() for name in (INDEX, SINGLE)) else None
    try:
        # In this order, as transformers does.
        try:
            index = Path(hf_hub_download(source, SINGLE))
        except EntryNotFoundError:
            index = Path(hf_hub_download(source, INDEX))
            for file in set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()):
                hf_hub_download(source, file)
    # Without usable safetensors files the model is loaded whole; if a file is broken, that load says so more precisely.
    except (EntryNotFoundError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return index.parent


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
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        # As a config, it can hold anything.
        except Exception as error:
            raise ArtefactError(
                f"The generation_config.json of {folder} is not usable: {_first_line(error)} Correct or remove it."
            ) from error
    return model, set(checkpoint.shapes()) - set(model.state_dict())


def _kept_in_float32(model: PreTrainedModel, stored: torch.dtype) -> str:
    """Name the modules that transformers keeps in float32 whatever the dtype of the model, or ""."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if stored == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return ", ".join(sorted(kept))


def _empty(source: str, config: Any, options: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """Make the model with its parameters on the meta device; buffers are real, in `dtype` as in a whole load."""
    trust = options["trust_remote_code"]
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=dtype, trust_remote_code=trust
            )
    except (GlobalOptError, MemoryError, torch.OutOfMemoryError):
        raise
    # For a config with unknown words, and for code that comes with the model, transformers raises errors of any kind.
    except Exception as error:
        raise _known(source, config, error) or _unusable(source, options, error) from error
    check_towers(source, config, model)
    # Parameters that move to the meta device as they are made are not tied any more.
    model.tie_weights()
    _compute_buffers(model)
    return model


@torch.no_grad()
def _compute_buffers(model: PreTrainedModel) -> None:
    """Compute the buffers that no checkpoint holds, such as tables of positions, as a whole load does.

    A model that is made in a type of 16 bits computes them in it; a whole load does so in float32, and then rounds.
    """
    makers = [(path, module) for path, module in model.named_modules() if isinstance(module, PreTrainedModel)]
    with torch.random.fork_rng(devices=[]):
        for path, module in model.named_modules():
            if module._non_persistent_buffers_set:
                _, maker = max(
                    (m for m in makers if not m[0] or f"{path}.".startswith(f"{m[0]}.")), key=lambda m: len(m[0])
                )
                maker._init_weights(module)


def _fill(
    model: PreTrainedModel, source: Source, precision: Precision, beside: PreTrainedModel | None = None
) -> LazyBlocks:
    """Read the parts outside the blocks from `source`, and make the blocks lazy."""
    path, blocks = decoder_blocks(model)
    return fill(model, list(blocks), path, source, precision, beside)


def load_tokenizer(source: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Load the tokenizer, with errors of known cause as one line; the arguments are those of `load_config`.

    >>> options = {"local_files_only": True, "trust_remote_code": False}
    >>> load_tokenizer(str(reference_folder()), options).vocab_size
    4096
    """
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except (GlobalOptError, MemoryError):
        raise
    # tokenizers raises bare exceptions for files of another version, and KeyError for fields that are not there; a
    # panic of its Rust code is no Exception.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if "trust_remote_code" in str(error):
            raise _remote_code(source) from error
        raise ArtefactError(
            f"There is no usable tokenizer with {source} ({_first_line(error)}) "
            "Put its tokenizer.json and tokenizer_config.json beside the weights, written by a version of tokenizers "
            "that is not newer than the one installed."
        ) from error


def _known(source: str, config: Any, error: Exception) -> GlobalOptError | None:
    """Translate an error of transformers that has a known cause; None for others."""
    if "trust_remote_code" in str(error):
        return _remote_code(source)
    if "Unrecognized configuration class" in str(error):
        kind = tower_of(config)
        return UnsupportedModelError(
            f"{source} is of type {config.model_type}, which is no causal language model in transformers"
            f"{f'; it is an {kind} model' if kind else ''}."
        )
    return None


def _remote_code(source: str) -> ArtefactError:
    """Make the error for a checkpoint that needs code of its own."""
    return ArtefactError(f"{source} comes with code of its own; read it, then pass --trust-remote-code to run it.")


def _first_line(error: BaseException) -> str:
    """Write the first line of an error's message, with a full stop."""
    lines = str(error).strip().splitlines()
    line = lines[0].strip().rstrip(":") if lines else type(error).__name__
    return line if line.endswith(".") else f"{line}."


@contextmanager
def quiet() -> Iterator[None]:
    """Hide progress bars and load reports of transformers while the context is open; the terminal shows our own.

    >>> with quiet():
    ...     transformers_logging.is_progress_bar_enabled()
    False
    """
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
