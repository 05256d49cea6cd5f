"""Load all weights of a model into memory, and refuse a checkpoint that lacks some."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from globalopt.errors import ArtefactError, GlobalOptError
from globalopt.models.load_errors import first_line, known_cause, unusable


def load_weights(
    source: str, config: Any, options: dict[str, Any], dtype: torch.dtype | str = "auto"
) -> tuple[PreTrainedModel, set[str]]:
    """Load the whole model; also return the names of the tensors that its class has no place for.

    Args:
        source, options: as for `load_config`, with further options of `from_pretrained`.
        dtype: of the weights; "auto" is that of the checkpoint.

    >>> from globalopt.models.config import load_config
    >>> from globalopt.reference import reference_folder
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
        raise ArtefactError(f"The weights of {source} cannot be read: {first_line(error)}") from error
    # For configs, code and weights that do not fit together transformers raises errors of any kind.
    except Exception as error:
        if "ignore_mismatched_sizes" in str(error):
            raise ArtefactError(f"The weights of {source} do not have the shapes its config.json says.") from error
        raise known_cause(source, config, error) or unusable(source, options, error) from error
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
