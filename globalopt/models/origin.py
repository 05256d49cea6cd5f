"""Keep what a checkpoint consists of beside its weights: the spelling of its config, its tokenizer and its side files.

transformers 5 writes a config in words that transformers 4 does not know (`rope_parameters`, `dtype`), and transformers
4 takes its defaults in their place without a warning. So a saved config has both spellings.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download, try_to_load_from_cache
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from globalopt.models.identity import tokenizer_sha256

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "*tokenization*.py",
    "chat_template.jinja",
    "chat_template.json",
)
_CHAT_TEMPLATES = "additional_chat_templates"
_SIDE_FILES = ("*.json", "*.jinja", "*.py", "LICENSE*", "NOTICE*", *_TOKENIZER_FILES)
_OF_WEIGHTS = (
    CONFIG,
    "budget.json",
    "*.index.json",
    "adapter_config.json",
    "quant*_config.json",
    "trainer_state.json",
    "*_results.json",
)
"""JSON files that describe the weights or their training: they do not hold for other weights."""

_NOT_KEPT = ("quantization_config", "transformers_weights", "_name_or_path", "transformers_version")
"""Fields of a config that are about the file as it was, not about the model."""


def origin_of(name: str | Path) -> Path | None:
    """Find the folder of the files that a model was loaded from; None if there is none.

    Args:
        name: a model folder, an export of format adapter (its base is meant), or a hub id. Of a model on the hub the
            side files are fetched where the network allows it.

    >>> from globalopt.reference import reference_folder
    >>> origin_of(reference_folder()) == reference_folder()
    True
    >>> origin_of("a-model-that-is-in-memory") is None
    True
    """
    folder = Path(name).expanduser()
    try:
        for place in (folder, folder / "base"):
            if (place / CONFIG).is_file():
                return place
        cached = try_to_load_from_cache(str(name), CONFIG)
        if not isinstance(cached, str):
            return None
        snapshot = Path(cached).parent
    # A name that neither the disk nor the hub could have.
    except (OSError, ValueError):
        return None
    # Without the network, the files that were fetched before are all there is.
    with contextlib.suppress(OSError, ValueError):
        # The card is read for the licence; it is not copied.
        snapshot_download(str(name), revision=snapshot.name, allow_patterns=[*_SIDE_FILES, "README.md"])
    return snapshot


def keep_side_files(folder: Path, origin: Path, tokenizer: PreTrainedTokenizerBase | None, skip: str = "") -> None:
    """Copy the tokenizer's, the processor's and other small files of `origin` to the model in `folder`, as they are.

    Args:
        folder: has the tokenizer as transformers saves it. Its files stay if the tokenizer is not that of `origin`.
        tokenizer: of the model; None: it is known to be that of `origin`.
        skip: a file that is not copied.

    >>> from globalopt.models.loading import load_model
    >>> from globalopt.reference import reference_folder
    >>> tokenizer = load_model(reference_folder()).tokenizer
    >>> _ = tokenizer.save_pretrained("beside")
    >>> keep_side_files(Path("beside"), reference_folder(), tokenizer)
    >>> names = "tokenizer.json", "tokenizer_config.json"
    >>> all((Path("beside") / name).read_bytes() == (reference_folder() / name).read_bytes() for name in names)
    True
    """
    same = tokenizer is None or _is_tokenizer_of(origin, tokenizer)
    if same:
        for path in list(_matching(folder, _TOKENIZER_FILES)):
            path.unlink()
        if (templates := origin / _CHAT_TEMPLATES).is_dir():
            shutil.copytree(templates, folder / _CHAT_TEMPLATES, copy_function=shutil.copyfile, dirs_exist_ok=True)
    for path in _matching(origin, _SIDE_FILES):
        of_weights = any(path.match(pattern) for pattern in _OF_WEIGHTS)
        of_tokenizer = any(path.match(pattern) for pattern in _TOKENIZER_FILES)
        if path.name != skip and not of_weights and (same or not of_tokenizer):
            shutil.copyfile(path, folder / path.name)


def _matching(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    """List the files of a folder whose names match one of `patterns`."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith(".") and any(path.match(pattern) for pattern in patterns):
            yield path


