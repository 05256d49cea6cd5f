"""A session for a model that is in memory already; the model itself is only read."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from globalopt.errors import CalibrationError, UnsupportedModelError, UsageError
from globalopt.models.layers import check_finite, find_layers
from globalopt.models.loading import LoadedModel, computed_dtype
from globalopt.pipeline.options import ModelOptions, TextOptions
from globalopt.pipeline.reporter import Reporter
from globalopt.pipeline.session import Session, flush_denormals, sizes
from globalopt.text.reading import Text, join, read_text
from globalopt.text.splits import make_splits

IN_MEMORY = "text in memory"

Documents = str | Path | Sequence[str]
"""A text: a file, a folder or a hub data set by name, as `--calibration` takes it; or documents as strings."""


def live_session(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Documents,
    eval_text: Documents | None,
    texts: TextOptions,
    seed: int,
    reporter: Reporter,
    allow_low_coverage: bool = False,
) -> Session:
    """Make the session of a copy of `model`.

    The copy computes in float32 on a CPU and in the model's own type elsewhere, on the model's device.

    Args:
        text: to calibrate and search on; without `eval_text` a part of it is the test split.
        texts: sizes; its texts are not read.
    Raises:
        UsageError: an argument is not what it should be.
        UnsupportedModelError: the model is none that can be compressed, or lies on several devices.
        CalibrationError, NumericalError: text or weights cannot be used.
    """
    device = _device(model)
    flush_denormals()
    with reporter.stage("load", 2, "steps") as advance:
        stored = model.dtype
        loaded = LoadedModel(_copy(model, device), tokenizer, name_of(model), device, stored)
        layers = find_layers(loaded.model, allow_low_coverage)
        check_finite(layers)
        advance("model")
        calibration = read_documents(text)
        evaluation = None if eval_text is None else read_documents(eval_text)
        splits = make_splits(tokenizer, calibration, evaluation, **sizes(loaded, texts, seed))
        advance("text")
    options = ModelOptions(loaded.name, in_memory=True, allow_low_coverage=allow_low_coverage, device=str(device))
    named = {"calibration": calibration.spec, "eval_text": evaluation and evaluation.spec}
    texts = TextOptions(**{**vars(texts), **named})
    return Session(options, texts, loaded, layers, splits, lambda: _copy(model, device))


def name_of(model: PreTrainedModel) -> str:
    """Where a model says it is from, else its class."""
    return model.config.name_or_path or type(model).__name__


def read_documents(text: Documents) -> Text:
    """The text itself; `CalibrationError` where it is missing, empty or not made of strings."""
    if isinstance(text, str | Path):
        return read_text(str(text))
    documents = list(text)
    for number, document in enumerate(documents):
        if not isinstance(document, str):
            raise CalibrationError(
                f"Document {number} of the text is a {type(document).__name__}; give strings, or the name of a file."
            )
    return join(documents, IN_MEMORY)


def _copy(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """A copy in eval mode, without gradients or cache, in the type that the pipeline computes in."""
    copied = copy.deepcopy(model)
    # The cast is for the type checker, which misreads the decorator transformers puts on `to`.
    cast("nn.Module", copied).to(device, computed_dtype("auto", device, model.dtype))
    copied.eval().requires_grad_(False)
    copied.config.use_cache = False
    return copied


def _device(model: Any) -> torch.device:
    """The one device of a model."""
    if not isinstance(model, PreTrainedModel):
        raise UsageError(f"The model must be a transformers model; got a {type(model).__name__}.")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or (device := devices.pop()).type == "meta":
        raise UnsupportedModelError(
            f"{type(model).__name__} is not whole on one device. Compress it from its folder: the command line reads "
            "one block at a time."
        )
    return device
