"""Load the tokenizer of a model from a folder or the hub."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from globalopt.errors import ArtefactError, GlobalOptError
from globalopt.models.load_errors import first_line, needs_code


def load_tokenizer(source: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Load the tokenizer, with errors of known cause as one line; the arguments are those of `load_config`.

    >>> from globalopt.reference import reference_folder
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
            raise needs_code(source) from error
        raise ArtefactError(
            f"There is no usable tokenizer with {source} ({first_line(error)}) "
            "Put its tokenizer.json and tokenizer_config.json beside the weights, written by a version of tokenizers "
            "that is not newer than the one installed."
        ) from error
