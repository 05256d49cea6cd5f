"""Translate what transformers raises for a checkpoint into one line that names the file or folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from globalopt.errors import ArtefactError, GlobalOptError, UnsupportedModelError, one_line
from globalopt.models.refusals import tower_of


def unusable(source: str, options: dict[str, Any], error: Exception) -> GlobalOptError:
    """Translate any error for a config.json, or for code that comes with the model, into one line.

    >>> print(unusable("tiny", {"local_files_only": False}, KeyError("model_type")))
    The config.json of tiny is not usable: KeyError: 'model_type'.
    """
    if "trust_remote_code" in str(error):
        return needs_code(source)
    if isinstance(error, ImportError):
        return ArtefactError(f"The code of {source} cannot be imported: {first_line(error)} Install what it needs.")
    reason = one_line(error, None) if isinstance(error, StrictDataclassError) else first_line(error)
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


def known_cause(source: str, config: Any, error: Exception) -> GlobalOptError | None:
    """Translate an error of transformers that has a known cause; None for others.

    >>> from transformers import T5Config
    >>> print(known_cause("tiny", T5Config(), ValueError("Unrecognized configuration class")))
    tiny is of type t5, which is no causal language model in transformers...
    """
    if "trust_remote_code" in str(error):
        return needs_code(source)
    if "Unrecognized configuration class" in str(error):
        kind = tower_of(config)
        return UnsupportedModelError(
            f"{source} is of type {config.model_type}, which is no causal language model in transformers"
            f"{f'; it is an {kind} model' if kind else ''}."
        )
    return None


def needs_code(source: str) -> ArtefactError:
    """Make the error for a checkpoint that needs code of its own.

    >>> print(needs_code("tiny"))
    tiny comes with code of its own; read it, then pass --trust-remote-code to run it.
    """
    return ArtefactError(f"{source} comes with code of its own; read it, then pass --trust-remote-code to run it.")


def first_line(error: BaseException) -> str:
    """Write the first line of an error's message, with a full stop.

    >>> first_line(ValueError("There is no such file:\\n  notes.txt"))
    'There is no such file.'
    """
    lines = str(error).strip().splitlines()
    line = lines[0].strip().rstrip(":") if lines else type(error).__name__
    return line if line.endswith(".") else f"{line}."
