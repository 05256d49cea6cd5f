"""Made-up results of small Llamas, for examples and tests of reports; no figure in them was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from globalopt.values.budget import Budget, Target
from globalopt.values.curves import Curve, LayerCurves
from globalopt.values.decomposition import Trace
from globalopt.values.dry_run import DryRun
from globalopt.values.error_unit import ErrorUnit
from globalopt.values.family import Family, FamilyPoint
from globalopt.values.layer import NM, LayerSpec, Shape
from globalopt.values.layer_results import LayerResult, MatchResult
from globalopt.values.metrics import Metrics, WindowLosses
from globalopt.values.results import Details, Summary
from globalopt.values.samples import Sample, Samples
from globalopt.values.scores import ModelScore, Score, Scorecard, TaskScore
from globalopt.values.search_record import Evaluation, Outcome, Search
from globalopt.values.stage_cost import StageCost
from globalopt.values.storage import PLAIN, Storage

KINDS = {
    "q_proj": (256, 256),
    "k_proj": (128, 256),
    "v_proj": (128, 256),
    "o_proj": (256, 256),
    "gate_proj": (688, 256),
    "up_proj": (688, 256),
    "down_proj": (256, 688),
}
MISSING = (5, "k_proj")
"""Block and kind of a layer that the made-up model does not have."""

FALLBACK = (3, "down_proj")
"""Block and kind of a layer whose solver needed more damping."""

FAMILY_KEPT = (0.1, 0.35, 0.6, 1.0)


def example_layers(
    blocks: int = 2, pattern: str | None = None, storages: Sequence[str] = (str(PLAIN),), accounting: str = "params"
) -> tuple[LayerResult, ...]:
    """Make up the results of layers that keep more the deeper and the smaller they are; the first `v_proj` is dense.

    Args:
        pattern: of `S`, such as "2:4".
        storages: of the layers, in turn.
        accounting: of their costs.

    >>> layers = example_layers()
    >>> len(layers), layers[2].name, layers[2].kept
    (14, 'model.layers.0.self_attn.v_proj', 1.0)
    """
    random = np.random.default_rng(0)
    layers = []
    for block in range(blocks):
        for kind, (d_out, d_in) in KINDS.items():
            if (block, kind) == MISSING:
                continue
            numel = d_out * d_in
            part = "self_attn" if (d_out, d_in) != (688, 256) and kind != "down_proj" else "mlp"
            kept = min(0.95, 0.3 + 0.4 * block / blocks + 0.2 * (numel < 2**16) + 0.05 * random.random())
            rank = int(random.integers(0, 12))
            nnz = numel // 2 if pattern else int(kept * numel) - rank * (d_out + d_in)
            predicted = 1e-4 * math.exp(random.normal() - 4 * kept)
            untouched = (block, kind) == (0, "v_proj")
            if untouched:
                rank, nnz, predicted = 0, numel, 0.0
            shape = Shape(d_out, d_in)
            of_layer = None if untouched or pattern is None else NM.parse(pattern)
            target = Target(rank, nnz, of_layer, storage=Storage.parse(storages[len(layers) % len(storages)]))
            budget = Budget.fraction(1.0, [LayerSpec(kind, block, kind, kind, d_out, d_in)], accounting)
            layers.append(
                LayerResult(
                    name=f"model.layers.{block}.{part}.{kind}",
                    block=block,
                    kind=kind,
                    d_out=d_out,
                    d_in=d_in,
                    rank=rank,
                    nnz=nnz,
                    pattern=None if untouched else pattern,
                    cost=budget.cost(target, shape),
                    dense_cost=budget.total,
                    predicted=predicted,
                    actual=predicted * math.exp(0.4 * random.normal() + 0.3),
                    relative=0.0 if untouched else 0.02 * math.exp(random.normal() - 2 * kept),
                    status="fallback" if (block, kind) == FALLBACK else "converged",
                    damping=0.1 if (block, kind) == FALLBACK else 0.01,
                    seconds=0.35 + 0.1 * random.random(),
                    bytes=target.bytes(shape),
                    storage=str(target.storage),
                )
            )
    return tuple(layers)


def example_metrics(split: str, perplexity: float, kl: float | None, **changed: Any) -> Metrics:
    """Make up the metrics of 64 windows of 512 tokens; `changed` replaces fields.

    >>> example_metrics("test", 62.4, kl=0.003).tokens
    32704
    """
    values: dict[str, Any] = {
        "split": split,
        "perplexity": perplexity,
        "nll": math.log(perplexity),
        "nll_stderr": 0.013,
        "kl": kl,
        "kl_stderr": None if kl is None else kl / 40,
        "windows": 64,
        "seqlen": 512,
        "tokens": 64 * 511,
        "text_sha256": f"{1 if split == 'test' else 2}" * 64,
        "dtype": "float32",
    }
    return Metrics(**{**values, **changed})


def example_summary(
    blocks: int = 2,
    pattern: str | None = None,
    storages: Sequence[str] = (str(PLAIN),),
    accounting: str = "params",
    **changed: Any,
) -> Summary:
    """Make up the summary of a finished run with all fields but those of a search; `changed` replaces fields.

    Args:
        blocks, pattern, storages, accounting: of the layers (`example_layers`).

    >>> summary = example_summary(asked=0.25)
    >>> summary.asked, summary.solver, len(summary.layers)
    (0.25, '3basil', 14)
    """
    layers = example_layers(blocks, pattern, storages, accounting)
    total = sum(layer.dense_cost for layer in layers)
    used = sum(layer.cost for layer in layers)
    predicted = math.fsum(layer.predicted for layer in layers if layer.predicted is not None)
    values: dict[str, Any] = {
        "command": "globalopt search --budget 0.5 --solver 3basil",
        "model": "reference",
        "allocator": "knapsack",
        "solver": "3basil",
        "seed": 0,
        "accounting": accounting,
        "asked": 0.5,
        "limit": used + 151,
        "used": used,
        "total": total,
        "predicted": predicted,
        "bound": predicted * 0.99988,
        "error_unit": ErrorUnit.NATS,
        "budget_unit": ErrorUnit.NATS,
        "covered": sum(layer.d_out * layer.d_in for layer in layers),
        "block_params": sum(layer.d_out * layer.d_in for layer in layers) + 4096,
        "skipped": {"model.embed_tokens": 2_097_152, "model.layers.5.self_attn.k_proj": 32_768},
        "layers": layers,
        "dense": (example_metrics("validation", 60.87, None), example_metrics("test", 62.21, None)),
        "compressed": (example_metrics("validation", 61.02, 0.00291), example_metrics("test", 62.44, 0.00302)),
        "stages": (
            StageCost("capture", 11.87, 912 * 2**20),
            StageCost("span", 23.4, 940 * 2**20),
            StageCost("sensitivity", 31.96, 1_610_612_736),
            StageCost("allocate", 0.61, 955 * 2**20),
            StageCost("refine", 82.4, 1_100 * 2**20),
            StageCost("evaluate", 9.1, 1_000 * 2**20),
        ),
        "splits": {
            "calibration": {"source": "wikitext-2", "sha256": "3" * 64, "windows": 64, "starts": list(range(64))},
            "test": {"source": "wikitext-2", "sha256": "1" * 64, "windows": 64, "starts": None},
        },
        "versions": {"globalopt": "0.1.0", "torch": "2.13.0"},
        "notes": ("The model was stored in bfloat16 and computed in float32.",),
    }
    return Summary(**{**values, **changed})


def example_search(wholes: int = 40, parts: int = 150, predicted: float = 0.0012, **changed: Any) -> Search:
    """Make up a search: evaluations on all 64 windows among others on 8 of them, and the best of the former.

    The measured losses are the predicted ones to the power of 0.9, with noise; the first evaluation has the lowest
    predicted loss.

    Args:
        wholes: evaluations on all windows.
        parts: evaluations on 8 windows.
        predicted: the lowest predicted loss.
        changed: replaces fields.

    >>> search = example_search(wholes=10, parts=20)
    >>> len(search.evaluations), sum(evaluation.whole for evaluation in search.evaluations)
    (30, 10)
    """
    random = np.random.default_rng(1)
    evaluations: list[Evaluation] = []
    tokens, total = 0, wholes + parts
    for n in range(total):
        whole = n * wholes % total < wholes
        left = 1 - n / total
        expected = predicted * (1 + 0.5 * left * random.gamma(1.0) * (n > 0))
        noise = (0.04 if whole else 0.25) * random.normal() - 0.15 * (1 - left)
        windows = 64 if whole else 8
        tokens += windows * 512
        evaluations.append(Evaluation(tokens, expected**0.9 * math.exp(noise), windows, whole, expected))
    best = min((e.loss for e in evaluations if e.whole), default=0.003)
    values: dict[str, Any] = {
        "tokens": tokens,
        "limit": 1_000_000 if tokens < 1_000_000 else round(1.1 * tokens),
        "candidates": "anchors",
        "top": 1024,
        "tail": 0.00424,
        "loss": best,
        "evaluations": tuple(evaluations),
    }
    return Search(**{**values, **changed})


def example_searched_summary(search: Search, **changed: Any) -> Summary:
    """Make up the summary of the run of a search; `changed` replaces fields.

    >>> example_searched_summary(example_search()).allocator
    'evolution'
    """
    predicted = next((e.predicted for e in search.evaluations if e.whole and e.loss == search.loss), 0.0013)
    return example_summary(**{"search": search, "allocator": "evolution", "predicted": predicted, **changed})


def example_matching(blocks: int = 2, model: bool = True) -> tuple[MatchResult, ...]:
    """Make up the matching of blocks, which lowers the loss of later ones more, and of the whole `model`.

    >>> [(match.block, match.loss) for match in example_matching()]
    [(0, 'nats'), (1, 'nats'), (None, 'kl')]
    """
    random = np.random.default_rng(2)
    found = []
    for block in range(blocks):
        before = 2e-5 * math.exp(3 * block / blocks + 0.3 * random.normal())
        after = before * (0.9 - 0.5 * block / blocks)
        found.append(MatchResult(block, "nats", before, after, 8, 0 if block == 0 else 7, 4.2))
    if model:
        found.append(MatchResult(None, "kl", 0.0031, 0.0024, 3, 3, 61.0))
    return tuple(found)


def example_curve(count: int, scale: float, slope: float) -> Curve:
    """Make up `count` values `scale / place^slope` in descending order, with a zero in the last place.

    >>> example_curve(4, scale=1.0, slope=1.0).values
    (1.0, 0.5, 0.3333333333333333, 0.0)
    """
    places = sorted({round(place) for place in np.geomspace(1, count, 40)})
    values = [scale / place**slope for place in places]
    return Curve(count, tuple(places), (*values[:-1], 0.0))


def example_curves(layer: LayerResult) -> LayerCurves:
    """Make up the singular values and saliencies of a layer, larger in later blocks.

    >>> example_curves(example_layers()[0]).singular.count
    256
    """
    scale = 1 + layer.block / 4
    singular = example_curve(min(layer.d_out, layer.d_in), 3 * scale, 0.8)
    return LayerCurves(singular, example_curve(layer.d_out * layer.d_in, scale / 4, 0.45))


def _trace(layer: LayerResult) -> Trace:
    """Make up ten values of an objective that falls to the layer's relative error."""
    least = max(layer.relative, 1e-6)
    return tuple((32 * n, 40.0 * (least + (1 - least) * math.exp(-0.9 * n))) for n in range(10))


