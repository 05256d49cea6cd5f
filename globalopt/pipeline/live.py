"""Make a session from a model that is in memory; the session works on a copy of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from globalopt.errors import CalibrationError, UnsupportedModelError, UsageError
from globalopt.models.device import computed_dtype
from globalopt.models.finding import find_layers
from globalopt.models.layers import check_finite
from globalopt.models.loading import LoadedModel
from globalopt.models.refusals import DEQUANTISED, GGUF_METHOD, check_config, quantisation, without_quantisation
from globalopt.pipeline.options import ModelOptions, TextOptions
from globalopt.pipeline.reporter import Reporter
from globalopt.pipeline.session import Session, flush_denormals, sizes
from globalopt.pipeline.texts import cut, fill, read_source
from globalopt.pipeline.unreached import left_dense
from globalopt.runs.cache import Cache
from globalopt.text.reading import Text, join

IN_MEMORY = "text in memory"

Documents = str | Path | Sequence[str]
"""A text: what `--calibration` takes, a name, `self` or a mixture; a path; or documents as strings."""


def live_session(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Documents,
    eval_text: Documents | None,
    texts: TextOptions,
    seed: int,
    reporter: Reporter,
    allow_low_coverage: bool = False,
    cache: Cache | None = None,
) -> Session:
    """Make a session that works on a copy of `model`.

    The copy computes in float32 on a CPU and in the model's own type elsewhere, on the model's device.

    Args:
        text: to calibrate and search on; without `eval_text` a part of it is the test split.
        eval_text: the test split, or None.
        texts: number and length of the windows; its names of texts are not used.
        seed: of the windows.
        allow_low_coverage: whether a model may have few of its parameters in compressible layers.
        cache: keeps a text that the model writes itself; None keeps nothing.
    Raises:
        UsageError: an argument is not what it should be.
        UnsupportedModelError: the model is none that can be compressed, lies on several devices, or is not as its class
            makes it, with an adapter inside for example.
        CalibrationError, NumericalError: text or weights cannot be used.

    >>> from globalopt.pipeline.example import example_reporter, example_text, example_tokenizer
    >>> from globalopt.reference.tiny import tiny_llama
    >>> model, texts = tiny_llama(), TextOptions(nsamples=4, seqlen=16, eval_windows=2)
    >>> session = live_session(
    ...     model, example_tokenizer(), example_text(), None, texts, 0, example_reporter(), allow_low_coverage=True
    ... )
    >>> session.name, session.loaded.model is model, len(session.splits.test.windows)
    ('LlamaForCausalLM', False, 2)
    """
    device = _device(model)
    _check_tokenizer(tokenizer)
    _check_structure(model)
    flush_denormals()
    texts = replace(texts, calibration=named(text), eval_text=None if eval_text is None else named(eval_text))
    with reporter.stage("load", 2, "steps") as advance:
        stored = model.dtype
        loaded = LoadedModel(_copy(model, device), tokenizer, name_of(model), device, stored)
        method = quantisation(model.config) or ""
        quantised = "GGUF" if method == GGUF_METHOD else method
        layers = find_layers(loaded.model, allow_low_coverage)
        check_finite(layers)
        advance("model")
        source = read_source(texts, tokenizer, _in_memory(text), _in_memory(eval_text))
        cuts = cut(source, loaded, layers, sizes(loaded, texts, seed))
        advance("text")
    splits, own = fill(cuts, loaded, layers, texts.batch_size, reporter, cache)
    for note in left_dense(layers):
        reporter.note(note)
    options = ModelOptions(loaded.name, in_memory=True, allow_low_coverage=allow_low_coverage, device=str(device))
    return Session(options, texts, loaded, layers, splits, lambda: _copy(model, device), quantised, own)


def name_of(model: PreTrainedModel) -> str:
    """Return the name or path in a model's config, or the name of its class.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> name_of(tiny_llama())
    'LlamaForCausalLM'
    """
    return model.config.name_or_path or type(model).__name__


def named(text: Documents) -> str:
    """Return the name of a text, as in `--calibration`.

    >>> named("a.txt"), named(["One.", "Two."])
    ('a.txt', 'text in memory')
    """
    return str(text) if isinstance(text, str | Path) else IN_MEMORY


def _in_memory(text: Documents | None) -> Text | None:
    """Join documents in memory to a text; None for a name. `CalibrationError` if they are empty or no strings."""
    if text is None or isinstance(text, str | Path):
        return None
    documents = list(text)
    for number, document in enumerate(documents):
        if not isinstance(document, str):
            raise CalibrationError(
                f"Document {number} of the text is a {type(document).__name__}; give strings, or the name of a file."
            )
    return join(documents, IN_MEMORY)


def _copy(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Copy a model in evaluation mode, without gradients or cache, in the type that the pipeline computes in."""
    copied = copy.deepcopy(model)
    forget_quantisation(copied)
    # The cast is for the type checker, which misreads the decorator transformers puts on `to`.
    cast("nn.Module", copied).to(device, computed_dtype("auto", device, model.dtype))
    copied.eval().requires_grad_(False)
    copied.config.use_cache = False
    return copied


