"""Find models with quantised weights that can be dequantised, and make ordinary checkpoints of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from globalopt.errors import UnsupportedModelError
from globalopt.machine.memory import available, size_text
from globalopt.models.config import load_config
from globalopt.models.gguf import GGUF, find_gguf, gguf_config, load_gguf, read_gguf
from globalopt.models.hub import offline_without_hub
from globalopt.models.origin import CONFIG
from globalopt.models.quiet import quiet
from globalopt.models.refusals import DEQUANTISED, check_config, check_unused, quantisation, without_quantisation
from globalopt.models.saving import save_dense
from globalopt.models.structure import config_structure
from globalopt.models.tokenizer import load_tokenizer
from globalopt.models.weights import load_weights
from globalopt.runs.files import read_text, replacing, write_text

CARD = "README.md"

STEPS = 3
"""Steps of writing a dequantised copy: the config, the weights, and the copy itself."""

_WORKING = 1.2
"""Memory of a model and of what dequantising one tensor takes beside it, in units of the model."""
_PART = 2**24
"""Bytes that are hashed at once."""


def find_quantised(name: str, gguf_file: str | None = None, trust_remote_code: bool = False) -> QuantisedModel | None:
    """Find the quantised model that a name means; None for one that is loaded as it is, or refused when it is loaded.

    Args:
        name: a GGUF file, a folder or a hub id.
        gguf_file: as for `find_gguf`.
        trust_remote_code: run code that comes with the model.
    Raises:
        UsageError, ArtefactError: as `find_gguf`.

    >>> from globalopt.models.example import example_gguf
    >>> find_quantised(str(example_gguf())).quantisation
    'GGUF Q8_0'
    >>> from globalopt.reference import reference_folder
    >>> find_quantised(str(reference_folder())) is None
    True
    """
    if (path := find_gguf(name, gguf_file)) is not None:
        return QuantisedModel(path)
    place = Path(name).expanduser()
    try:
        found = place.is_dir()
        config = place / CONFIG if found else Path(_fetched_config(name))
        method = quantisation(json.loads(config.read_text(encoding="utf-8")))
        if method not in DEQUANTISED:
            return None
        # All files of one commit, which the dequantised copy is addressed by.
        folder = place if found else Path(snapshot_download(name, revision=config.parent.name))
    # Whoever loads the model says what is wrong with its name, its config or the network.
    except (EntryNotFoundError, OSError, ValueError, AttributeError, RecursionError):
        return None
    return QuantisedModel(folder, method, trust_remote_code)


def _fetched_config(name: str) -> str:
    offline_without_hub()
    return hf_hub_download(name, CONFIG)


@dataclass(frozen=True)
class QuantisedModel:
    """Hold the place of a model whose weights are dequantised before anything else is done with it.

    Args:
        place: a GGUF file, or a folder with config.json.
        method: of the folder's weights, one of `DEQUANTISED`; None for a GGUF file.
        trust_remote_code: run code that comes with the model.

    >>> from globalopt.models.example import example_gguf
    >>> model = QuantisedModel(example_gguf())
    >>> model.write(Path("dense"))
    >>> from globalopt.models.loading import load_model
    >>> load_model("dense").checkpoint_dtype
    torch.bfloat16
    """

    place: Path
    method: str | None = None
    trust_remote_code: bool = False

    @property
    def quantisation(self) -> str:
        """Return what the weights are quantised with, such as "GGUF Q4_1" or "fp8"."""
        return self.method or f"GGUF {self._gguf.quantisation}"

    def sha256(self) -> str:
        """Hash the file, or the files of the folder with their names."""
        hashed = hashlib.sha256()
        for path in self._files():
            if self.method is not None:
                hashed.update(path.name.encode())
            with path.open("rb") as file:
                while part := file.read(_PART):
                    hashed.update(part)
        return hashed.hexdigest()

    def structure(self, dtype: str = "auto") -> tuple[PreTrainedModel, torch.dtype]:
        """Make the model with zeros for weights from its config alone, and return the type it will be saved in.

        Args:
            dtype: as for `load_structure`.
        """
        config, stored = self._config()
        model, _ = config_structure(str(self.place), config, dtype, self.trust_remote_code)
        return model, stored

    def write(self, folder: Path, advance: Callable[[str], object] = str) -> None:
        """Dequantise the model, and save it as an ordinary checkpoint; `folder` appears whole or not at all.

        Args:
            advance: called after each of the `STEPS`.
        Raises:
            UnsupportedModelError: transformers does not read it, or it does not fit into memory.
            ArtefactError: it is broken or incomplete, or `folder` cannot be written.
        """
        config, stored = self._config()
        self._check_memory(config, stored)
        advance("config")
        if self.method is None:
            model, tokenizer = load_gguf(self._gguf)
        else:
            model, tokenizer = self._load(config, stored)
        advance("weights")
        with replacing(folder) as staging:
            save_dense(model, tokenizer, staging, stored, None if self.method is None else self.place)
            if card := self._card():
                write_text(staging / CARD, card)
        advance("copy")

    @cached_property
    def _gguf(self) -> GGUF:
        return read_gguf(self.place)

    def _files(self) -> Iterator[Path]:
        """List the files that decide what the model is."""
        if self.method is None:
            yield self.place
            return
        for path in sorted(self.place.iterdir()):
            if path.is_file() and path.suffix in (".json", ".safetensors", ".bin", ".model", ".jinja", ".py", ".txt"):
                yield path

    def _config(self) -> tuple[Any, torch.dtype]:
        """Make the config without its quantisation, and the type that the dequantised weights are saved in."""
        if self.method is None:
            return gguf_config(self._gguf), self._gguf.dtype
        config = load_config(str(self.place), self._options)
        stored = getattr(config, "dtype", None)
        stored = stored if isinstance(stored, torch.dtype) and stored.itemsize > 1 else torch.bfloat16
        check_config(str(self.place), without_quantisation(config))
        return config, stored

    @property
    def _options(self) -> dict[str, Any]:
        return {"local_files_only": True, "trust_remote_code": self.trust_remote_code}

    def _check_memory(self, config: Any, stored: torch.dtype) -> None:
        model, _ = config_structure(str(self.place), config, "auto", self.trust_remote_code)
        needed = int(_WORKING * model.num_parameters() * stored.itemsize)
        if needed > (free := available(torch.device("cpu"))):
            raise UnsupportedModelError(
                f"{self.place} does not fit into memory dequantised: that needs {size_text(needed)}, and "
                f"{size_text(free)} are available. Dequantise it on a larger machine."
            )

    def _load(self, config: Any, stored: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load a folder with its weights dequantised."""
        source, options = str(self.place), self._options
        assert self.method is not None, "a GGUF file is loaded by `load_gguf`"
        whole = getattr(transformers, DEQUANTISED[self.method])(dequantize=True)
        with quiet():
            quantised = load_config(source, options)
            model, names = load_weights(source, quantised, {**options, "quantization_config": whole}, stored)
            check_unused(source, model, names)
            return model, load_tokenizer(source, options)

    def _card(self) -> str:
        """Copy the card of a folder; of a GGUF file write one with the licence and languages that it names."""
        if self.method is not None:
            return read_text(self.place / CARD) if (self.place / CARD).is_file() else ""
        fields = self._gguf.fields
        named = {
            "license": fields.get("general.license"),
            "license_name": fields.get("general.license.name"),
            "license_link": fields.get("general.license.link"),
            "language": fields.get("general.languages"),
        }
        # JSON is YAML too, whatever the words are.
        lines = [f"{name}: {json.dumps(value)}" for name, value in named.items() if value]
        return "\n".join(["---", *lines, "---", ""]) if lines else ""