def example_samples() -> Samples:
    """Make up two samples, one on which both models agree to the end, with text that looks like HTML.

    >>> [sample.agreed for sample in example_samples().samples]
    [6, 48]
    """
    return Samples(
        "validation",
        32,
        48,
        (
            Sample("The tower was built in", " 1889 , and is one of the most visited", " 1889 , and was", 6),
            Sample("<script>alert('x')</script> & so", " on </p><b>", " on </p><b>", 48),
        ),
    )


def example_details(summary: Summary, samples: Samples | None = None) -> Details:
    """Make up the curves of all layers of a run, and the traces of all but the dense ones.

    >>> details = example_details(example_summary())
    >>> len(details.curves), len(details.traces)
    (14, 13)
    """
    return Details(
        {layer.name: example_curves(layer) for layer in summary.layers},
        {layer.name: _trace(layer) for layer in summary.layers if layer.relative},
        samples,
    )


def example_losses(summary: Summary, worse: float = 0.0) -> tuple[WindowLosses, ...]:
    """Make up the losses of the windows of a run, one `WindowLosses` per split, around the means in its metrics.

    Args:
        worse: added to the losses of all windows.

    >>> (validation, test) = example_losses(example_summary())
    >>> test.split, len(test.kl)
    ('test', 64)
    """
    made = []
    for dense, compressed in zip(summary.dense, summary.compressed, strict=True):
        hard = [0.2 * math.sin(window) for window in range(compressed.windows)]
        noise = [1e-3 * math.cos(7 * window + 100 * worse) for window in range(compressed.windows)]
        nll = tuple(compressed.nll + worse + a + b for a, b in zip(hard, noise, strict=True))
        kl = tuple((compressed.kl or 0.0) + worse + b for b in noise)
        made.append(WindowLosses(compressed.split, compressed.text_sha256, nll, tuple(dense.nll + a for a in hard), kl))
    return tuple(made)


