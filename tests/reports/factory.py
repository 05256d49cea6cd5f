"""A finished run, made up: eight Llama blocks, one layer missing, one that fell back."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from globalopt.values.decomposition import Trace
from globalopt.values.results import (
    Curve,
    Details,
    ErrorUnit,
    Evaluation,
    LayerCurves,
    LayerResult,
    MatchResult,
    Metrics,
    Sample,
    Samples,
    Search,
    StageCost,
    Summary,
)

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
FALLBACK = (3, "down_proj")


def make_layers(blocks: int = 8, pattern: str | None = None) -> tuple[LayerResult, ...]:
    """Layers that keep more the deeper they are and the smaller they are; block 0's v_proj is left dense."""
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
                    cost=rank * (d_out + d_in) + nnz,
                    dense_cost=numel,
                    predicted=predicted,
                    actual=predicted * math.exp(0.4 * random.normal() + 0.3),
                    relative=0.0 if untouched else 0.02 * math.exp(random.normal() - 2 * kept),
                    status="fallback" if (block, kind) == FALLBACK else "converged",
                    damping=0.1 if (block, kind) == FALLBACK else 0.01,
                    seconds=0.35 + 0.1 * random.random(),
                    bytes=2 * numel if untouched else 2 * (rank * (d_out + d_in) + nnz) + numel // 8,
                )
            )
    return tuple(layers)


def make_metrics(split: str, perplexity: float, kl: float | None, **changed: Any) -> Metrics:
    """Metrics of 64 windows of 512 tokens."""
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


def make_summary(blocks: int = 8, pattern: str | None = None, **changed: Any) -> Summary:
    """A run with every field filled; `changed` replaces fields."""
    layers = make_layers(blocks, pattern)
    total = sum(layer.dense_cost for layer in layers)
    used = sum(layer.cost for layer in layers)
    predicted = math.fsum(layer.predicted for layer in layers if layer.predicted is not None)
    values: dict[str, Any] = {
        "command": "globalopt search --budget 0.5 --solver 3basil",
        "model": "reference",
        "allocator": "knapsack",
        "solver": "3basil",
        "seed": 0,
        "accounting": "params",
        "asked": 0.5,
        "limit": used + 151,
        "used": used,
        "total": total,
        "predicted": predicted,
        "bound": predicted * 0.99988,
        "error_unit": ErrorUnit.NATS,
        "budget_unit": ErrorUnit.NATS,
        "covered": total,
        "block_params": total + 4096,
        "skipped": {"model.embed_tokens": 2_097_152, "model.layers.5.self_attn.k_proj": 32_768},
        "layers": layers,
        "dense": (make_metrics("validation", 60.87, None), make_metrics("test", 62.21, None)),
        "compressed": (make_metrics("validation", 61.02, 0.00291), make_metrics("test", 62.44, 0.00302)),
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


def make_search(wholes: int = 40, parts: int = 150, predicted: float = 0.0012, **changed: Any) -> Search:
    """Whole evaluations between parts on 8 of 64 windows; the best whole one is chosen.

    Measured is `predicted^0.9` but for noise, around a surrogate's least loss of `predicted`, where the first is.
    """
    random = np.random.default_rng(1)
    evaluations: list[Evaluation] = []
    tokens, total = 0, wholes + parts
    for n in range(total):
        whole = n * wholes % total < wholes
        left = 1 - n / total
        foretold = predicted * (1 + 0.5 * left * random.gamma(1.0) * (n > 0))
        noise = (0.04 if whole else 0.25) * random.normal() - 0.15 * (1 - left)
        windows = 64 if whole else 8
        tokens += windows * 512
        evaluations.append(Evaluation(tokens, foretold**0.9 * math.exp(noise), windows, whole, foretold))
    best = min((e.loss for e in evaluations if e.whole), default=0.003)
    values: dict[str, Any] = {
        "tokens": tokens,
        "limit": 1_000_000 if tokens < 1_000_000 else round(1.1 * tokens),
        "candidates": "fit",
        "top": 1024,
        "tail": 0.00424,
        "loss": best,
        "evaluations": tuple(evaluations),
    }
    return Search(**{**values, **changed})


def make_searched(search: Search, **changed: Any) -> Summary:
    """A run whose allocation is the whole evaluation with the loss of `search`."""
    predicted = next((e.predicted for e in search.evaluations if e.whole and e.loss == search.loss), 0.0013)
    return make_summary(**{"search": search, "allocator": "evolution", "predicted": predicted, **changed})


def make_matching(blocks: int = 8, model: bool = True) -> tuple[MatchResult, ...]:
    """Every block a little better, the later the more; the whole model too."""
    random = np.random.default_rng(2)
    found = []
    for block in range(blocks):
        before = 2e-5 * math.exp(3 * block / blocks + 0.3 * random.normal())
        after = before * (0.9 - 0.5 * block / blocks)
        found.append(MatchResult(block, "nats", before, after, 8, 0 if block == 0 else 7, 4.2))
    if model:
        found.append(MatchResult(None, "kl", 0.0031, 0.0024, 3, 3, 61.0))
    return tuple(found)


def make_curve(count: int, scale: float, slope: float) -> Curve:
    """`scale / place^slope`, zero in the last place."""
    places = sorted({round(place) for place in np.geomspace(1, count, 40)})
    values = [scale / place**slope for place in places]
    return Curve(count, tuple(places), (*values[:-1], 0.0))


def make_curves(layer: LayerResult) -> LayerCurves:
    scale = 1 + layer.block / 4
    singular = make_curve(min(layer.d_out, layer.d_in), 3 * scale, 0.8)
    return LayerCurves(singular, make_curve(layer.d_out * layer.d_in, scale / 4, 0.45))


def make_trace(layer: LayerResult) -> Trace:
    """Ten looks at an objective that falls to the layer's relative error."""
    least = max(layer.relative, 1e-6)
    return tuple((32 * n, 40.0 * (least + (1 - least) * math.exp(-0.9 * n))) for n in range(10))


def make_samples() -> Samples:
    """Two prompts, one on which both models agree to the end, and text that looks like HTML."""
    return Samples(
        "validation",
        32,
        48,
        (
            Sample("The tower was built in", " 1889 , and is one of the most visited", " 1889 , and was", 6),
            Sample("<script>alert('x')</script> & so", " on </p><b>", " on </p><b>", 48),
        ),
    )


def make_details(summary: Summary, samples: Samples | None = None) -> Details:
    """Curves of all layers, traces of all but the dense one."""
    return Details(
        {layer.name: make_curves(layer) for layer in summary.layers},
        {layer.name: make_trace(layer) for layer in summary.layers if layer.relative},
        samples,
    )