def forget_quantisation(model: PreTrainedModel) -> None:
    """Take from a model with dequantised weights what says that they were quantised: it could not be cast or saved.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> forget_quantisation(tiny_llama())
    """
    without_quantisation(model.config)
    for field in ("hf_quantizer", "quantization_method", "is_quantized"):
        if field in vars(model):
            delattr(model, field)


def _device(model: Any) -> torch.device:
    """Return the one device of a model; `UnsupportedModelError` if there are several."""
    if not isinstance(model, PreTrainedModel):
        merge = " Merge its adapter first: merge_and_unload()." if _of_peft(model) else ""
        raise UsageError(f"The model must be a transformers model; got a {type(model).__name__}.{merge}")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or (device := devices.pop()).type == "meta":
        raise UnsupportedModelError(
            f"{type(model).__name__} is not whole on one device. Compress it from its folder: the command line reads "
            "one block at a time."
        )
    return device


def _of_peft(module: Any) -> bool:
    """Tell whether a class of peft made a module."""
    return type(module).__module__.partition(".")[0] == "peft"


def _check_tokenizer(tokenizer: Any) -> None:
    """Check that a tokenizer is one of transformers; `UsageError` if not."""
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    inner = getattr(tokenizer, "tokenizer", None)
    hint = "Load one with AutoTokenizer.from_pretrained."
    if isinstance(inner, PreTrainedTokenizerBase):
        hint = "Give its attribute `tokenizer`."
    raise UsageError(f"The tokenizer must be a tokenizer of transformers; got a {type(tokenizer).__name__}. {hint}")


def _check_structure(model: PreTrainedModel) -> None:
    """Check that a model has the tensors that its class makes from its config, so that a saved copy can be loaded.

    Adapters, parametrisations and replaced modules put others there.

    Raises:
        UnsupportedModelError: it has not; names the first tensor.
    """
    name, config = type(model).__name__, copy.deepcopy(model.config)
    if (quantised := quantisation(config)) in (GGUF_METHOD, *DEQUANTISED):
        # transformers may have dequantised it as it was loaded, and the config still names what it was.
        config = without_quantisation(config)
    check_config(name_of(model), config)
    if adapted := next((path for path, module in model.named_modules() if _of_peft(module)), None):
        raise UnsupportedModelError(
            f"{name} has an adapter of peft inside, at {adapted}. Merge it or take it out first: merge_and_unload() or "
            "unload() of the PeftModel."
        )
    try:
        with init_empty_weights():
            made = type(model)(copy.deepcopy(config))
    # A class of the caller's own may take other arguments; it is then known only when the saved model is loaded.
    except Exception:
        return
    found, expected = ({n: tuple(x.shape) for n, x in m.state_dict().items()} for m in (model, made))
    if wrong := sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n)):
        if quantised is not None:
            check_config(name_of(model), model.config)
        raise UnsupportedModelError(
            f"The model is not as {name} makes it from its config: {wrong[0]} is {_shape(found.get(wrong[0]))} and not "
            f"{_shape(expected.get(wrong[0]))}. Take out what was put into it, or give the config of its shapes."
        )


def _shape(shape: tuple[int, ...] | None) -> str:
    """Write a shape, or that there is no tensor."""
    return "absent" if shape is None else str(shape)
