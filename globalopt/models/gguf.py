"""Read models from GGUF files, the format of llama.cpp, as ordinary models with dequantised weights.

transformers does the reading. What it passes over without a word is refused here: parts of a split file, weights that
the model has no place for, and rotary embeddings of a kind that it does not read.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)

from globalopt.errors import ArtefactError, GlobalOptError, UnsupportedModelError, UsageError, one_line
from globalopt.models.hub import offline_without_hub
from globalopt.models.origin import CONFIG
from globalopt.models.quiet import quiet
from globalopt.models.refusals import check_config, shown
from globalopt.models.rotary_factors import FACTORS, rotary_parameters
from globalopt.models.weights import check_report

SUFFIX = ".gguf"

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of tensors that are not quantised."""


def find_gguf(name: str, gguf_file: str | None = None) -> Path | None:
    """Find the GGUF file that a model is read from; None if its name is not that of a GGUF model.

    Args:
        name: a GGUF file, a folder or a hub id. A folder without config.json is read from the one GGUF file in it.
        gguf_file: name of the file in the folder or on the hub; None where `name` says enough.
    Raises:
        UsageError: the folder has several such files, or `name` is a file itself.
        ArtefactError: there is no such file.

    >>> find_gguf("models/tiny") is None
    True
    >>> Path("two").mkdir()
    >>> Path("two/a.gguf").touch(), Path("two/b.gguf").touch()
    (None, None)
    >>> find_gguf("two", "a.gguf")
    PosixPath('two/a.gguf')
    >>> find_gguf("two")
    Traceback (most recent call last):
        ...
    globalopt.errors.UsageError: two holds 2 GGUF files; choose one with --gguf-file: a.gguf, b.gguf.
    """
    place = Path(name).expanduser()
    try:
        is_folder, is_file = place.is_dir(), place.is_file()
        if gguf_file is not None:
            return _chosen(place, name, gguf_file, is_folder, is_file)
        if not is_folder:
            return _checked_file(place, name) if place.suffix.lower() == SUFFIX else None
        if (place / CONFIG).is_file():
            return None
        found = _files(place)
    # Whoever loads the model says what is wrong with a name that is too long, or a folder that may not be entered.
    except OSError as cause:
        if isinstance(cause, GlobalOptError):
            raise
        return None
    if len(found) > 1:
        raise UsageError(f"{name} holds {len(found)} GGUF files; choose one with --gguf-file: {shown(found)}.")
    return place / found[0] if found else None


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix.lower() == SUFFIX and path.is_file())


def _checked_file(path: Path, name: str) -> Path:
    if not path.is_file():
        raise ArtefactError(f"There is no file {name}.")
    return path


def _chosen(place: Path, name: str, gguf_file: str, is_folder: bool, is_file: bool) -> Path:
    """Find the file that `--gguf-file` names."""
    if is_file:
        raise UsageError(f"--gguf-file chooses a file of a folder or a hub id; {name} is a file.")
    if is_folder:
        if (place / gguf_file).is_file():
            return place / gguf_file
        found = _files(place)
        there = f"its GGUF files are {shown(found)}" if found else "it holds no GGUF file"
        raise ArtefactError(f"There is no file {gguf_file} in {name}; {there}.")
    offline_without_hub()
    try:
        return Path(hf_hub_download(name, gguf_file))
    except (EntryNotFoundError, OSError, ValueError) as error:
        raise ArtefactError(
            f"{gguf_file} of {name} is neither in a local folder nor to be had from the hub "
            f"({one_line(error, 160)}). Check both names and the network."
        ) from error


@dataclass(frozen=True, eq=False)
class GGUF:
    """Hold what a GGUF file says of itself.

    Args:
        path: the file.
        quantisation: the type that it is of, such as "Q4_1" or "F16".
        dtype: type to dequantise to: that of most weights, or bfloat16 where they are quantised.
        sizes: number of weights by the name of their tensor in the file.
        fields: texts and numbers of the metadata, without the vocabulary.
        factors: of the rotary embeddings, if the file has such a tensor.

    >>> from globalopt.models.example import example_gguf
    >>> file = read_gguf(example_gguf())
    >>> file.quantisation, file.dtype, file.fields["general.architecture"]
    ('Q8_0', torch.bfloat16, 'llama')
    """

    path: Path
    quantisation: str
    dtype: torch.dtype
    sizes: Mapping[str, int]
    fields: Mapping[str, Any]
    factors: Tensor | None = None


