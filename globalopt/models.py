"""Load models, name them by what they are, and save them: the border to transformers and to the disk.

Whatever goes wrong at this border and has a known cause becomes one line; anything else is left as it is.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from globalopt.errors import ArtefactError, UnknownNameError, UnsupportedModelError, UsageError
from globalopt.layers import ModelLayers

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
    name_or_path: str | Path, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> LoadedModel:
    """Load a causal language model and its tokenizer from a local folder or the hub.

    A local folder never asks the network.

    Args:
        name_or_path: a folder in the Hugging Face format, or a hub id.
        dtype: "float32", "bfloat16", "float16", or "auto": float32 on a CPU, the checkpoint's own elsewhere.
        device: a torch device, or "auto": the first accelerator there is, else the CPU.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        ArtefactError: the folder is missing, incomplete or broken, or the hub has no such model or is not reachable.
        UnsupportedModelError: the model is no causal language model that transformers knows.
        UnknownNameError, UsageError: `dtype` or `device` does not exist here.
    """
    place = resolve_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, ("auto", *DTYPES))
    name = str(name_or_path)
    local = _is_local(name)
    source = str(Path(name).expanduser()) if local else name
    options: dict[str, Any] = {"local_files_only": local, "trust_remote_code": trust_remote_code}
    with quiet():
        config = _load_config(source, options)
        model = _load_weights(source, config, options)
        tokenizer = _load_tokenizer(source, options)
    stored = model.dtype
    computed = DTYPES.get(dtype, torch.float32 if place.type == "cpu" else stored)
    # The cast is for the type checker, which misreads the decorator transformers puts on `to`.
    cast("nn.Module", model).to(place, computed).eval().requires_grad_(False)
    model.config.use_cache = False
    return LoadedModel(model, tokenizer, name, place, stored)


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


def model_fingerprint(layers: ModelLayers) -> str:
    """sha256 (hex) of what a budget must agree with: model type, vocabulary size, names and shapes of the layers."""
    config = layers.model.config
    identity = {
        "model_type": config.model_type,
        "vocab_size": config.get_text_config(decoder=True).vocab_size,
        "layers": [[spec.name, spec.d_out, spec.d_in] for spec in layers.specs],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def weights_sha256(layers: ModelLayers) -> str:
    """sha256 (hex) of the weights of the compressible layers, with their names and types, as they are in memory."""
    digest = hashlib.sha256()
    for spec in layers.specs:
        weight = layers.module(spec.name).weight
        digest.update(f"{spec.name} {spec.d_out} {spec.d_in} {weight.dtype}".encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_dense(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, dtype: torch.dtype
) -> None:
    """Save model and tokenizer in the Hugging Face format, weights in `dtype`; `folder` appears whole or not at all.

    Args:
        folder: must not exist yet, or be empty.

    Raises:
        ArtefactError: `folder` holds something, or cannot be written (a full disk).
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtefactError(f"{folder} exists and is not empty; choose another output folder.")
    # A sibling is on the same disk, so that the rename is atomic.
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise ArtefactError(f"Cannot write {folder}: {_first_line(error)}") from error
    try:
        with quiet():
            model.save_pretrained(staging, state_dict=_cast(model.state_dict(), dtype))
            tokenizer.save_pretrained(staging)
        path = staging / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        # The model in memory is of the type it was computed in and has its cache off; a saved one is to be served.
        config |= {"dtype": str(dtype).removeprefix("torch."), "use_cache": True}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        staging.chmod(0o755)
        staging.rename(folder)
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"Cannot write {folder}: {_first_line(error)}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


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
        if "trust_remote_code" in str(error):
            raise _remote_code(source) from error
        if "Unrecognized configuration class" in str(error):
            raise UnsupportedModelError(
                f"{source} is of type {config.model_type}, which is no causal language model in transformers."
            ) from error
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


def _load_tokenizer(source: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    # A tokenizer.json without one of its fields ends in a KeyError.
    except (OSError, ValueError, KeyError) as error:
        raise ArtefactError(
            f"There is no usable tokenizer with {source} ({_first_line(error)}) "
            "Put its tokenizer.json and tokenizer_config.json beside the weights."
        ) from error


def _remote_code(source: str) -> ArtefactError:
    return ArtefactError(f"{source} comes with code of its own; read it, then pass --trust-remote-code to run it.")


def _cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating-point tensors in `dtype`; tensors that share memory (tied weights) still do."""
    done: dict[tuple[Any, ...], Tensor] = {}
    for x in tensors.values():
        if (key := _memory(x)) not in done:
            done[key] = x.to(dtype) if x.is_floating_point() else x
    return {name: done[_memory(x)] for name, x in tensors.items()}


def _memory(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x.shape, x.stride()


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
