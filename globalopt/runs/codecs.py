"""Codecs: each kind of value as tensors and JSON-able metadata, and back.

`encode_x(value)` gives what is written; `decode_x(key, ...)` makes the value from what was read. What is missing or of
the wrong kind raises one of Python's own errors, which the caller (`runs.artefacts`) turns into a sentence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from globalopt.runs.packing import PackedSolutions, pack, pack_upper, unpack, unpack_upper
from globalopt.runs.records import (
    Allocated,
    AnchorSolutions,
    CheckedLoss,
    Matched,
    MetricChoice,
    Prediction,
    SolvedLayer,
)
from globalopt.values.budget import Target
from globalopt.values.corrections import Corrections
from globalopt.values.embeddings import CodedMatrix, Embedding
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.metric import Gram
from globalopt.values.own_text import OwnText
from globalopt.values.problem import Profile
from globalopt.values.rounding_losses import RoundingLosses
from globalopt.values.search_record import Outcome, Search
from globalopt.values.span import SpanBasis
from globalopt.values.storage import GROUP, Storage, code_bytes
from globalopt.values.surface import ErrorSurface

Tensors = Mapping[str, Tensor]
Metadata = Mapping[str, Any]


def encode_target(target: Target) -> list[Any]:
    """Encode a target as a JSON list; a sign plane is a fourth entry, or a storage in few bits.

    >>> encode_target(Target(2, 10, NM(2, 4)))
    [2, 10, '2:4']
    """
    words: list[Any] = [target.rank, target.nnz, str(target.pattern) if target.pattern else None]
    if not target.storage.plain:
        return [*words, str(target.storage)]
    return [*words, True] if target.signs else words


def decode_target(words: Sequence[Any]) -> Target:
    """Decode what `encode_target` made.

    >>> decode_target([2, 10, None])
    Target(rank=2, nnz=10)
    >>> decode_target([2, 10, None, "4/8"])
    Target(rank=2, nnz=10, storage=4/8)
    """
    rank, nnz, pattern, *more = words
    made = Target(int(rank), int(nnz), NM.parse(pattern) if pattern else None)
    if not more:
        return made
    if isinstance(more[0], str):
        return replace(made, storage=Storage.parse(more[0]))
    return replace(made, signs=bool(more[0]))


def encode_own_text(text: OwnText) -> tuple[Tensors, Metadata]:
    """Encode the text that a model wrote.

    >>> tensors, metadata = encode_own_text(OwnText(torch.arange(6).view(2, 3), {"test": 2}, prefix=(), seed=0))
    >>> tensors["windows"].shape, metadata["counts"]
    (torch.Size([2, 3]), {'test': 2})
    """
    prompts = None if text.prompts is None else dict(text.prompts)
    facts = {"counts": dict(text.counts), "prefix": [*text.prefix], "seed": text.seed, "begin": [*text.begin]}
    # Metadata may be sorted by name.
    return {"windows": text.windows}, {**facts, "order": list(text.counts), "prompts": prompts}


def decode_own_text(key: Any, tensors: Tensors, metadata: Metadata) -> OwnText:
    """Decode what `encode_own_text` made.

    >>> text = OwnText(torch.arange(6).view(2, 3), {"test": 2}, prefix=(), seed=0)
    >>> decode_own_text(None, *encode_own_text(text)).sha256 == text.sha256
    True
    """
    counts = {name: int(metadata["counts"][name]) for name in metadata["order"]}
    prefix, begin = (tuple(int(token) for token in metadata[name]) for name in ("prefix", "begin"))
    return OwnText(tensors["windows"], counts, prefix, int(metadata["seed"]), begin, metadata["prompts"])


def encode_gram(gram: Gram) -> tuple[Tensors, Metadata]:
    """Encode a Gram: its diagonal, and the upper triangle of its correlations `g_ij / sqrt(g_ii g_jj)` in float16.

    The error of a correlation is at most 2^-12, which is far below any damping.

    >>> tensors, metadata = encode_gram(Gram(torch.tensor([[4.0, 1.0], [1.0, 1.0]]), 7))
    >>> tensors["diagonal"], tensors["correlations"], metadata
    (tensor([4., 1.]), tensor([0.5000], dtype=torch.float16), {'tokens': 7})
    """
    matrix = gram.matrix
    if not torch.equal(matrix, matrix.mT):
        return {"matrix": matrix}, {"tokens": gram.tokens}
    diagonal = matrix.diagonal()
    correlations = pack_upper(matrix / _scales(diagonal))
    return {"diagonal": diagonal.clone(), "correlations": correlations.half()}, {"tokens": gram.tokens}


def decode_gram(key: Any, tensors: Tensors, metadata: Metadata) -> Gram:
    """Decode a Gram.

    >>> decode_gram("site", *encode_gram(Gram(torch.eye(2), 7))).matrix
    tensor([[1., 0.],
            [0., 1.]])
    """
    if "matrix" in tensors:
        return Gram(tensors["matrix"], metadata["tokens"])
    diagonal = tensors["diagonal"]
    matrix = unpack_upper(tensors["correlations"].to(diagonal.dtype), len(diagonal)).mul_(_scales(diagonal))
    matrix.diagonal().copy_(diagonal)
    return Gram(matrix, metadata["tokens"])


def _scales(diagonal: Tensor) -> Tensor:
    """Compute `sqrt(g_ii g_jj)` (n, n) from a Gram's diagonal; where that is zero, and with it the whole row, 1."""
    roots = torch.where(diagonal > 0, diagonal, 1.0).sqrt()
    return torch.outer(roots, roots)


