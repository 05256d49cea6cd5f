"""Load a model and cut its texts into windows: the session that every job works on."""

from __future__ import annotations

import math
import platform
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from globalopt.analysis.collect import ANALYSED
from globalopt.errors import ArtefactError, UsageError
from globalopt.export.loading import is_adapter_export, load_adapter_export, unpacked
from globalopt.machine import ranks
from globalopt.machine.memory import available, resident
from globalopt.models.batch import Batch
from globalopt.models.block_runner import BlockRunner
from globalopt.models.context_length import context_length
from globalopt.models.decoder import token_embedding
from globalopt.models.finding import find_layers
from globalopt.models.identity import model_fingerprint, model_sha256
from globalopt.models.layers import ModelLayers, check_finite
from globalopt.models.loading import LoadedModel, load_model
from globalopt.models.portions import Portion
from globalopt.models.streaming import dtype_of, lazy_blocks
from globalopt.pipeline.dense_source import DenseSource, dense_source
from globalopt.pipeline.options import REFERENCE, ModelOptions, TextOptions
from globalopt.pipeline.reporter import Reporter
from globalopt.pipeline.texts import cut, fill, read_source
from globalopt.pipeline.unreached import left_dense
from globalopt.runs.cache import Cache
from globalopt.runs.folder import Run
from globalopt.text.windows import Split, Splits
from globalopt.values.own_text import OwnText

WORKING_BLOCKS = 4
"""Memory of a block, its Grams and a solver's own tensors, in units of the block."""


