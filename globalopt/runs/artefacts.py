"""The table of artefacts: what the stages of a run write, in which folder, by which key, and in which form.

An artefact is one row. A new one needs a row here and nothing else: reading, writing, checking against its key,
deciding what is missing, and addressing by what made it (`runs.cache`) all follow from the row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from globalopt.errors import ArtefactError, GlobalOptError
from globalopt.runs import record_codecs, tensor_codecs
from globalopt.runs.files import read_json, read_tensors, write_json, write_tensors
from globalopt.runs.packing import unpack
from globalopt.values.curves import LayerCurves
from globalopt.values.decomposition import Decomposition
from globalopt.values.family import Family
from globalopt.values.layer import LayerSpec
from globalopt.values.metrics import WindowLosses
from globalopt.values.results import Summary
from globalopt.values.samples import Samples
from globalopt.values.scores import Scorecard

K = TypeVar("K")
T = TypeVar("T")

AGAIN = "Delete it and run the command again."


class Stage(StrEnum):
    """Describe the stages of a run, in order. The artefacts of a stage share one folder, addressed by what made them.

    >>> Stage("spans").name
    'SPANS'
    """

    DEQUANTISED = "dequantised"
    SELF_TEXT = "self-text"
    GRAMS = "grams"
    LABELS = "labels"
    PROFILES = "profiles"
    SPECTRA = "spectra"
    SPANS = "spans"
    ANCHORS = "anchors"
    METRICS = "metrics"
    GAPS = "solver-gaps"
    ROUNDING = "rounding"
    PREDICTIONS = "predictions"
    CORRECTIONS = "corrections"
    OBJECTIVE = "objective"
    ALLOCATION = "allocation"
    REFINEMENT = "refinement"
    MODEL_MATCHING = "model-matching"
    RESULT = "result"


# ------------------------------------------------------------------------------------------------- keys


@dataclass(frozen=True)
class Key(Generic[K]):
    """Describe how artefacts of one kind are told apart.

    Args:
        name: of the file without its suffix.
        record: JSON-able; written into the artefact, and compared when it is read.

    >>> LAYER.record(LayerSpec("up", 0, "in", "up", d_out=2, d_in=3))
    {'name': 'up', 'd_out': 2, 'd_in': 3}
    """

    name: Callable[[K], str]
    record: Callable[[K], Mapping[str, Any]]


LAYER: Key[LayerSpec] = Key(
    lambda spec: spec.name, lambda spec: {"name": spec.name, "d_out": spec.d_out, "d_in": spec.d_in}
)
NAME: Key[str] = Key(lambda name: name, lambda name: {"name": name})
SITE: Key[str] = Key(lambda site: site, lambda site: {"site": site})
BLOCK: Key[int] = Key(lambda block: f"block.{block}", lambda block: {"block": block})
BATCH: Key[int] = Key(lambda batch: f"batch.{batch}", lambda batch: {"batch": batch})


def only(name: str) -> Key[None]:
    """Make the key of an artefact that exists once: a file `name`.

    >>> only("summary").name(None)
    'summary'
    """
    return Key(lambda _: name, lambda _: {})


# ------------------------------------------------------------------------------------------------- forms


@dataclass(frozen=True)
class Form(Generic[K, T]):
    """Describe how a value is written as a file and read back; `write` and `read` get the key and its record.

    >>> SUMMARY.form.suffix
    '.json'
    """

    suffix: str
    write: Callable[[Path, K, Mapping[str, Any], T], None]
    read: Callable[[Path, K, Mapping[str, Any]], T]


def tensors(
    encode: Callable[[T], tuple[Mapping[str, Tensor], Mapping[str, Any]]],
    decode: Callable[[K, Mapping[str, Tensor], Mapping[str, Any]], T],
    parts: Sequence[str] = (),
    metadata: Sequence[str] = (),
) -> Form[K, T]:
    """Make the form of a safetensors file with metadata.

    Args:
        encode: value -> tensors and JSON-able metadata. decode: the way back.
        parts, metadata: names that must be there; an `ArtefactError` names those that are not.

    >>> import torch
    >>> form = tensors(lambda x: ({"x": x}, {}), lambda key, found, facts: found["x"], parts=("x",))
    >>> form.write(Path("x.safetensors"), "up", {"name": "up"}, torch.ones(2))
    >>> form.read(Path("x.safetensors"), "up", {"name": "up"})
    tensor([1., 1.])
    """

    def write(path: Path, key: K, record: Mapping[str, Any], value: T) -> None:
        encoded, facts = encode(value)
        write_tensors(path, encoded, {**facts, **record})

    def read(path: Path, key: K, record: Mapping[str, Any]) -> T:
        found, facts = read_tensors(path)
        facts = _without_key(path, facts, record)
        if missing := [*(set(parts) - found.keys()), *(set(metadata) - facts.keys())]:
            raise ArtefactError(f"{path} lacks {', '.join(sorted(missing))}. {AGAIN}")
        return _decoded(path, lambda: decode(key, found, facts))

    return Form(".safetensors", write, read)


def json(encode: Callable[[T], Mapping[str, Any]], decode: Callable[[K, Mapping[str, Any]], T]) -> Form[K, T]:
    """Make the form of a JSON file that holds a mapping.

    Args:
        encode: value -> JSON-able mapping. decode: the way back; a `KeyError` of it names what is missing.

    >>> form = json(lambda x: {"x": x}, lambda key, found: found["x"])
    >>> form.write(Path("x.json"), "up", {"name": "up"}, 0.5)
    >>> form.read(Path("x.json"), "down", {"name": "down"})
    Traceback (most recent call last):
        ...
    globalopt.errors.ArtefactError: x.json holds {'name': 'up'}, expected {'name': 'down'}. Delete it and ...
    """

    def write(path: Path, key: K, record: Mapping[str, Any], value: T) -> None:
        write_json(path, {**record, **encode(value)})

    def read(path: Path, key: K, record: Mapping[str, Any]) -> T:
        found = _without_key(path, read_json(path, AGAIN), record)
        return _decoded(path, lambda: decode(key, found))

    return Form(".json", write, read)


def values(kind: type[T]) -> Form[Any, T]:
    """Make the form of a JSON file that holds a dataclass, or a tuple of them, as `asdict` writes it.

    >>> form = values(tuple[WindowLosses, ...])
    >>> losses = (WindowLosses("test", "9f2c", nll=(3.2,), dense_nll=(3.1,), kl=(0.08,)),)
    >>> form.write(Path("windows.json"), None, {}, losses)
    >>> form.read(Path("windows.json"), None, {}) == losses
    True
    """

    def plain(value: Any, record: Mapping[str, Any]) -> Any:
        # A list has no place for a key: of what is written as one there is one in a stage.
        return [asdict(one) for one in value] if isinstance(value, tuple | list) else {**record, **asdict(value)}

    def write(path: Path, key: Any, record: Mapping[str, Any], value: T) -> None:
        write_json(path, plain(value, record))

    def read(path: Path, key: Any, record: Mapping[str, Any]) -> T:
        found = read_json(path, AGAIN)
        return validated(path, kind, _without_key(path, found, record) if record else found)

    return Form(".json", write, read)


def _without_key(path: Path, found: Any, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was `found` in `path` less its key; `ArtefactError` if it is no mapping, or of another key."""
    if not isinstance(found, dict):
        raise ArtefactError(f"{path} is broken. {AGAIN}")
    if (held := {name: found.get(name) for name in record}) != record:
        raise ArtefactError(f"{path} holds {held}, expected {dict(record)}. {AGAIN}")
    return {name: value for name, value in found.items() if name not in record}


