"""Detect changed checkpoints by digests of every tensor and of both configs, in the header of every weight file.

The digests, called a seal, protect against broken disks, cut-off transfers and careless edits, not against attackers,
who can write a new seal: shapes and dtypes of tensors are checked beside it (`quantizer`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from globalopt.errors import ArtefactError
from globalopt.export import guard

KEY = "globalopt"
VERSION = 1
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"


def seal(model: PreTrainedModel, tensors: Mapping[str, Tensor], renamed: Mapping[str, Tensor]) -> dict[str, str]:
    """Make the seal of a model's files, as metadata for their headers.

    Args:
        model: its configs are digested as they will be written.
        tensors: the tensors that will be written, by name.
        renamed: the same under the names of the original checkpoint.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> tensors = {"model.norm.weight": torch.ones(16)}
    >>> sorted(json.loads(seal(tiny_llama(), tensors, tensors)["globalopt"]))
    ['config', 'generation_config', 'tensors', 'version']
    """
    record = {
        "version": VERSION,
        "config": _digest_json(json.loads(model.config.to_json_string(use_diff=True))),
        "generation_config": _generation_digest(model),
        "tensors": {name: _digest(tensor) for name, tensor in tensors.items()},
    }
    if renamed.keys() != tensors.keys():
        record["renamed"] = {name: _digest(tensor) for name, tensor in renamed.items()}
    return {KEY: json.dumps(record, sort_keys=True)}


def check_configs(files: Iterable[str | Path]) -> None:
    """Check that the configs beside the weight `files` are those they were saved with; `ArtefactError` otherwise.

    >>> from globalopt.export.example import example_run
    >>> from globalopt.export.packed import export_packed
    >>> export_packed(example_run(), Path("exported"))
    >>> check_configs(["exported/model.safetensors"])
    >>> _ = Path("exported/config.json").write_text("{}")
    >>> check_configs(["exported/model.safetensors"])
    Traceback (most recent call last):
    globalopt.errors.ArtefactError: exported/config.json is not the file that was saved with these weights. ...
    """
    paths = _safetensors(files)
    record = _record(paths)
    for name, key in ((CONFIG, "config"), (GENERATION_CONFIG, "generation_config")):
        path = paths[0].parent / name
        expected = record.get(key)
        found = _digest_json(guard.without_notice(_read_json(path))) if path.is_file() else None
        if found != expected:
            raise ArtefactError(
                f"{path} is not the file that was saved with these weights. Fetch or export the model again; to load "
                "it with other settings, pass them to from_pretrained."
            )


Sizes = dict[str, tuple[str, tuple[int, ...]]]
_CHECKED: ContextVar[tuple[list[Path], Sizes] | None] = ContextVar("checked", default=None)


@contextlib.contextmanager
def checked(files: Iterable[str | Path]) -> Iterator[None]:
    """Check configs and tensors of the weight `files`; within the context `check_tensors` does not read them again.

    >>> from globalopt.export.example import example_run
    >>> from globalopt.export.packed import export_packed
    >>> export_packed(example_run(Path("another run")), Path("packed"))
    >>> with checked(["packed/model.safetensors"]):
    ...     len(check_tensors(["packed/model.safetensors"])) > 14
    True
    """
    paths = sorted(_safetensors(files))
    check_configs(paths)
    token = _CHECKED.set((paths, check_tensors(paths)))
    try:
        yield
    finally:
        _CHECKED.reset(token)


def check_tensors(files: Iterable[str | Path]) -> Sizes:
    """Read every tensor of the weight `files`, check its digest, and return dtypes and shapes by name.

    Raises:
        ArtefactError: a file is no safetensors or broken, a tensor is not the one that was saved, or one is missing or
            too many.

    >>> from globalopt.export.example import example_run
    >>> from globalopt.export.packed import export_packed
    >>> export_packed(example_run(Path("third run")), Path("third"))
    >>> check_tensors(["third/model.safetensors"])["model.norm.weight"]
    ('torch.float32', (16,))
    """
    paths = sorted(_safetensors(files))
    already = _CHECKED.get()
    if already is not None and already[0] == paths:
        return already[1]
    record = _record(paths)
    found: dict[str, str] = {}
    shapes: Sizes = {}
    for file in paths:
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                if name in found:
                    raise ArtefactError(f"{file} holds {name} a second time. Fetch or export the model again.")
                tensor = tensors.get_tensor(name)
                found[name] = _digest(tensor)
                shapes[name] = str(tensor.dtype), tuple(tensor.shape)
    if found not in (record["tensors"], record.get("renamed")):
        expected = record["tensors"] if isinstance(record["tensors"], dict) else {}
        wrong = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n)) or ["a tensor"]
        raise ArtefactError(
            f"The weights in {paths[0].parent} are not the ones that were saved: {wrong[0]} has changed, is missing or "
            "is too many. Fetch or export the model again."
        )
    return shapes


def _safetensors(files: Iterable[str | Path]) -> list[Path]:
    """Check that the files are safetensors of one folder."""
    paths = [Path(file) for file in files]
    for path in paths:
        if path.suffix != ".safetensors":
            raise ArtefactError(f"{path} is no safetensors file; a packed model has no other, and no pickle is opened.")
        if path.parent != paths[0].parent:
            raise ArtefactError(f"{path} is outside the model's folder {paths[0].parent}; it is not opened.")
    if not paths:
        raise ArtefactError("A packed model needs weight files; there are none.")
    return paths


def _record(files: list[Path]) -> dict[str, Any]:
    """Read the seal; `ArtefactError` where the files hold none, or different ones."""
    texts = []
    for file in files:
        with _opened(file) as tensors:
            texts.append((tensors.metadata() or {}).get(KEY))
    try:
        record = json.loads(texts[0])
        if set(texts) != {texts[0]} or not isinstance(record, dict) or record["version"] != VERSION:
            raise ValueError
        record["tensors"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ArtefactError(
            f"The weights in {files[0].parent} are not sealed by this version of globalopt, or not all alike. Fetch or "
            "export the model again."
        ) from None
    return record


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open a safetensors file; `ArtefactError` where it is missing or broken."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except FileNotFoundError:
        raise ArtefactError(f"There is no weight file {file}. Fetch or export the model again.") from None
    except ArtefactError:
        raise
    # The errors also cover dtypes that a header names and torch does not have.
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as cause:
        raise ArtefactError(f"{file} is broken ({cause}). Fetch or export the model again.") from None


def _digest(tensor: Tensor) -> str:
    """Compute the sha256 of a tensor's dtype, shape and bytes."""
    if tensor.device.type == "meta":
        raise ArtefactError("A model that is partly offloaded cannot be saved packed. Load it without offloading.")
    tensor = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if tensor.numel():
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest_json(value: Any) -> str:
    """Compute the sha256 of a JSON value with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _generation_digest(model: PreTrainedModel) -> str | None:
    """Compute the digest of the generation config as it will be written; None without one."""
    if not model.can_generate() or model.generation_config is None:
        return None
    text = model.generation_config.to_json_string(use_diff=True, keys_to_pop=["compile_config"])
    return _digest_json(json.loads(text))


def _read_json(path: Path) -> Any:
    """Read a JSON file."""
    from globalopt.runs.files import read_json

    return read_json(path)
