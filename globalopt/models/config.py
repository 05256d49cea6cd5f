"""Load the config of a model from a folder or the hub."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from globalopt.errors import ArtefactError, GlobalOptError
from globalopt.models.load_errors import first_line, unusable


def load_config(source: str, options: dict[str, Any]) -> Any:
    """Load the config, with errors of known cause as one line.

    Args:
        source: folder or hub id.
        options: of `from_pretrained`: `local_files_only` and `trust_remote_code`.

    >>> from globalopt.reference import reference_folder
    >>> load_config(str(reference_folder()), {"local_files_only": True, "trust_remote_code": False}).model_type
    'llama'
    """
    try:
        return AutoConfig.from_pretrained(source, **options)
    except OSError as error:
        if options["local_files_only"]:
            raise ArtefactError(f"The config.json of {source} cannot be read: {first_line(error)}") from error
        raise ArtefactError(
            f"Model {source} is neither a local folder nor to be had from the hub ({first_line(error)}) "
            "Check the name and the network; a local folder works without one."
        ) from error
    except (MemoryError, RecursionError, GlobalOptError):
        raise
    # A config can hold anything, and transformers raises errors of any kind for it.
    except Exception as error:
        raise unusable(source, options, error) from error
