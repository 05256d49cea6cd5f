"""Collect the results of a run in one value that reports read, `summary.json` of a run folder.

Everything here was measured or decided earlier; a report computes nothing from the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from globalopt.values.curves import LayerCurves
from globalopt.values.decomposition import Trace
from globalopt.values.embeddings import Embedding
from globalopt.values.error_unit import ErrorUnit
from globalopt.values.layer_results import LayerResult, MatchResult
from globalopt.values.metrics import Metrics
from globalopt.values.samples import Samples
from globalopt.values.search_record import Outcome, Search
from globalopt.values.stage_cost import StageCost


@dataclass(frozen=True)
class Details:
    """Collect what a report shows beside the summary; each part is there only if the run produced it.

    Args:
        curves: by layer; empty if the run has no spans.
        traces: objective of the solver by iteration, by layer; empty for a solver without iterations.
        samples: continuations of a few prompts.

    >>> details = Details(traces={"q_proj": ((0, 9.0), (10, 2.0), (20, 1.5))})
    >>> details.traces["q_proj"][-1]
    (20, 1.5)
    """

    curves: Mapping[str, LayerCurves] = field(default_factory=dict)
    traces: Mapping[str, Trace] = field(default_factory=dict)
    samples: Samples | None = None


@dataclass(frozen=True)
class Summary:
    """Collect the results of a finished run.

    Args:
        command: the command line, without the path of the program itself.
        model: name of the model as the user gave it; `reference` is the bundled one.
        allocator, solver: their names; `allocator` as in the budget file.
        seed: of the run.
        accounting: unit of the budget, "params" or "bytes".
        asked: the budget as a fraction kept. limit, used, total: the budget, the cost of the allocation, and that of
            the dense layers, in the budget's unit.
        predicted, bound: sum of the predicted losses of the allocation and its proved lower bound, in `budget_unit`;
            None without a prediction or a bound.
        error_unit, budget_unit: units of the layers' errors and of the allocation's prediction: `NATS` or
            `OUTPUT_ERROR`.
        covered, block_params: parameters of the compressible layers and of all decoder blocks.
        skipped: parameters outside the compressible layers, by what they are.
        layers: one result per layer.
        dense, compressed: metrics of both models on the same windows, one per split, in the same order.
        stages: cost of every stage.
        splits: how each split was made: source, hash, windows, seed.
        versions: of the packages, by name.
        notes: conversions and fallbacks that a reader must know.
        search: None where the allocator did not evaluate the objective.
        matching: one entry per matched block, and one for the model if it was matched.
        uniform: outcome of the uniform allocation of the same budget, in `budget_unit`; None where nothing was
            searched.
        quantisation: what the model was quantised with before it was dequantised, such as "GGUF Q4_1"; "" where it was
            not.
        embeddings: as they are stored, where the budget counts them: limit, used, total, predicted and bound are then
            of layers and embeddings together.

    >>> window = dict(windows=64, seqlen=512, tokens=32704, text_sha256="9f2c", dtype="float32")
    >>> dense = Metrics("test", 20.0, 2.996, 0.01, kl=None, kl_stderr=None, **window)
    >>> compressed = Metrics("test", 21.0, 3.045, 0.01, kl=0.05, kl_stderr=0.002, **window)
    >>> summary = Summary(
    ...     "globalopt search", "reference", "knapsack", "3basil", seed=0, accounting="params", asked=0.5, limit=2048,
    ...     used=2048, total=4096, predicted=0.040, bound=0.039, error_unit=ErrorUnit.NATS,
    ...     budget_unit=ErrorUnit.NATS, covered=4096,
    ...     block_params=4200, skipped={}, layers=(), dense=(dense,), compressed=(compressed,), stages=(), splits={},
    ... )
    >>> summary.used / summary.total, round(summary.compressed[0].perplexity / summary.dense[0].perplexity, 3)
    (0.5, 1.05)
    """

    command: str
    model: str
    allocator: str
    solver: str
    seed: int
    accounting: str
    asked: float
    limit: int
    used: int
    total: int
    predicted: float | None
    bound: float | None
    error_unit: ErrorUnit
    budget_unit: ErrorUnit
    covered: int
    block_params: int
    skipped: Mapping[str, int]
    layers: tuple[LayerResult, ...]
    dense: tuple[Metrics, ...]
    compressed: tuple[Metrics, ...]
    stages: tuple[StageCost, ...]
    splits: Mapping[str, Mapping[str, Any]]
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    search: Search | None = None
    matching: tuple[MatchResult, ...] = ()
    uniform: Outcome | None = None
    quantisation: str = ""
    embeddings: tuple[Embedding, ...] = ()
