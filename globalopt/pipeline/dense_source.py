"""Choose the checkpoint that the dense model is loaded from: a quantised model is dequantised into the cache once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from filelock import FileLock

from globalopt.errors import ArtefactError, UsageError
from globalopt.models.quantised import STEPS, QuantisedModel, find_quantised
from globalopt.pipeline.options import ModelOptions
from globalopt.pipeline.reporter import Reporter
from globalopt.reference import reference_folder
from globalopt.runs.artefacts import Stage
from globalopt.runs.cache import Address, Cache
from globalopt.runs.files import read_text, write_text

VERSION = 1
"""Of the dequantisation; raised whenever its result changes."""
MODEL = "model"
QUANTISATION = "quantisation.txt"
_LOCK = "writing.lock"


@dataclass(frozen=True)
class DenseSource:
    """Name the checkpoint of the dense model.

    Args:
        name: folder or hub id.
        quantisation: what the weights were quantised with before they were dequantised, such as "GGUF Q4_1"; "" where
            they were not.

    >>> DenseSource("meta-llama/Llama-3.2-1B").quantisation
    ''
    """

    name: str
    quantisation: str = ""


def dense_source(options: ModelOptions, cache: Cache | None, reporter: Reporter) -> DenseSource:
    """Return the checkpoint of the model that the options name; of a quantised one the dequantised copy in the cache.

    The copy is made where it is missing. It is addressed by the content of the quantised files, so a file that moves is
    not dequantised again, and one that changes is.

    Args:
        cache: of the run; None shares nothing.
    Raises:
        UsageError: the model is quantised and there is no cache; or as `find_gguf`.
        ArtefactError, UnsupportedModelError: the model cannot be dequantised, or the copy cannot be written.

    >>> from pathlib import Path
    >>> from globalopt.models.example import example_gguf
    >>> from globalopt.pipeline.example import example_reporter
    >>> found = dense_source(ModelOptions(str(example_gguf())), Cache(Path("cache")), example_reporter())
    >>> found.quantisation, (Path(found.name) / "config.json").is_file()
    ('GGUF Q8_0', True)
    """
    if options.model is None:
        return DenseSource(str(reference_folder()))
    model = find_quantised(options.model, options.gguf_file, options.trust_remote_code)
    if model is None:
        return DenseSource(options.model)
    if cache is None:
        raise UsageError(
            f"{options.model} is quantised, and its dequantised copy is kept in the cache: leave out --no-cache, or "
            "choose a folder with --cache."
        )
    with reporter.stage("dequantise", 1 + STEPS, "steps") as advance, cache.used():
        found = _dequantised(model, options.model, cache, advance)
    reporter.note(f"{options.model} is quantised ({found.quantisation}); its dequantised copy is {found.name}.")
    return found


def _dequantised(model: QuantisedModel, name: str, cache: Cache, advance: Callable[[str], None]) -> DenseSource:
    """Find the dequantised copy in the cache, or make it."""
    try:
        sha256 = model.sha256()
    except OSError as cause:
        raise ArtefactError(f"Cannot read {model.place}: {cause.strerror or cause}.") from None
    inputs = {"sha256": sha256, "versions": {package: _version(package) for package in ("transformers", "gguf")}}
    folder = cache.open(Address(Stage.DEQUANTISED, VERSION, inputs), name)
    advance("identity")
    # A process that asks for the same meanwhile waits; the lock of one that is killed is free.
    with FileLock(folder / _LOCK):
        if not (folder / MODEL).is_dir():
            write_text(folder / QUANTISATION, model.quantisation)
            model.write(folder / MODEL, advance)
    return DenseSource(str(folder / MODEL), read_text(folder / QUANTISATION))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