def example_family(**changed: Any) -> Family:
    """Make up a family of four nested budgets of a model with 7 billion parameters; `changed` replaces fields.

    >>> [point.asked for point in example_family().points]
    [0.1, 0.35, 0.6, 1.0]
    """
    values: dict[str, Any] = {
        "command": "globalopt search --frontier",
        "model": "reference",
        "solver": "3basil",
        "solver_options": {},
        "seed": 0,
        "accounting": "params",
        "pattern": "unstructured",
        "total": 7_000_000_000,
        "error_unit": ErrorUnit.NATS,
        "candidates": "anchors",
        "windows": 128,
        "seqlen": 256,
        "left_out": (),
        "stages": (),
        "versions": {},
        "points": tuple(_point(kept) for kept in FAMILY_KEPT),
    }
    return Family(**{**values, **changed})


def _point(kept: float, total: int = 7_000_000_000) -> FamilyPoint:
    """Make up the budget of a family that keeps the fraction `kept`."""
    loss, used = 0.3 * (1 - kept) ** 3, int(kept * total)
    return FamilyPoint(
        used=used,
        predicted=loss,
        measured=0.7 * loss,
        stderr=0.05 * loss,
        asked=kept,
        limit=used,
        file=f"budgets/{kept:g}.json",
        bound=0.9 * loss,
        gap=0.1 if loss else 0.0,
        uniform=Outcome(used, 2 * loss, 1.5 * loss, 0.1 * loss),
    )


