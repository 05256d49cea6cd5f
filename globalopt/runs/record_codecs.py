"""Codecs of values without tensors: each kind as a JSON-able mapping, and back.

`encode_x(value)` gives what is written; `decode_x(key, record)` makes the value from what was read. What is missing or
of the wrong kind raises one of Python's own errors, which the caller (`runs.artefacts`) turns into a sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter

from globalopt.runs.records import Allocated, CheckedLoss, MetricChoice
from globalopt.runs.target_codec import decode_target, encode_target
from globalopt.values.budget import Target
from globalopt.values.corrections import Corrections
from globalopt.values.embeddings import Embedding
from globalopt.values.layer import LayerSpec
from globalopt.values.problem import Profile
from globalopt.values.rounding_losses import RoundingLosses
from globalopt.values.search_record import Outcome, Search

Record = Mapping[str, Any]


def encode_choice(choice: MetricChoice) -> Record:
    """Encode a choice of metric.

    >>> encode_choice(MetricChoice((CheckedLoss(Target(0, 2), predicted=0.1, weighted=0.2, plain=0.3),)))
    {'checked': [[0, 2, None, 0.1, 0.2, 0.3]]}
    """
    return {"checked": [[*encode_target(c.target), c.predicted, c.weighted, c.plain] for c in choice.checked]}


def decode_choice(spec: LayerSpec, record: Record) -> MetricChoice:
    """Decode a choice of metric.

    >>> record = {"checked": [[0, 2, None, 0.1, 0.2, 0.3]]}
    >>> decode_choice(LayerSpec("up", 0, "in", "up", 2, 2), record).losses
    {Target(rank=0, nnz=2): 0.2}
    """
    return MetricChoice(
        tuple(CheckedLoss(decode_target(words[:-3]), *map(float, words[-3:])) for words in record["checked"])
    )


def encode_numbers(numbers: Mapping[Target, float]) -> Record:
    """Encode one number per target.

    >>> encode_numbers({Target(1, 0): 0.5})
    {'by_target': [[1, 0, None, 0.5]]}
    """
    return {"by_target": [[*encode_target(target), number] for target, number in numbers.items()]}


def decode_numbers(spec: LayerSpec, record: Record) -> dict[Target, float]:
    """Decode one number per target.

    >>> decode_numbers(LayerSpec("up", 0, "in", "up", 2, 2), {"by_target": [[1, 0, None, 0.5]]})
    {Target(rank=1, nnz=0): 0.5}
    """
    return {decode_target(words[:-1]): float(words[-1]) for words in record["by_target"]}


def encode_rounding(losses: RoundingLosses) -> Record:
    """Encode rounding losses; JSON has no whole numbers as keys.

    >>> encode_rounding(RoundingLosses((1.0,), {8: (0.1,)}, (), {}, {8: 0.2}))["values"]
    {'8': (0.1,)}
    """
    by_bits = {"values": losses.values, "factors": losses.factors, "noise": losses.noise}
    named = {part: {str(bits): row for bits, row in by.items()} for part, by in by_bits.items()}
    return {"kept": losses.kept, "ranks": losses.ranks, "ranked": losses.ranked, "share": losses.share, **named}


def decode_rounding(spec: LayerSpec, record: Record) -> RoundingLosses:
    """Decode rounding losses.

    >>> losses = RoundingLosses((1.0,), {8: (0.1,)}, (), {}, {8: 0.2})
    >>> decode_rounding(LayerSpec("up", 0, "in", "up", 2, 2), encode_rounding(losses)) == losses
    True
    """
    values, factors = (
        {int(bits): tuple(map(float, row)) for bits, row in record[part].items()} for part in ("values", "factors")
    )
    noise = {int(bits): float(loss) for bits, loss in record["noise"].items()}
    kept, ranks = tuple(map(float, record["kept"])), tuple(map(int, record["ranks"]))
    return RoundingLosses(kept, values, ranks, factors, noise, float(record["ranked"]), float(record["share"]))


def encode_profile(profile: Profile) -> Record:
    """Encode a profile; JSON has no whole numbers as keys.

    >>> encode_profile(Profile({3: 0.02}, alpha=2.5))
    {'outliers': {'3': 0.02}, 'alpha': 2.5}
    """
    return {
        "outliers": {str(threshold): share for threshold, share in profile.outliers.items()},
        "alpha": profile.alpha,
    }


def decode_profile(spec: LayerSpec, record: Record) -> Profile:
    """Decode a profile.

    >>> decode_profile(LayerSpec("up", 0, "in", "up", 2, 2), {"outliers": {"3": 0.02}, "alpha": 2.5}).outliers
    {3: 0.02}
    """
    return Profile({int(m): float(share) for m, share in record["outliers"].items()}, float(record["alpha"]))


def encode_corrections(corrections: Corrections) -> Record:
    """Encode corrections of predicted losses.

    >>> encode_corrections(Corrections({"up": ((0.5, 0.7),)}, losses=(0.1,)))
    {'points': {'up': ((0.5, 0.7),)}, 'losses': (0.1,)}
    """
    return {"points": dict(corrections.points), "losses": corrections.losses}


def decode_corrections(key: None, record: Record) -> Corrections:
    """Decode corrections of predicted losses.

    >>> decode_corrections(None, {"points": {"up": [[0.5, 0.7]]}, "losses": [0.1]}).points
    {'up': ((0.5, 0.7),)}
    """
    points = {name: tuple((float(kept), float(log)) for kept, log in pairs) for name, pairs in record["points"].items()}
    return Corrections(points, tuple(float(loss) for loss in record["losses"]))


def encode_allocated(allocated: Allocated) -> Record:
    """Encode an allocation.

    >>> encode_allocated(Allocated({"up": Target(0, 2)}, None, None, Outcome(2, 0.1, None, None)))["targets"]
    {'up': [0, 2, None]}
    """
    return {
        "targets": {name: encode_target(target) for name, target in allocated.targets.items()},
        "bound": allocated.bound,
        "search": None if allocated.search is None else asdict(allocated.search),
        "uniform": asdict(allocated.uniform),
        **({"embeddings": [asdict(each) for each in allocated.embeddings]} if allocated.embeddings else {}),
    }


def decode_allocated(key: None, record: Record) -> Allocated:
    """Decode an allocation.

    >>> allocated = Allocated({"up": Target(0, 2)}, None, None, Outcome(2, 0.1, None, None))
    >>> decode_allocated(None, encode_allocated(allocated)) == allocated
    True
    """
    return Allocated(
        {name: decode_target(words) for name, words in record["targets"].items()},
        record["bound"],
        TypeAdapter(Search | None).validate_python(record["search"]),
        TypeAdapter(Outcome).validate_python(record["uniform"]),
        TypeAdapter(tuple[Embedding, ...]).validate_python(record.get("embeddings", ())),
    )


def encode_losses(losses: Mapping[str, float]) -> Record:
    """Encode one loss per layer.

    >>> encode_losses({"up": 0.5})
    {'by_layer': {'up': 0.5}}
    """
    return {"by_layer": dict(losses)}


def decode_losses(key: Any, record: Record) -> dict[str, float]:
    """Decode one loss per layer.

    >>> decode_losses("first", {"by_layer": {"up": 0.5}})
    {'up': 0.5}
    """
    return {name: float(loss) for name, loss in record["by_layer"].items()}