def read_gguf(path: Path) -> GGUF:
    """Read the metadata of a GGUF file and the list of its tensors.

    Raises:
        ArtefactError: it is no GGUF file or cut off, or the package `gguf` is missing.
        UnsupportedModelError: it is one part of several.

    >>> _ = Path("page.gguf").write_text("<html>")
    >>> read_gguf(Path("page.gguf"))
    Traceback (most recent call last):
        ...
    globalopt.errors.ArtefactError: page.gguf cannot be read as a GGUF file (...). Fetch it again.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ArtefactError(f"{path} is a GGUF file, and the package that reads these is missing: pip install gguf")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
        tensors = [(tensor.name, tensor.tensor_type.name, int(tensor.n_elements)) for tensor in reader.tensors]
        found = [torch.tensor(tensor.data) for tensor in reader.tensors if tensor.name == FACTORS]
    except MemoryError:
        raise
    # The reader takes lengths from the file as they are, and raises errors of any kind for what is none.
    except Exception as error:
        raise ArtefactError(
            f"{path} cannot be read as a GGUF file ({one_line(error, 160)}). Fetch it again."
        ) from error
    if (parts := fields.get("split.count", 1)) > 1:
        raise UnsupportedModelError(
            f"{path} is one of {parts} parts of a model; merge them first: llama-gguf-split --merge FIRST-PART OUT.gguf"
        )
    weights: Counter[str] = Counter()
    for _, kind, size in tensors:
        weights[kind] += size
    most = max(weights, key=lambda kind: weights[kind], default="F32")
    sizes = {name: size for name, _, size in tensors}
    return GGUF(
        path, _named_type(fields) or most, _PLAIN.get(most, torch.bfloat16), sizes, fields, found[0] if found else None
    )


def _named_type(fields: Mapping[str, Any]) -> str:
    """Name the type that the file says it is of; "" where it does not say."""
    from gguf import LlamaFileType

    try:
        name = LlamaFileType(fields["general.file_type"]).name
    except (KeyError, ValueError):
        return ""
    return "" if name == "GUESSED" else name.removeprefix("MOSTLY_").removeprefix("ALL_")


def gguf_config(file: GGUF) -> Any:
    """Make the config of transformers for a GGUF file.

    Raises:
        UnsupportedModelError: transformers does not read this architecture, or its rotary embeddings.

    >>> from globalopt.models.example import example_gguf
    >>> gguf_config(read_gguf(example_gguf())).model_type
    'llama'
    """
    with _as_one_line(file):
        config = AutoConfig.from_pretrained(file.path.parent, gguf_file=file.path.name, local_files_only=True)
    check_config(str(file.path), config)
    if (rotary := rotary_parameters(str(file.path), config, file.fields, file.factors)) is not None:
        config.rope_parameters = rotary
    return config


def load_gguf(file: GGUF) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model of a GGUF file with dequantised weights, and its tokenizer.

    Raises:
        UnsupportedModelError: transformers does not read this architecture, or not all of its weights.
        ArtefactError: weights are missing.

    >>> from globalopt.models.example import example_gguf
    >>> model, tokenizer = load_gguf(read_gguf(example_gguf()))
    >>> model.dtype, len(tokenizer("a cat").input_ids)
    (torch.bfloat16, 5)
    """
    source, config = str(file.path), gguf_config(file)
    named: dict[str, Any] = {"gguf_file": file.path.name, "local_files_only": True}
    # Without it a machine with the right kernels would leave the weights as they are.
    whole = getattr(transformers, "GgufConfig", None)
    wanted = {} if whole is None else {"quantization_config": whole(dequantize=True)}
    with _as_one_line(file):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.path.parent, config=config, dtype=file.dtype, output_loading_info=True, **named, **wanted
        )
        tokenizer = AutoTokenizer.from_pretrained(file.path.parent, **named)
    model, report = loaded
    check_report(source, report)
    _check_all_used(file, model)
    return model, tokenizer


def _check_all_used(file: GGUF, model: PreTrainedModel) -> None:
    """Refuse weights that the model has no place for: transformers leaves them out without a word."""
    passed_over = {FACTORS} | ({"output.weight"} if model.config.tie_word_embeddings else set())
    stored = sum(size for name, size in file.sizes.items() if name not in passed_over)
    placed = sum(parameter.numel() for parameter in model.parameters())
    if stored != placed:
        raise UnsupportedModelError(
            f"{file.path} holds {stored:,} weights, and transformers reads it as a {type(model).__name__} with "
            f"{placed:,}; some would be lost. Use the model that the file was made from."
        )


@contextmanager
def _as_one_line(file: GGUF) -> Iterator[None]:
    """Translate errors of transformers, of any kind, into one line with the name of the file; hide its bars."""
    try:
        with quiet(), _without_bar():
            yield
    except (GlobalOptError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # The message of a KeyError is a word alone.
        kind = "" if isinstance(error, ValueError | OSError | ImportError) else f"{type(error).__name__}: "
        raise UnsupportedModelError(
            f"{file.path} (architecture {file.fields.get('general.architecture')}) cannot be read: {kind}"
            f"{one_line(error).rstrip('.')}. Use the model that it was made from."
        ) from error


@contextmanager
def _without_bar() -> Iterator[None]:
    """Hide the bar that transformers shows for the tensors of a GGUF file, whatever its settings say."""
    module: Any = modeling_gguf_pytorch_utils
    bar = getattr(module, "tqdm", None)
    if bar is None:
        yield
        return
    module.tqdm = lambda tensors, **_: tensors
    try:
        yield
    finally:
        module.tqdm = bar