@dataclass(frozen=True, eq=False)
class Session:
    """Hold a loaded model with its layers, and the windows of its texts.

    Args:
        model_options, text_options: as given.
        loaded: the model and its tokenizer.
        layers: its compressible layers.
        splits: windows of calibration, selection, validation and test.
        live: makes a copy of the dense model, for a model in memory that cannot be loaded again; else None.
        quantisation: what the weights were quantised with before they were dequantised; "" where they were not.
        own_text: what the dense model wrote for its calibration, or None.

    >>> from globalopt.pipeline.example import example_session
    >>> session = example_session()
    >>> session.name, len(session.layers.specs), len(session.splits.calibration.windows)
    ('LlamaForCausalLM', 14, 4)
    >>> session.runner(Path("run")).layers is session.layers
    True
    """

    model_options: ModelOptions
    text_options: TextOptions
    loaded: LoadedModel
    layers: ModelLayers
    splits: Splits
    live: Callable[[], PreTrainedModel] | None = None
    quantisation: str = ""
    own_text: OwnText | None = None

    @property
    def name(self) -> str:
        """Return the name of the model in reports."""
        return self.model_options.model or REFERENCE

    def dense(self) -> PreTrainedModel:
        """Load or copy the dense model again; stages change the session's own."""
        if self.live is not None:
            return self.live()
        return load_from(self.loaded.name, self.model_options, like=self.loaded.model).model

    def release(self) -> None:
        """Free the weights of the session's model, which nothing reads once the result is saved.

        A lazily loaded model has none but those outside the blocks, which the models that are loaded later share.
        """
        model = self.loaded.model
        if lazy_blocks(model) is None:
            for module in model.modules():
                for name, parameter in list(module.named_parameters(recurse=False)):
                    setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))

    @property
    def fingerprint(self) -> str:
        """Hash the type of the model and the names and shapes of its layers, which a budget file must agree with."""
        return model_fingerprint(self.layers)

    @cached_property
    def model_digest(self) -> str:
        """Hash all that the forward pass of the dense model uses; to be read before a stage changes the model."""
        return model_sha256(self.layers, self.loaded.tokenizer)

    def batches(self, split: Split, most: int | None = None, windows: int | None = None) -> list[Batch]:
        """Split windows into batches of the batch size of the options, or of `most` windows if that is less.

        Args:
            windows: the first windows of the split alone, in batches of about equal size of which every process can
                run as many; None is all of them.
        """
        size = self.text_options.batch_size
        if windows is not None and ranks.several():
            share = math.ceil(min(windows, len(split.windows)) / ranks.count())
            size = math.ceil(share / math.ceil(share / size))
        return [Batch(some) for some in split.windows[:windows].split(size if most is None else min(size, most))]

    def runner(self, run: Path, most: int | None = None) -> BlockRunner:
        """Make a runner of the blocks on the calibration text, of which every process runs its own windows.

        Args:
            run: folder for hidden states that do not fit in memory.
            most: largest number of windows per batch; None is the batch size of the options.
        """
        split = self.splits.calibration
        portion, batches = self.portion(most)
        return BlockRunner(self.layers, batches, self.scratch(run, split), portion)

    def portion(self, most: int | None = None) -> tuple[Portion, list[Batch]]:
        """Choose the calibration windows of this process, in batches of `most` windows of all processes together.

        Args:
            most: None is the batch size of the options, where a batch need not be one of all processes.
        """
        windows, size = self.splits.calibration.windows, self.text_options.batch_size
        size = size if most is None else min(size, most)
        portion = Portion.own(len(windows), size, ANALYSED if most is None else 1, together=most is None)
        return portion, [Batch(windows[list(numbers)]) for numbers in portion.windows]

    def scratch(self, run: Path, split: Split) -> Path | None:
        """Return `run` if the hidden states of a split before every block do not fit in memory, else None."""
        lazy = self.layers.lazy
        if lazy is None:
            return None
        blocks = self.layers.blocks
        item = lazy.precision.computed.itemsize
        width = token_embedding(self.loaded.model).embedding_dim
        states = -(-split.windows.numel() // ranks.count()) * width * (len(blocks) + 1) * item
        working = WORKING_BLOCKS * max(sum(p.numel() for p in block.parameters()) for block in blocks) * item
        limit = self.model_options.limit
        room = available(lazy.device) if limit is None else limit - resident()
        return run if states + working > room else None

    def identity(self) -> dict[str, Any]:
        """Return all that decides results apart from the method: model, windows, precision."""
        return {
            "model": self.model_digest,
            "dtype": str(dtype_of(self.loaded.model)).removeprefix("torch."),
            "splits": {split.name: split.sha256 for split in self.splits},
            "batch_size": self.text_options.batch_size,
        }

    def metadata(self, command: str) -> dict[str, Any]:
        """Return the metadata of a run beside its identity: what is needed to repeat or to evaluate it."""
        return {
            "command": command,
            "model": self.name,
            "quantisation": self.quantisation,
            "model_options": asdict(self.model_options),
            "text_options": asdict(self.text_options),
            "splits": {split.name: split.record() for split in self.splits},
            "versions": versions(),
        }


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide results.

    >>> "torch" in versions()
    True
    """
    packages = ("globalopt", "torch", "transformers", "scipy", "numpy")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


def set_up(
    model: ModelOptions,
    text: TextOptions,
    seed: int,
    reporter: Reporter,
    cache: Cache | None = None,
    written: OwnText | None = None,
) -> Session:
    """Load a model, and cut its text into splits; the process rounds numbers below 1e-38 to zero from then on.

    Args:
        seed: of the windows.
        cache: keeps the dequantised copy of a quantised model (`dense_source`), and the text that the model writes
            itself; None keeps nothing.
        written: the text that a model wrote itself in an earlier run; None lets it write where the options say so.
    Raises:
        UsageError: a model was given without a text.
        ArtefactError, CalibrationError, UnsupportedModelError, NumericalError: model or text cannot be used.

    >>> from globalopt.pipeline.reporter import Reporter
    >>> from reports import QuietProgress
    >>> texts = TextOptions(nsamples=4, seqlen=16, eval_windows=2)
    >>> session = set_up(ModelOptions(), texts, seed=0, reporter=Reporter(QuietProgress()))
    >>> session.splits.calibration.windows.shape
    torch.Size([4, 16])
    """
    flush_denormals()
    # Before a long load: a mixture that cannot be read is refused.
    _ = text.parts
    dense = dense_source(model, cache, reporter)
    with reporter.stage("load", 2, "steps") as advance:
        loaded, layers = load(dense, model, tokens=text.nsamples * text.seqlen)
        advance("model")
        if model.model is not None and text.calibration is None:
            raise UsageError(
                "A model of your own needs a text of its own: add --calibration FILE (.txt, .jsonl, .parquet), a "
                "folder saved by `datasets`, a hub data set, or `self`, which the model writes."
            )
        source = read_source(text, loaded.tokenizer)
        cuts = cut(source, loaded, layers, sizes(loaded, text, seed), written)
        advance("text")
    splits, own = fill(cuts, loaded, layers, text.batch_size, reporter, cache)
    if model.model is None:
        reporter.note("No model given: using the bundled reference model (a 7M-parameter Llama, WikiText-2).")
    for note in left_dense(layers):
        reporter.note(note)
    return Session(model, text, loaded, layers, splits, quantisation=dense.quantisation, own_text=own)


def flush_denormals() -> None:
    """Round numbers below 1e-38 to zero, in this process from then on.

    Gradients of a loss of a millionth of a nat get that small, and the backward pass of attention took six times as
    long with them. To be called before the first multiplication: a thread inherits the mode of the one that starts it.

    >>> flush_denormals()
    """
    torch.set_flush_denormal(True)


def load(source: DenseSource, options: ModelOptions, tokens: int = 0) -> tuple[LoadedModel, ModelLayers]:
    """Load a model, find its layers, and check that its weights are finite.

    Args:
        source: of the model that the options name.
        tokens: calibration tokens, whose hidden states must fit beside the model; see `load_model`.

    >>> from globalopt.reference import reference_folder
    >>> loaded, layers = load(DenseSource(str(reference_folder())), ModelOptions())
    >>> len(layers.blocks)
    8
    """
    loaded = load_from(source.name, options, tokens)
    layers = find_layers(loaded.model, options.allow_low_coverage)
    check_finite(layers)
    return loaded, layers


def load_from(source: str, options: ModelOptions, tokens: int = 0, like: PreTrainedModel | None = None) -> LoadedModel:
    """Load the model in `source` with the precision, device and memory limit of the options.

    Packed and adapter exports become ordinary models of the same weights.

    Args:
        tokens: calibration tokens, whose hidden states must fit beside the model; see `load_model`.
        like: a model in memory; the new one is loaded lazily if that one was, else whole.

    >>> from globalopt.reference import reference_folder
    >>> load_from(str(reference_folder()), ModelOptions(dtype="bfloat16")).model.dtype
    torch.bfloat16
    """
    if is_adapter_export(source):
        return load_adapter_export(Path(source), options.dtype, options.device, options.trust_remote_code)
    lazily = None if like is None else lazy_blocks(like) is not None
    loaded = load_model(
        source, options.dtype, options.device, options.trust_remote_code, options.limit, tokens, lazily, like
    )
    return unpacked(loaded)


def sizes(loaded: LoadedModel, text: TextOptions, seed: int) -> dict[str, Any]:
    """Return the arguments of `make_splits` for a model: number, length, beginning and seed of windows.

    >>> from globalopt.pipeline.example import example_session
    >>> sizes(example_session().loaded, TextOptions(nsamples=4, seqlen=16), seed=0)["nsamples"]
    4
    """
    return {
        "nsamples": text.nsamples,
        "seqlen": text.seqlen,
        "seed": seed,
        "eval_windows": text.eval_windows,
        "bos": text.bos,
        **limits(loaded),
    }


def limits(loaded: LoadedModel) -> dict[str, Any]:
    """Return the limits of a model on its windows, as the arguments `max_length` and `vocabulary` of `make_splits`.

    >>> from globalopt.reference import reference_folder
    >>> limits(load_from(str(reference_folder()), ModelOptions()))
    {'max_length': 512, 'vocabulary': 4096}
    """
    model = loaded.model
    rows, head = token_embedding(model).num_embeddings, model.get_output_embeddings()
    # Every token is both read and predicted: an id must have a row in the embeddings and one in the head.
    return {
        "max_length": context_length(model.config),
        "vocabulary": min(rows, getattr(head, "out_features", rows)),
    }


def run_command() -> str:
    """Return the command line, with the program's own path reduced to its name.

    >>> run_command().startswith("globalopt")
    True
    """
    return shlex.join(["globalopt", *sys.argv[1:]])


def recorded(folder: Path) -> tuple[Run, ModelOptions, TextOptions]:
    """Open a run, and read the options of its model and text; `ArtefactError` if its manifest lacks them.

    >>> facts = {"model_options": {"model": "llama"}, "text_options": {"seqlen": 64}}
    >>> Run.start(Path("half"), {"seed": 0}, facts).close()
    >>> _, models, texts = recorded(Path("half"))
    >>> models.model, texts.seqlen
    ('llama', 64)
    """
    run = Run.open(folder)
    facts = run.manifest.get("facts", {})
    try:
        # A run that does not say so is older than the option.
        return run, ModelOptions(**facts["model_options"]), TextOptions(**{"bos": "no", **facts["text_options"]})
    except (KeyError, TypeError):
        raise ArtefactError(f"{folder}: the manifest does not say which model and text it was made with.") from None