def _decoded(path: Path, decode: Callable[[], T]) -> T:
    try:
        return decode()
    except KeyError as cause:
        raise ArtefactError(f"{path} lacks {cause.args[0]}. {AGAIN}") from None
    except (TypeError, ValueError, IndexError, AttributeError, GlobalOptError):
        raise ArtefactError(f"{path} is broken. {AGAIN}") from None


def read_matched_layer(path: Path, name: str) -> Decomposition:
    """Read one layer of a `MATCHED_BLOCK` or `MATCHED_MODEL`, whose other layers are not read.

    >>> import torch
    >>> from globalopt.runs.records import Matched
    >>> value = Decomposition(torch.eye(2), torch.zeros(2, 0), torch.zeros(0, 2))
    >>> MATCHED_BLOCK.form.write(Path("matched.safetensors"), 0, {}, Matched({"up": value, "down": value}, {}, {}))
    >>> read_matched_layer(Path("matched.safetensors"), "up").nnz
    2
    """
    end = f":{name}"
    found, _ = read_tensors(path, end)
    return _decoded(path, lambda: unpack(found, end))


def validated(path: Path, kind: type[T], found: Any) -> T:
    """Return what was `found` in `path` as a `kind`; `ArtefactError` naming the first field that does not fit.

    >>> validated(Path("x.json"), tuple[int, ...], [1, 2])
    (1, 2)
    """
    try:
        return TypeAdapter(kind).validate_python(found)
    except ValidationError as cause:
        first = cause.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtefactError(f"{path} does not fit: {where}: {first['msg']}. {AGAIN}") from None


# ------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Artefact(Generic[K, T]):
    """One kind of artefact: a row of the table.

    Args:
        folder: below the stage's folder; empty for a file in it.
        key: what tells artefacts of the kind apart.
        form: of the file.
        stage: that makes it.

    >>> ANCHORS.during(Stage.METRICS).stage.value
    'metrics'
    """

    folder: str
    key: Key[K]
    form: Form[K, T]
    stage: Stage

    def during(self, stage: Stage) -> Artefact[K, T]:
        """Return the same kind of artefact, made in another stage."""
        return replace(self, stage=stage)