def encode_span(basis: SpanBasis) -> tuple[Tensors, Metadata]:
    """Encode the basis of a span, its directions in bfloat16; the rest of the span is computed from the weight.

    That rest is what the rounded directions leave, so that a span adds up to its weight all the same.

    >>> one = torch.ones(2, 1)
    >>> encode_span(SpanBasis(one, torch.ones(1), one.mT, torch.ones(2), one, {"steps": 3.0}))[1]
    {'stats': {'steps': 3.0}}
    """
    U, Vh = (part.to(torch.bfloat16) for part in (basis.U, basis.Vh))
    tensors = {"U": U, "s": basis.s, "Vh": Vh, "scale": basis.scale, "rows": basis.rows}
    return tensors, {"stats": dict(basis.stats)}


def decode_span(spec: LayerSpec, tensors: Tensors, metadata: Metadata) -> SpanBasis:
    """Decode the basis of a span.

    >>> spec, one = LayerSpec("up", 0, "in", "up", 2, 2), torch.ones(2, 1)
    >>> decode_span(spec, *encode_span(SpanBasis(one, torch.ones(1), one.mT, torch.ones(2), one))).max_rank
    1
    """
    directions = {part: tensors[part].to(tensors["s"].dtype) for part in ("U", "Vh")}
    return SpanBasis(**{**tensors, **directions}, stats=metadata["stats"])


def encode_layer(solved: SolvedLayer) -> tuple[Tensors, Metadata]:
    """Encode a solved layer.

    >>> from globalopt.values.decomposition import Decomposition
    >>> kept = Decomposition(torch.eye(2), torch.zeros(2, 0), torch.zeros(0, 2))
    >>> encode_layer(SolvedLayer(kept, {"status": "converged"}))[1]
    {'status': 'converged'}
    """
    return pack(solved.value), solved.metadata


def decode_layer(spec: LayerSpec, tensors: Tensors, metadata: Metadata) -> SolvedLayer:
    """Decode a solved layer.

    >>> spec = LayerSpec("up", 0, "in", "up", 2, 2)
    >>> from globalopt.values.decomposition import Decomposition
    >>> kept = Decomposition(torch.eye(2), torch.zeros(2, 0), torch.zeros(0, 2))
    >>> decode_layer(spec, *encode_layer(SolvedLayer(kept, {}))).value.nnz
    2
    """
    return SolvedLayer(unpack(tensors), metadata)


def encode_coded(coded: CodedMatrix) -> tuple[Tensors, Metadata]:
    """Encode a matrix of codes.

    >>> coded = CodedMatrix(torch.zeros(8, dtype=torch.uint8), torch.ones(1, dtype=torch.bfloat16), 2, 4, bits=8)
    >>> encode_coded(coded)[1]
    {'rows': 2, 'width': 4, 'bits': 8}
    """
    return {"codes": coded.codes, "scales": coded.scales}, {
        "rows": coded.rows,
        "width": coded.width,
        "bits": coded.bits,
    }


