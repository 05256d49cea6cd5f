"""Codecs of values with tensors: each kind as tensors and JSON-able metadata, and back.

`encode_x(value)` gives what is written; `decode_x(key, tensors, metadata)` makes the value from what was read. What is
missing or of the wrong kind raises one of Python's own errors, which the caller (`runs.artefacts`) turns into a
sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from globalopt.runs.packing import PackedSolutions, pack, pack_upper, unpack, unpack_upper
from globalopt.runs.records import (
    AnchorSolutions,
    Matched,
    Prediction,
    SolvedLayer,
)
from globalopt.runs.target_codec import decode_target, encode_target
from globalopt.values.attribution import Attribution
from globalopt.values.embeddings import CodedMatrix
from globalopt.values.layer import LayerSpec
from globalopt.values.metric import Gram
from globalopt.values.own_text import OwnText
from globalopt.values.span import SpanBasis
from globalopt.values.storage import GROUP, code_bytes
from globalopt.values.surface import ErrorSurface

Tensors = Mapping[str, Tensor]
Metadata = Mapping[str, Any]


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

    >>> from globalopt.values.budget import Target
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

    >>> from globalopt.values.budget import Target
    >>> spec = LayerSpec("up", 0, "in", "up", 2, 2)
    >>> from globalopt.values.decomposition import Decomposition
    >>> half = Decomposition(torch.eye(2), torch.zeros(2, 0), torch.zeros(0, 2))
    >>> decode_anchors(spec, *encode_anchors(AnchorSolutions(((Target(0, 2),),), (half,)))).values[0].S
    tensor([[1., 0.],
            [0., 1.]])
    """
    rows = tuple(tuple(decode_target(words) for words in row) for row in metadata["anchors"])
    return AnchorSolutions(rows, PackedSolutions(tensors, sum(len(row) for row in rows)))


def encode_prediction(prediction: Prediction) -> tuple[Tensors, Metadata]:
    """Encode a prediction.

    >>> from globalopt.values.budget import Target
    >>> spec = LayerSpec("up", 0, "in", "up", 2, 2)
    >>> encode_prediction(Prediction(ErrorSurface(spec, (Target.zero(),), (0.5,)), None))
    ({}, {'options': [[0, 0, None, 0.5]]})
    """
    surface = prediction.surface
    options = [[*encode_target(t), error] for t, error in zip(surface.targets, surface.error, strict=True)]
    return {} if prediction.overlap is None else {"overlap": prediction.overlap}, {"options": options}


def decode_prediction(spec: LayerSpec, tensors: Tensors, metadata: Metadata) -> Prediction:
    """Decode a prediction.

    >>> from globalopt.values.budget import Target
    >>> spec = LayerSpec("up", 0, "in", "up", 2, 2)
    >>> decode_prediction(spec, {}, {"options": [[0, 0, None, 0.5]]}).surface.error
    (0.5,)
    """
    options = metadata["options"]
    surface = ErrorSurface(
        spec, tuple(decode_target(words[:-1]) for words in options), tuple(words[-1] for words in options)
    )
    return Prediction(surface, tensors.get("overlap"))


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


def encode_attribution(found: Attribution) -> tuple[Tensors, Metadata]:
    """Encode the losses of windows and the shares of layers in them, a row each.

    >>> encode_attribution(Attribution(torch.ones(2), {"up": torch.tensor([0.5, 0.25])}))[1]
    {'layers': ['up']}
    """
    return {"losses": found.losses, "shares": torch.stack(list(found.shares.values()))}, {"layers": list(found.shares)}


def decode_attribution(key: Any, tensors: Tensors, metadata: Metadata) -> Attribution:
    """Decode the losses of windows and the shares of layers in them.

    >>> found = Attribution(torch.ones(2), {"up": torch.tensor([0.5, 0.25])})
    >>> decode_attribution("first", *encode_attribution(found)).shares
    {'up': tensor([0.5000, 0.2500])}
    """
    return Attribution(tensors["losses"], dict(zip(metadata["layers"], tensors["shares"], strict=True)))