def example_scores() -> Scorecard:
    """Make up the scores of a compressed and a dense model on one task.

    >>> example_scores().changes["arc_easy"]["acc"].value
    -0.02
    """

    def scored(model: str, accuracy: float) -> ModelScore:
        scores = {"acc": Score(accuracy, 0.01)}
        task = TaskScore("arc_easy", "1.0", "lm-eval", None, 2376, scores)
        return ModelScore(model, "4" * 64, "float32", (example_metrics("test", 62.4, 0.003),), (task,), scores, 0)

    changes = {"acc": Score(-0.02, 0.005)}
    return Scorecard(
        command="globalopt eval run --tasks arc_easy",
        model=scored("run", 0.40),
        dense=scored("reference", 0.42),
        changes={"arc_easy": changes},
        average_changes=changes,
        texts={},
        missing=(),
        limit=None,
        batch_size=8,
        versions={"lm-eval": "0.4.13"},
    )


def example_dry_run() -> DryRun:
    """Make up the estimates of a dry run.

    >>> example_dry_run().peak
    1500000000
    """
    return DryRun(
        model="reference",
        parameters=6_955_264,
        block_params=4_720_640,
        covered=4_718_592,
        skipped={"model.embed_tokens": 2_097_152},
        blocks=8,
        layers=56,
        lazy=False,
        states_in_files=False,
        memory={"the model": 500_000_000, "hidden states": 1_000_000_000},
        disk={"grams": 250_000_000, "layers": 50_000_000},
        most_disk=300_000_000,
        seconds={"analysis": 90.0, "refine": 60.0},
        rate=4e10,
        fit_seconds=0.4,
    )
