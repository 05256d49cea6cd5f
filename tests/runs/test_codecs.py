"""Every artefact of the table is read as it was written, and refused where it is another's or broken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from globalopt.embeddings.coding import encode_matrix
from globalopt.errors import ArtefactError
from globalopt.runs import artefacts
from globalopt.runs.artefacts import Artefact
from globalopt.runs.files import read_json, read_tensors, write_json, write_tensors
from globalopt.runs.packing import pack, unpack, unpack_upper
from globalopt.runs.records import (
    Allocated,
    AnchorSolutions,
    CheckedLoss,
    Matched,
    MetricChoice,
    Prediction,
    SolvedLayer,
)
from globalopt.runs.target_codec import decode_target, encode_target
from globalopt.runs.tensor_codecs import decode_gram, encode_gram
from globalopt.runs.workspace import Workspace
from globalopt.values.attribution import Attribution
from globalopt.values.budget import Target
from globalopt.values.corrections import Corrections
from globalopt.values.curves import Curve, LayerCurves
from globalopt.values.decomposition import Decomposition
from globalopt.values.error_unit import ErrorUnit
from globalopt.values.family import Family, FamilyPoint
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.layer_results import LayerResult
from globalopt.values.metric import Gram
from globalopt.values.metrics import Metrics, WindowLosses
from globalopt.values.own_text import OwnText
from globalopt.values.problem import Profile
from globalopt.values.results import Summary
from globalopt.values.rounding_losses import RoundingLosses
from globalopt.values.samples import Sample, Samples
from globalopt.values.scores import ModelScore, Score, Scorecard, TaskScore
from globalopt.values.search_record import Evaluation, Outcome, Search
from globalopt.values.span import SpanBasis
from globalopt.values.stage_cost import StageCost
from globalopt.values.surface import ErrorSurface

SPEC = LayerSpec("block.0.up", 0, "block.0.in", "up", 4, 8)
OTHER = LayerSpec("block.0.down", 0, "block.0.in", "down", 4, 8)

TABLE: dict[str, Artefact[Any, Any]] = {name: row for name, row in vars(artefacts).items() if isinstance(row, Artefact)}


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def gram(size: int) -> Gram:
    root = random(size, size)
    return Gram(root @ root.mT, 7)


def stored(gram: Gram) -> Gram:
    """The Gram whose correlations have the precision that is stored."""
    return decode_gram("in", *encode_gram(gram))


def sparse(density: float = 0.5, dtype: torch.dtype = torch.float32) -> Tensor:
    values = random(4, 8, dtype=dtype)
    return values.where(torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) < density, 0.0)


def decomposition(signs: bool = False, dtype: torch.dtype = torch.float32) -> Decomposition:
    plane = random(4, 8).sign().to(dtype) if signs else None
    return Decomposition(sparse(dtype=dtype), random(4, 1, dtype=dtype), random(1, 8, dtype=dtype), plane)


THIRD = 0.1 + 0.2
METRICS = Metrics("test", 3.5, 1.25, THIRD, 0.01, None, 4, 16, 60, "ab12", "float32")
ROWS = ((Target(0, 16), Target(0, 8)), (Target(1, 4),))
SURFACE = ErrorSurface(SPEC, (Target(0, 16, NM(2, 4)), Target(1, 16, NM(2, 4), signs=True)), (THIRD, 0.0))
BASIS = SpanBasis(
    random(4, 2, dtype=torch.bfloat16).float(),
    torch.tensor([2.0, THIRD]),
    random(2, 8, dtype=torch.bfloat16).float(),
    random(8).abs() + 1,
    torch.ones(4, 1),
    {"rank": 2.0},
)
OUTCOME = Outcome(used=24, predicted=THIRD, measured=0.25, stderr=None)
SEARCH = Search(640, 2000, "anchors", 64, 1e-5, THIRD, (Evaluation(320, THIRD, 4, False, 0.5),))
LAYER = LayerResult(
    "block.0.up", 0, "up", 4, 8, 1, 16, "2:4", 28, 32, None, THIRD, 0.05, "converged", 0.01, 0.5, bytes=40
)
SUMMARY = Summary(
    command="globalopt search ü",
    model="llama",
    allocator="knapsack",
    solver="oats",
    seed=3,
    accounting="params",
    asked=0.5,
    limit=16,
    used=16,
    total=32,
    predicted=THIRD,
    bound=None,
    error_unit=ErrorUnit.NATS,
    covered=32,
    block_params=40,
    skipped={"norms": 8},
    layers=(LAYER,),
    dense=(METRICS,),
    compressed=(METRICS,),
    stages=(StageCost("load", 0.5, 100),),
    splits={"test": {"windows": 4}},
    versions={"torch": "2"},
    budget_unit=ErrorUnit.NATS,
    notes=("a note",),
    search=SEARCH,
    uniform=OUTCOME,
    matching=(),
)
POINT = FamilyPoint(
    24, THIRD, None, None, asked=0.5, limit=24, file="budgets/0.5.json", bound=0.1, gap=0.0, uniform=OUTCOME
)
FAMILY = Family(
    command="globalopt search",
    model="llama",
    solver="oats",
    solver_options={"steps": "5"},
    seed=0,
    accounting="params",
    pattern="unstructured",
    total=32,
    error_unit=ErrorUnit.NATS,
    candidates=None,
    windows=4,
    seqlen=16,
    left_out=(0.1,),
    stages=(),
    versions={},
    points=(POINT,),
)
SCORE = {"acc": Score(THIRD, None)}
TASK = TaskScore("arc_easy", "1", "lm-eval", None, 4, SCORE)
SCORED = ModelScore("llama", "ab12", "float32", (METRICS,), (TASK,), SCORE, cut=1)


class Example(NamedTuple):
    """A value of a row under a key; another key where there can be one; and a part without which it is refused."""

    key: Any
    value: Any
    other: Any
    part: str | None


SOLVED = SolvedLayer(decomposition(signs=True, dtype=torch.bfloat16), {"actual": THIRD, "trace": [[0, 8.0], [3, 1.5]]})
MATCHED = Matched(
    {SPEC.name: decomposition(dtype=torch.bfloat16), OTHER.name: decomposition(signs=True)},
    {"block.0.norm.weight": random(8), "block.0.norm.bias": random(8, dtype=torch.bfloat16)},
    {"loss": "nats", "before": THIRD, "epochs": 3},
)

EXAMPLES = {
    "WRITTEN": Example(3, torch.arange(6).view(2, 3), 0, "ids"),
    "OWN_TEXT": Example(
        None, OwnText(torch.arange(6).view(2, 3), {"test": 2}, prefix=(1,), seed=0, begin=(1,)), None, "windows"
    ),
    "GRAM": Example("block.0.in", stored(gram(8)), "block.0.out", "correlations"),
    "CURVES": Example(
        SPEC.name,
        LayerCurves(Curve(4, (1, 4), (THIRD, 0.25)), Curve(32, (1, 6, 32), (1.0, 0.25, 0.0))),
        OTHER.name,
        "saliency",
    ),
    "PROFILE": Example(SPEC, Profile({3: THIRD, 10: 0.0}, 2.5), OTHER, "alpha"),
    "OUTPUT_GRAM": Example(SPEC, stored(gram(4)), OTHER, "tokens"),
    "BLOCK_OUTPUT_GRAM": Example(1, stored(gram(8)), 0, "correlations"),
    "METRIC_CHOICE": Example(
        SPEC,
        MetricChoice(
            (CheckedLoss(Target(0, 8), THIRD, 0.25, 0.5), CheckedLoss(Target(1, 16, NM(2, 4), True), 0.0, THIRD, 1.0))
        ),
        OTHER,
        "checked",
    ),
    "PROBED": Example(SPEC, AnchorSolutions(((Target(0, 16),),), (decomposition(),)), OTHER, "kept.0"),
    "SPAN": Example(SPEC, BASIS.leading(0), OTHER, "Vh"),
    "DIRECTIONS": Example(SPEC, BASIS, OTHER, "Vh"),
    "ANCHORS": Example(
        SPEC, AnchorSolutions(ROWS, (decomposition(), decomposition(signs=True), decomposition())), OTHER, "kept.1"
    ),
    "ROUNDING": Example(
        SPEC, RoundingLosses((0.5, 1.0), {8: (THIRD, 0.1)}, (2,), {8: (0.2,)}, {8: 0.4}), OTHER, "noise"
    ),
    "SOLVER_GAP": Example(SPEC, {Target(0, 16): THIRD, Target(1, 4, NM(2, 4), True): 1.0}, OTHER, "by_target"),
    "PREDICTION": Example(SPEC, Prediction(SURFACE, random(3, 3, dtype=torch.float64)), OTHER, "options"),
    "SHARES": Example(
        "9f2c",
        Attribution(torch.tensor([THIRD, 1.0], dtype=torch.float64), {SPEC.name: random(2).double()}),
        "ab12",
        "shares",
    ),
    "LOSSES_ALONE": Example("9f2c", {SPEC.name: THIRD, OTHER.name: 0.0}, "ab12", "by_layer"),
    "CORRECTIONS": Example(
        None, Corrections({SPEC.name: ((THIRD, -0.5), (0.5, 2.0)), OTHER.name: ()}, (0.5, THIRD)), None, "points"
    ),
    "TEACHER": Example(None, {"top": 64, "tail": THIRD}, None, None),
    "ALLOCATED": Example(
        None,
        Allocated({SPEC.name: Target(1, 16), OTHER.name: Target(1, 16, NM(2, 4), True)}, THIRD, SEARCH, OUTCOME),
        None,
        "targets",
    ),
    "EMBEDDING_LOSS": Example("lm_head.8.float32.v1", {"loss": THIRD}, "lm_head.6.float32.v1", None),
    "EMBEDDING": Example("lm_head", encode_matrix(random(4, 16), bits=6), "embed_tokens", "scales"),
    "SOLVED_LAYER": Example(SPEC, SOLVED, OTHER, "values"),
    "MATCHED_BLOCK": Example(1, MATCHED, 0, f"kept:{SPEC.name}"),
    "MATCHED_MODEL": Example(None, MATCHED, None, f"plus:{OTHER.name}"),
    "SUMMARY": Example(None, SUMMARY, None, "error_unit"),
    "WINDOWS": Example(None, (WindowLosses("test", "ab12", (THIRD,), (0.5,), (0.0,)),), None, None),
    "SAMPLES": Example(None, Samples("test", 2, 3, (Sample("ü<b>", "a", "b", 1),)), None, "samples"),
    "SCORES": Example(
        None, Scorecard("globalopt eval", SCORED, None, {}, SCORE, {"test": {}}, (), None, 8, {}), None, "averages"
    ),
    "FAMILY": Example(None, FAMILY, None, "points"),
}
"""One for every row; "averages" of `SCORES` is inside the score of the model."""


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal, tensors bit for bit and of one type."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if is_dataclass(one):
        return type(one) is type(other) and all(
            same(getattr(one, field.name), getattr(other, field.name)) for field in fields(one)
        )
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, Sequence) and not isinstance(one, str):
        return isinstance(other, Sequence) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def without(found: Any, part: str) -> bool:
    """Remove `part` from JSON at any depth, and say whether it was there."""
    if isinstance(found, list):
        return any([without(inner, part) for inner in found])
    if not isinstance(found, dict):
        return False
    there = found.pop(part, None) is not None
    return any([without(inner, part) for inner in found.values()]) or there


@pytest.fixture(params=TABLE, ids=str)
def row(request) -> tuple[Artefact[Any, Any], Example]:
    return TABLE[request.param], EXAMPLES[request.param]


@pytest.fixture
def work(tmp_path) -> Workspace:
    return Workspace(tmp_path)


def test_every_row_has_an_example():
    assert EXAMPLES.keys() == TABLE.keys()


def test_it_is_read_as_it_was_written(row, work):
    artefact, example = row
    assert work.find(artefact, example.key) is None
    work.put(artefact, example.key, example.value)
    found = work.get(artefact, example.key)
    assert same(found, example.value), found
    # What was read is written as the same bytes.
    path = work.path(artefact, example.key)
    before = path.read_bytes()
    work.put(artefact, example.key, found)
    assert path.read_bytes() == before


def test_a_file_of_another_key_is_refused(row, work):
    artefact, example = row
    if example.other is None:
        assert artefact.key.name(None) == work.path(artefact, None).stem
        return
    work.put(artefact, example.key, example.value)
    assert work.path(artefact, example.key) != work.path(artefact, example.other)
    work.path(artefact, example.key).rename(work.path(artefact, example.other))
    with pytest.raises(ArtefactError, match=r"holds .*, expected .*Delete it and run the command again\."):
        work.get(artefact, example.other)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.98])
def test_a_truncated_file_is_refused(row, work, share):
    artefact, example = row
    work.put(artefact, example.key, example.value)
    path = work.path(artefact, example.key)
    content = path.read_bytes().rstrip(b"\n")
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ArtefactError) as told:
        work.get(artefact, example.key)
    assert str(path) in str(told.value)
    assert "Delete it and run the" in str(told.value)


@pytest.mark.parametrize("content", [b"[]", b"3", b'"text"', b"null"])
def test_json_of_another_kind_is_refused(row, work, content):
    artefact, example = row
    if artefact.form.suffix != ".json":
        return
    work.put(artefact, example.key, example.value)
    path = work.path(artefact, example.key)
    if content == b"[]" and isinstance(example.value, tuple):
        content = b"[[]]"
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=path.name):
        work.get(artefact, example.key)


def test_a_missing_part_is_refused_and_named(row, work):
    artefact, example = row
    if example.part is None:
        return
    work.put(artefact, example.key, example.value)
    path = work.path(artefact, example.key)
    if artefact.form.suffix == ".json":
        found = read_json(path)
        assert without(found, example.part)
        write_json(path, found)
    else:
        tensors, facts = read_tensors(path)
        assert tensors.pop(example.part, None) is not None or facts.pop(example.part, None) is not None
        write_tensors(path, tensors, facts)
    with pytest.raises(ArtefactError) as told:
        work.get(artefact, example.key)
    assert str(path) in str(told.value)
    assert example.part in str(told.value)
    assert "Delete it and run the command again." in str(told.value)


def test_a_missing_file_is_refused(row, work):
    artefact, example = row
    with pytest.raises(ArtefactError, match="There is no file"):
        work.get(artefact, example.key)


@pytest.mark.parametrize(
    "target",
    [
        Target(0, 0),
        Target(2, 10),
        Target(0, 16, NM(2, 4)),
        Target(1, 16, NM(2, 4), signs=True),
        Target(1, 3, None, True),
    ],
)
def test_a_target_survives(target):
    assert decode_target(encode_target(target)) == target


def bits(value: Decomposition) -> list[tuple[torch.dtype, torch.Size, bytes]]:
    """All that tells two decompositions apart, zeros of either sign included."""
    parts = [part for part in (value.S, value.U, value.V, value.signs) if part is not None]
    return [(part.dtype, part.shape, part.contiguous().view(torch.uint8).numpy().tobytes()) for part in parts]


@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["sparse", "dense", "zero", "pattern", "negative zeros"])
def test_a_decomposition_is_packed_and_unpacked_to_the_same_bits(kind, dtype, signs):
    S = {
        "sparse": sparse(0.3),
        "dense": random(4, 8),
        "zero": torch.zeros(4, 8),
        "pattern": torch.where(torch.tensor([True, False, False, True]).repeat(2), random(4, 8), 0.0),
        "negative zeros": torch.where(torch.eye(4, 8) == 1, -0.0, sparse(0.3)),
    }[kind].to(dtype)
    # Odd sizes, so that the last byte of bits is not full.
    S = S[:3, :7] if kind == "sparse" else S
    plane = random(*S.shape).sign() if signs else None
    value = Decomposition(S, random(len(S), 2, dtype=dtype), random(2, S.shape[1], dtype=dtype), plane)
    packed = pack(value)
    assert ("kept" in packed) == (kind not in ("dense", "zero"))
    assert bits(unpack(packed)) == bits(value)
    if kind == "negative zeros":
        assert bool((value.S.signbit() & (value.S == 0)).any())
    else:
        assert len(packed["values"]) == value.nnz


def test_packed_parts_that_disagree_are_refused():
    packed = pack(Decomposition(sparse(), random(4, 1), random(1, 8)))
    with pytest.raises(ValueError, match="values for"):
        unpack({**packed, "values": packed["values"][1:]})
    with pytest.raises(ValueError, match="bytes are not 32 numbers"):
        unpack({**packed, "kept": packed["kept"][1:]})
    with pytest.raises(KeyError, match="kept"):
        unpack({name: part for name, part in packed.items() if name != "kept"})


@pytest.mark.parametrize("size", [1, 2, 7, 8])
def test_grams_are_stored_as_correlations_in_half_precision(size):
    matrix = gram(size).matrix
    matrix = (matrix + matrix.mT) / 2
    packed, facts = encode_gram(Gram(matrix, 7))
    assert packed["correlations"].numel() == size * (size - 1) // 2
    assert packed["correlations"].dtype == torch.float16
    found = decode_gram("in", packed, facts).matrix
    assert torch.equal(found, found.mT)
    assert torch.equal(found.diagonal(), matrix.diagonal())
    roots = matrix.diagonal().sqrt()
    assert float(((found - matrix) / roots / roots[:, None]).abs().max()) <= 2**-11
    # Once rounded, nothing changes any more.
    assert torch.equal(decode_gram("in", *encode_gram(Gram(found, 7))).matrix, found)


def test_a_gram_that_is_not_symmetric_survives_to_the_last_bit():
    matrix = gram(8).matrix
    matrix[0, -1] *= 1 + 1e-6
    assert torch.equal(decode_gram("in", *encode_gram(Gram(matrix, 7))).matrix, matrix)


def test_inputs_that_are_always_zero_stay_zero():
    matrix = gram(4).matrix
    matrix[1] = matrix[:, 1] = 0.0
    found = decode_gram("in", *encode_gram(Gram(matrix, 7))).matrix
    assert not bool(found[1].any())
    assert torch.equal(found.diagonal(), matrix.diagonal())


def test_an_upper_triangle_of_another_size_is_broken():
    with pytest.raises(ValueError, match="triangle"):
        unpack_upper(torch.ones(4), 3)


def test_targets_stay_in_model_order(work):
    targets = {OTHER.name: Target(0, 16), SPEC.name: Target(1, 16), "block.0.a": Target(0, 0)}
    work.put(artefacts.ALLOCATED, None, Allocated(targets, None, None, OUTCOME))
    assert list(work.get(artefacts.ALLOCATED, None).targets) == list(targets)


def test_prediction_without_anchor_solutions(work):
    work.put(artefacts.PREDICTION, SPEC, Prediction(SURFACE, None))
    assert work.get(artefacts.PREDICTION, SPEC).overlap is None


def test_an_error_surface_that_no_one_could_have_written_is_broken(work, tmp_path: Path):
    work.put(artefacts.PREDICTION, SPEC, Prediction(SURFACE, None))
    path = work.path(artefacts.PREDICTION, SPEC)
    facts = {"name": SPEC.name, "d_out": 4, "d_in": 8}
    write_tensors(path, {}, {**facts, "options": [[0, 99, None, 1.0]]})
    with pytest.raises(ArtefactError, match="is broken"):
        work.get(artefacts.PREDICTION, SPEC)
    write_tensors(path, {}, {**facts, "options": [[0, 16, None, -1.0]]})
    with pytest.raises(ArtefactError, match="is broken"):
        work.get(artefacts.PREDICTION, SPEC)
