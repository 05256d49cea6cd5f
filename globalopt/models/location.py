"""Tell a local folder from a hub id, and find the weights of either."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from globalopt.errors import ArtefactError
from globalopt.models.checkpoint import INDEX, SINGLE
from globalopt.models.hub import offline_without_hub
from globalopt.models.refusals import ADAPTER_CONFIG

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def locate(name: str, trust_remote_code: bool) -> tuple[str, dict[str, Any]]:
    """Return the first argument and the options for transformers' `from_pretrained`.

    Raises:
        ArtefactError: `name` is a path, and no folder with a model is there.

    >>> locate("nobody/nothing", trust_remote_code=False)
    ('nobody/nothing', {'local_files_only': False, 'trust_remote_code': False})
    """
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


def weights_folder(source: str, options: dict[str, Any]) -> Path | None:
    """Return the folder of the model's safetensors files, fetched where they are on the hub; None if it has none.

    >>> from globalopt.reference import reference_folder
    >>> weights_folder(str(reference_folder()), {"local_files_only": True}) == reference_folder()
    True
    """
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