def decode_coded(name: str, tensors: Tensors, metadata: Metadata) -> CodedMatrix:
    """Decode what `encode_coded` made.

    >>> coded = CodedMatrix(torch.zeros(8, dtype=torch.uint8), torch.ones(1, dtype=torch.bfloat16), 2, 4, bits=8)
    >>> decode_coded("lm_head", *encode_coded(coded)).width
    4
    """
    rows, width, bits = (int(metadata[fact]) for fact in ("rows", "width", "bits"))
    codes, scales = tensors["codes"], tensors["scales"]
    if codes.shape != (code_bytes(rows * width, bits),) or scales.shape != (-(-rows * width // GROUP),):
        raise ValueError(f"{tuple(codes.shape)} bytes of codes are no matrix of {rows} x {width} in {bits} bits.")
    return CodedMatrix(codes, scales, rows, width, bits)


def encode_anchors(solutions: AnchorSolutions) -> tuple[Tensors, Metadata]:
    """Encode anchor solutions, each packed, its parts under `part.number`.

    In the type that they have, so that the residuals `W - S - U V` are the same bits after reading as before writing.

    >>> from globalopt.values.decomposition import Decomposition
    >>> half = Decomposition(torch.eye(2), torch.zeros(2, 0), torch.zeros(0, 2))
    >>> tensors, metadata = encode_anchors(AnchorSolutions(((Target(0, 2),),), (half,)))
    >>> tensors["values.0"], metadata["anchors"]
    (tensor([1., 1.]), [[[0, 2, None]]])
    """
    tensors = {
        f"{part}.{i}": tensor for i, value in enumerate(solutions.values) for part, tensor in pack(value).items()
    }
    return tensors, {"anchors": [[encode_target(target) for target in row] for row in solutions.rows]}


def decode_anchors(spec: LayerSpec, tensors: Tensors, metadata: Metadata) -> AnchorSolutions:
    """Decode anchor solutions.

    >>> spec = LayerSpec("up", 0, "in", "up", 2, 2)
    >>> from globalopt.values.decomposition import Decomposition
    >>> half = Decomposition(torch.eye(2), torch.zeros(2, 0), torch.zeros(0, 2))
    >>> decode_anchors(spec, *encode_anchors(AnchorSolutions(((Target(0, 2),),), (half,)))).values[0].S
    tensor([[1., 0.],
            [0., 1.]])
    """
    rows = tuple(tuple(decode_target(words) for words in row) for row in metadata["anchors"])
    return AnchorSolutions(rows, PackedSolutions(tensors, sum(len(row) for row in rows)))


def encode_choice(choice: MetricChoice) -> Metadata:
    """Encode a choice of metric.

    >>> encode_choice(MetricChoice((CheckedLoss(Target(0, 2), predicted=0.1, weighted=0.2, plain=0.3),)))
    {'checked': [[0, 2, None, 0.1, 0.2, 0.3]]}
    """
    return {"checked": [[*encode_target(c.target), c.predicted, c.weighted, c.plain] for c in choice.checked]}


def decode_choice(spec: LayerSpec, record: Metadata) -> MetricChoice:
    """Decode a choice of metric.

    >>> record = {"checked": [[0, 2, None, 0.1, 0.2, 0.3]]}
    >>> decode_choice(LayerSpec("up", 0, "in", "up", 2, 2), record).losses
    {Target(rank=0, nnz=2): 0.2}
    """
    return MetricChoice(
        tuple(CheckedLoss(decode_target(words[:-3]), *map(float, words[-3:])) for words in record["checked"])
    )


def encode_numbers(numbers: Mapping[Target, float]) -> Metadata:
    """Encode one number per target.

    >>> encode_numbers({Target(1, 0): 0.5})
    {'by_target': [[1, 0, None, 0.5]]}
    """
    return {"by_target": [[*encode_target(target), number] for target, number in numbers.items()]}


def decode_numbers(spec: LayerSpec, record: Metadata) -> dict[Target, float]:
    """Decode one number per target.

    >>> decode_numbers(LayerSpec("up", 0, "in", "up", 2, 2), {"by_target": [[1, 0, None, 0.5]]})
    {Target(rank=1, nnz=0): 0.5}
    """
    return {decode_target(words[:-1]): float(words[-1]) for words in record["by_target"]}


def encode_rounding(losses: RoundingLosses) -> Metadata:
    """Encode rounding losses; JSON has no whole numbers as keys.

    >>> encode_rounding(RoundingLosses((1.0,), {8: (0.1,)}, (), {}, {8: 0.2}))["values"]
    {'8': (0.1,)}
    """
    by_bits = {"values": losses.values, "factors": losses.factors, "noise": losses.noise}
    named = {part: {str(bits): row for bits, row in by.items()} for part, by in by_bits.items()}
    return {"kept": losses.kept, "ranks": losses.ranks, "ranked": losses.ranked, "share": losses.share, **named}


def decode_rounding(spec: LayerSpec, record: Metadata) -> RoundingLosses:
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


def encode_profile(profile: Profile) -> Metadata:
    """Encode a profile; JSON has no whole numbers as keys.

    >>> encode_profile(Profile({3: 0.02}, alpha=2.5))
    {'outliers': {'3': 0.02}, 'alpha': 2.5}
    """
    return {
        "outliers": {str(threshold): share for threshold, share in profile.outliers.items()},
        "alpha": profile.alpha,
    }


def decode_profile(spec: LayerSpec, record: Metadata) -> Profile:
    """Decode a profile.

    >>> decode_profile(LayerSpec("up", 0, "in", "up", 2, 2), {"outliers": {"3": 0.02}, "alpha": 2.5}).outliers
    {3: 0.02}
    """
    return Profile({int(m): float(share) for m, share in record["outliers"].items()}, float(record["alpha"]))


def encode_prediction(prediction: Prediction) -> tuple[Tensors, Metadata]:
    """Encode a prediction.

    >>> spec = LayerSpec("up", 0, "in", "up", 2, 2)
    >>> encode_prediction(Prediction(ErrorSurface(spec, (Target.zero(),), (0.5,)), None))
    ({}, {'options': [[0, 0, None, 0.5]]})
    """
    surface = prediction.surface
    options = [[*encode_target(t), error] for t, error in zip(surface.targets, surface.error, strict=True)]
    return {} if prediction.overlap is None else {"overlap": prediction.overlap}, {"options": options}


def decode_prediction(spec: LayerSpec, tensors: Tensors, metadata: Metadata) -> Prediction:
    """Decode a prediction.

    >>> spec = LayerSpec("up", 0, "in", "up", 2, 2)
    >>> decode_prediction(spec, {}, {"options": [[0, 0, None, 0.5]]}).surface.error
    (0.5,)
    """
    options = metadata["options"]
    surface = ErrorSurface(
        spec, tuple(decode_target(words[:-1]) for words in options), tuple(words[-1] for words in options)
    )
    return Prediction(surface, tensors.get("overlap"))


def encode_corrections(corrections: Corrections) -> Metadata:
    """Encode corrections of predicted losses.

    >>> encode_corrections(Corrections({"up": ((0.5, 0.7),)}, losses=(0.1,)))
    {'points': {'up': ((0.5, 0.7),)}, 'losses': (0.1,)}
    """
    return {"points": dict(corrections.points), "losses": corrections.losses}


def decode_corrections(key: None, record: Metadata) -> Corrections:
    """Decode corrections of predicted losses.

    >>> decode_corrections(None, {"points": {"up": [[0.5, 0.7]]}, "losses": [0.1]}).points
    {'up': ((0.5, 0.7),)}
    """
    points = {name: tuple((float(kept), float(log)) for kept, log in pairs) for name, pairs in record["points"].items()}
    return Corrections(points, tuple(float(loss) for loss in record["losses"]))


def encode_allocated(allocated: Allocated) -> Metadata:
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


def decode_allocated(key: None, record: Metadata) -> Allocated:
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


def encode_matched(matched: Matched) -> tuple[Tensors, Metadata]:
    """Encode matched layers, packed, and norms, each tensor under `part:layer` or `norm:parameter`.

    >>> from globalopt.values.decomposition import Decomposition
    >>> kept = Decomposition(torch.eye(2), torch.zeros(2, 0), torch.zeros(0, 2))
    >>> sorted(encode_matched(Matched({"up": kept}, {"norm.weight": torch.ones(2)}, {}))[0])
    ['U:up', 'V:up', 'kept:up', 'norm:norm.weight', 'values:up']
    """
    tensors = {f"norm:{name}": norm for name, norm in matched.norms.items()}
    for name, value in matched.values.items():
        tensors.update({f"{part}:{name}": tensor for part, tensor in pack(value).items()})
    return tensors, {"layers": sorted(matched.values), **matched.metadata}


def decode_matched(key: Any, tensors: Tensors, metadata: Metadata) -> Matched:
    """Decode matched layers and norms.

    >>> from globalopt.values.decomposition import Decomposition
    >>> kept = Decomposition(torch.eye(2), torch.zeros(2, 0), torch.zeros(0, 2))
    >>> matched = Matched({"up": kept}, {"norm.weight": torch.ones(2)}, {"epochs": 3})
    >>> decode_matched(0, *encode_matched(matched)).metadata
    {'epochs': 3}
    """
    values = {name: unpack(tensors, f":{name}") for name in metadata["layers"]}
    norms = {name.removeprefix("norm:"): tensor for name, tensor in tensors.items() if name.startswith("norm:")}
    return Matched(values, norms, {name: found for name, found in metadata.items() if name != "layers"})