def _is_tokenizer_of(origin: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether `tokenizer` is as it was loaded from `origin`: tokens may have been added to it in memory."""
    for load in (AutoTokenizer, type(tokenizer)):
        try:
            loaded = load.from_pretrained(origin, local_files_only=True, trust_remote_code=False)
            if tokenizer_sha256(loaded) == tokenizer_sha256(tokenizer):
                return True
        # A broken tokenizer raises errors of any kind; the one in memory is saved then.
        except Exception:
            continue
    return False


def complete_config(written: dict[str, Any], origin: Path | None, kind: type[PretrainedConfig]) -> dict[str, Any]:
    """Add to a config the fields of its origin that transformers 5 leaves out, and the spelling of transformers 4.

    A field is added only if the installed transformers reads the config as before.

    Args:
        written: as transformers saved it.
        origin: folder of the checkpoint that the model was loaded from, if there is one.
        kind: class of the config.

    >>> from transformers import LlamaConfig
    >>> rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    >>> config = complete_config({"rope_parameters": rope, "dtype": "bfloat16"}, None, LlamaConfig)
    >>> config["rope_theta"], config["rope_scaling"], config["torch_dtype"]
    (500.0, {'rope_type': 'linear', 'factor': 2.0}, 'bfloat16')
    """
    found = [*_older_spelling(written, ())]
    if origin is not None:
        try:
            before = json.loads((origin / CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            before = {}
        # Where both have a value, that of the origin is kept; it is checked below like every other.
        found = [*_lacking(written, before, ()), *found]
    whole = _with(written, found)
    expected = _read(kind, written)
    if expected is None or _agrees(expected, _read(kind, whole)):
        return whole
    whole = written
    for each in found:
        more = _with(whole, [each])
        if _agrees(expected, _read(kind, more)):
            whole = more
    return whole


Field = tuple[tuple[str, ...], str, Any]
"""Path of a nested config, key and value."""


def _lacking(written: dict[str, Any], before: Any, path: tuple[str, ...]) -> Iterator[Field]:
    """List the fields of the config `before` that `written` lacks, also of the configs inside it."""
    for key, value in before.items() if isinstance(before, dict) else ():
        if key not in written:
            # The type of the weights is that of the new files.
            if key not in _NOT_KEPT and (path or key != "torch_dtype"):
                yield path, key, value
        elif key.endswith("_config") and isinstance(written[key], dict):
            yield from _lacking(written[key], value, (*path, key))


def _older_spelling(written: dict[str, Any], path: tuple[str, ...]) -> Iterator[Field]:
    """List the fields of transformers 4 that say the same as those of transformers 5, also of the configs inside."""
    if isinstance(written.get("dtype"), str):
        yield path, "torch_dtype", written["dtype"]
    rope = written.get("rope_parameters")
    if isinstance(rope, dict):
        by_kind = [(kind, each) for kind, each in rope.items() if isinstance(each, dict) and kind.endswith("attention")]
        for kind, value in by_kind or [("full_attention", rope)]:
            # Of models with two kinds of attention, Gemma 3 and its like name the second one so.
            local = kind == "sliding_attention"
            if "rope_theta" in value:
                yield path, "rope_local_base_freq" if local else "rope_theta", value["rope_theta"]
            if local:
                continue
            if "partial_rotary_factor" in value:
                yield path, "partial_rotary_factor", value["partial_rotary_factor"]
            moved = ("rope_theta", "partial_rotary_factor")
            if value.get("rope_type", "default") != "default" or "mrope_section" in value:
                yield path, "rope_scaling", {name: each for name, each in value.items() if name not in moved}
    for key, value in written.items():
        if key.endswith("_config") and isinstance(value, dict):
            yield from _older_spelling(value, (*path, key))


def _with(config: dict[str, Any], fields: list[Field]) -> dict[str, Any]:
    """Copy a config with more fields."""
    made = copy.deepcopy(config)
    for path, key, value in fields:
        place = made
        for name in path:
            place = place[name]
        place.setdefault(key, copy.deepcopy(value))
    return made


def _read(kind: type[PretrainedConfig], config: dict[str, Any]) -> dict[str, Any] | None:
    """Read a config as the installed transformers does; None if it refuses it."""
    try:
        return kind.from_dict(copy.deepcopy(config)).to_dict()
    # Every model type checks its config in its own way.
    except Exception:
        return None


def _agrees(expected: Any, found: Any) -> bool:
    """Tell whether every field of `expected` is in `found` with the same value."""
    if isinstance(expected, dict) and isinstance(found, dict):
        return all(key in found and _agrees(value, found[key]) for key, value in expected.items())
    return type(expected) is type(found) and expected == found