_IDS = tensors(lambda ids: ({"ids": ids}, {}), lambda _, found, facts: found["ids"], ("ids",))
_OWN_TEXT = tensors(
    tensor_codecs.encode_own_text, tensor_codecs.decode_own_text, ("windows",), ("counts", "order", "prefix", "seed")
)
_GRAM = tensors(tensor_codecs.encode_gram, tensor_codecs.decode_gram, (), ("tokens",))
_PROFILE = json(record_codecs.encode_profile, record_codecs.decode_profile)
_CHOICE = json(record_codecs.encode_choice, record_codecs.decode_choice)
_SPAN = tensors(tensor_codecs.encode_span, tensor_codecs.decode_span, ("U", "s", "Vh", "scale", "rows"), ("stats",))
_ANCHORS = tensors(tensor_codecs.encode_anchors, tensor_codecs.decode_anchors, (), ("anchors",))
_ROUNDING = json(record_codecs.encode_rounding, record_codecs.decode_rounding)
_NUMBERS = json(record_codecs.encode_numbers, record_codecs.decode_numbers)
_PREDICTION = tensors(tensor_codecs.encode_prediction, tensor_codecs.decode_prediction, (), ("options",))
_CORRECTIONS = json(record_codecs.encode_corrections, record_codecs.decode_corrections)
_ATTRIBUTION = tensors(
    tensor_codecs.encode_attribution, tensor_codecs.decode_attribution, ("losses", "shares"), ("layers",)
)
_LOSSES = json(record_codecs.encode_losses, record_codecs.decode_losses)
_MAPPING = json(dict, lambda _, record: record)
_ALLOCATED = json(record_codecs.encode_allocated, record_codecs.decode_allocated)
_CODED = tensors(tensor_codecs.encode_coded, tensor_codecs.decode_coded, ("codes", "scales"), ("rows", "width", "bits"))
_LAYER = tensors(tensor_codecs.encode_layer, tensor_codecs.decode_layer, ("values", "U", "V"))
_MATCHED = tensors(tensor_codecs.encode_matched, tensor_codecs.decode_matched, (), ("layers",))

# The table: folder below the stage's own, key, form, stage.
WRITTEN = Artefact("", BATCH, _IDS, Stage.SELF_TEXT)
OWN_TEXT = Artefact("", only("self-text"), _OWN_TEXT, Stage.RESULT)
GRAM = Artefact("", SITE, _GRAM, Stage.GRAMS)
CURVES = Artefact("curves", NAME, values(LayerCurves), Stage.SPECTRA)
PROFILE = Artefact("", LAYER, _PROFILE, Stage.PROFILES)
OUTPUT_GRAM = Artefact("", LAYER, _GRAM, Stage.LABELS)
BLOCK_OUTPUT_GRAM = Artefact("", BLOCK, _GRAM, Stage.LABELS)
PROBED = Artefact("probed", LAYER, _ANCHORS, Stage.METRICS)
METRIC_CHOICE = Artefact("", LAYER, _CHOICE, Stage.METRICS)
SPAN = Artefact("", LAYER, _SPAN, Stage.SPANS)
DIRECTIONS = Artefact("directions", LAYER, _SPAN, Stage.SPANS)
ANCHORS = Artefact("", LAYER, _ANCHORS, Stage.ANCHORS)
ROUNDING = Artefact("", LAYER, _ROUNDING, Stage.ROUNDING)
SOLVER_GAP = Artefact("", LAYER, _NUMBERS, Stage.GAPS)
PREDICTION = Artefact("", LAYER, _PREDICTION, Stage.PREDICTIONS)
SHARES = Artefact("shares", NAME, _ATTRIBUTION, Stage.CORRECTIONS)
LOSSES_ALONE = Artefact("alone", NAME, _LOSSES, Stage.CORRECTIONS)
CORRECTIONS = Artefact("", only("corrections"), _CORRECTIONS, Stage.CORRECTIONS)
TEACHER = Artefact("", only("teacher"), _MAPPING, Stage.OBJECTIVE)
EMBEDDING_LOSS = Artefact("embeddings", NAME, _MAPPING, Stage.OBJECTIVE)
ALLOCATED = Artefact("", only("allocation"), _ALLOCATED, Stage.ALLOCATION)
SOLVED_LAYER = Artefact("layers", LAYER, _LAYER, Stage.REFINEMENT)
EMBEDDING = Artefact("embeddings", NAME, _CODED, Stage.REFINEMENT)
MATCHED_BLOCK = Artefact("matched", BLOCK, _MATCHED, Stage.REFINEMENT)
MATCHED_MODEL = Artefact("matched", only("model"), _MATCHED, Stage.MODEL_MATCHING)
SUMMARY = Artefact("", only("summary"), values(Summary), Stage.RESULT)
WINDOWS = Artefact("", only("windows"), values(tuple[WindowLosses, ...]), Stage.RESULT)
SAMPLES = Artefact("", only("samples"), values(Samples), Stage.RESULT)
SCORES = Artefact("", only("eval"), values(Scorecard), Stage.RESULT)
FAMILY = Artefact("", only("family"), values(Family), Stage.RESULT)
