"""What a run found, as the one value that reports read: `summary.json` of a run folder.

Everything here was measured or decided earlier; a report computes nothing from the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from globalopt.values.decomposition import Trace


@dataclass(frozen=True)
class DryRun:
    """What a run would take; bytes and seconds by what they are for.

    Args:
        lazy: whether blocks would be read one at a time.
        states_in_files: whether hidden states would be kept in files.
        rate: floating-point operations per second of the timed product.
        fit_seconds: of the timed layer.
    """

    model: str
    parameters: int
    block_params: int
    covered: int
    skipped: Mapping[str, int]
    blocks: int
    layers: int
    lazy: bool
    states_in_files: bool
    memory: Mapping[str, int]
    disk: Mapping[str, int]
    seconds: Mapping[str, float]
    rate: float
    fit_seconds: float

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    def record(self) -> dict[str, object]:
        """JSON-able."""
        totals = {
            "coverage": self.covered / self.block_params,
            "peak_bytes": self.peak,
            "disk_bytes": sum(self.disk.values()),
            "all_seconds": sum(self.seconds.values()),
        }
        return {**{name: _plain(value) for name, value in vars(self).items()}, **totals}


def _plain(value: object) -> object:
    return dict(value) if isinstance(value, Mapping) else value


class ErrorUnit(StrEnum):
    """Name the unit of the predicted and actual errors of layers, as it stands in JSON files.

    `NATS`: increase of the mean loss in nats per token, `tr(A E G Eᵀ) / 2` with the output Gram `A`. `OUTPUT_ERROR`:
    `tr(E G Eᵀ)`, the squared error of the layer's output per token. `NOT_PREDICTED`: of budgets whose targets no search
    predicted anything for.

    >>> ErrorUnit("output error")
    <ErrorUnit.OUTPUT_ERROR: 'output error'>
    >>> f"3.1 {ErrorUnit.NATS}"
    '3.1 nats per token'
    """

    NATS = "nats per token"
    OUTPUT_ERROR = "output error"
    NOT_PREDICTED = "not predicted"


@dataclass(frozen=True)
class Metrics:
    """Quality of one model on one set of windows.

    Args:
        split: which split the windows are ("validation", "test").
        perplexity: `exp(nll)`.
        nll: mean negative log likelihood in nats over the predicted tokens (`seqlen - 1` per window).
        nll_stderr: its standard error over windows.
        kl: mean KL(dense || this model) in nats per predicted position, or None for the dense model itself.
        kl_stderr: its standard error over windows, or None.
        windows, seqlen, tokens: windows, their length, and predicted tokens in all.
        text_sha256: hash of the windows' token ids.
        dtype: what the model computed in.
    """

    split: str
    perplexity: float
    nll: float
    nll_stderr: float
    kl: float | None
    kl_stderr: float | None
    windows: int
    seqlen: int
    tokens: int
    text_sha256: str
    dtype: str


@dataclass(frozen=True)
class WindowLosses:
    """What each window of a split lost, in the order of the windows; the means of all are in `Metrics`.

    Args:
        nll, dense_nll: mean negative log likelihood of the compressed and the dense model, nats per token.
        kl: mean KL(dense || compressed) in nats per predicted position.
    """

    split: str
    text_sha256: str
    nll: tuple[float, ...]
    dense_nll: tuple[float, ...]
    kl: tuple[float, ...]


@dataclass(frozen=True)
class Curve:
    """Some of many values in descending order.

    Args:
        count: how many there are in all.
        places: whose `values` are kept, ascending; 1 is the largest value, `count` the least.
    """

    count: int
    places: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class LayerCurves:
    """What there is to keep in a layer: singular values of its activation-scaled weight, and saliencies of its entries.

    Args:
        singular: of `W D`, `D = diag(d)` the root mean squares of the inputs.
        saliency: `|W_ij| d_j`.
    """

    singular: Curve
    saliency: Curve


@dataclass(frozen=True)
class Sample:
    """How two models go on with one prompt, each taking its most likely token every time.

    Args:
        agreed: how many of the new tokens are the same before the first that is not.
    """

    prompt: str
    dense: str
    compressed: str
    agreed: int


@dataclass(frozen=True)
class Samples:
    """Text written by the dense model and by the compressed one.

    Args:
        split: whose first windows the prompts are the beginnings of.
        prompt_tokens, new_tokens: of every sample.
        skipped: why there are none, or None.
    """

    split: str
    prompt_tokens: int
    new_tokens: int
    samples: tuple[Sample, ...]
    skipped: str | None = None


@dataclass(frozen=True)
class Details:
    """What a report shows beside the summary, of runs that have it.

    Args:
        curves, traces: by layer; runs without spans have no curves, solvers without iterations no traces.
    """

    curves: Mapping[str, LayerCurves] = field(default_factory=dict)
    traces: Mapping[str, Trace] = field(default_factory=dict)
    samples: Samples | None = None


@dataclass(frozen=True)
class LayerPlan:
    """One layer and what it is given.

    Args:
        cost: parameters or bytes used, in the budget's accounting; `dense_cost` what the dense layer uses.
        predicted: the surface's error at the target, in the unit of the layer errors, or None where the budget was
            priced in another unit.
    """

    name: str
    block: int
    kind: str
    d_out: int
    d_in: int
    rank: int
    nnz: int
    pattern: str | None
    cost: int
    dense_cost: int
    predicted: float | None

    @property
    def kept(self) -> float:
        """Fraction of the layer kept, in the budget's accounting."""
        return self.cost / self.dense_cost

    @property
    def density(self) -> float:
        """Nonzeros of `S` over all weights."""
        return self.nnz / (self.d_out * self.d_in)

    @property
    def rank_params(self) -> int:
        return self.rank * (self.d_out + self.d_in)

    @property
    def rank_share(self) -> float:
        """Share of the kept parameters that sits in the low-rank factors; 0 for a layer that keeps nothing."""
        kept = self.rank_params + self.nnz
        return self.rank_params / kept if kept else 0.0


@dataclass(frozen=True)
class LayerResult(LayerPlan):
    """One refined layer: what it was given and what came of it.

    Args:
        actual: the refined layer's error in `Summary.error_unit`: `tr(A E G Eᵀ) / 2` in nats, or `tr(E G Eᵀ)`.
        relative: `tr(E G Eᵀ) / tr(W G Wᵀ)`, undamped, on the inputs the refinement saw.
        status: the solver's `Status` value; `damping` the damping it needed; `seconds` its time.
        bytes: of what is kept at 16 bits a value with the cheapest index (`Target.bytes`); 0 where nobody counted.
    """

    actual: float
    relative: float
    status: str
    damping: float
    seconds: float
    bytes: int = 0


@dataclass(frozen=True)
class MatchResult:
    """What matching did to one block, or to the whole model.

    Args:
        block: None for the whole model.
        loss: what was minimised: "sum", "token", "nats" (`matching.block.Loss`), or "kl".
        before, after: on held-out calibration windows, or on all where none were held out.
        epochs, kept_epoch: done, and the one whose parameters were kept; 0 is the start.
    """

    block: int | None
    loss: str
    before: float
    after: float
    epochs: int
    kept_epoch: int
    seconds: float


@dataclass(frozen=True)
class StageCost:
    """Seconds and peak resident memory in bytes of one stage (device memory where one is used)."""

    name: str
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Evaluation:
    """One candidate of a search, as it was asked about.

    Args:
        tokens: forward tokens the search had spent by then.
        loss: mean KL(dense || candidate) over `windows` windows of the selection text, nats per token.
        whole: whether these were all of them, so that losses compare.
        predicted: sum of the surfaces' errors, in the budget's unit.
    """

    tokens: int
    loss: float
    windows: int
    whole: bool
    predicted: float


@dataclass(frozen=True)
class Search:
    """A search on the true loss.

    Args:
        tokens, limit: forward tokens spent, and how many it had.
        candidates: what layers were made from, "fit" or "span".
        top, tail: log probabilities kept of the dense model per position, and the mean probability of all others.
        loss: of the chosen allocation on the whole selection text.
        evaluations: in the order they were asked for.
    """

    tokens: int
    limit: int
    candidates: str
    top: int
    tail: float
    loss: float
    evaluations: tuple[Evaluation, ...]


@dataclass(frozen=True)
class Outcome:
    """What an allocation is expected to lose, and what a candidate made for it loses.

    Args:
        used: in the budget's unit.
        predicted: sum of the surfaces' errors.
        measured: mean KL(dense || candidate) on the selection text in nats per token, or None.
        stderr: its standard error over windows, or None.
    """

    used: int
    predicted: float
    measured: float | None
    stderr: float | None


@dataclass(frozen=True)
class FamilyPoint(Outcome):
    """One budget of a family.

    Args:
        asked: fraction kept; `limit` the same in the budget's unit.
        file: the budget file, relative to the run folder.
        bound: no allocation of this budget, nested or not, has a lower prediction.
        gap: `(predicted - bound) / predicted`.
        uniform: what the uniform allocation of the same budget comes to.
    """

    asked: float
    limit: int
    file: str
    bound: float
    gap: float
    uniform: Outcome


@dataclass(frozen=True)
class Family:
    """Budgets of one analysis, each within the next larger one.

    Args:
        solver, solver_options: what the layers were priced for.
        left_out: fractions that were asked for and that the pattern does not reach.
        error_unit: of the predictions.
        candidates: what measured layers were made from, "fit" or "span"; None where nothing was measured.
        windows, seqlen: of the selection text.
        points: ascending in what they keep.
    """

    command: str
    model: str
    solver: str
    solver_options: Mapping[str, str]
    seed: int
    accounting: str
    pattern: str
    total: int
    error_unit: ErrorUnit
    candidates: str | None
    windows: int
    seqlen: int
    left_out: tuple[float, ...]
    stages: tuple[StageCost, ...]
    versions: Mapping[str, str]
    points: tuple[FamilyPoint, ...]


@dataclass(frozen=True)
class Summary:
    """A finished run.

    Args:
        command: what was typed, without paths of the program itself.
        model: how the model was named by the user; `reference` when it is the bundled one.
        allocator, solver: their names; `allocator` as written in the budget file.
        accounting, asked, limit, used, total: the budget in its unit; `asked` as a fraction kept.
        predicted, bound: of the allocation, in `budget_unit`; None without a prediction, without a certificate.
        error_unit, budget_unit: of the layers' errors, and of the allocation.
        covered, block_params, skipped: coverage; `skipped` maps what is not covered to its parameters.
        dense, compressed: metrics of both on the same windows, one per split, in the same order.
        splits: how each split was made: source, hash, windows, seed.
        notes: what a reader must know (conversions, fallbacks).
        search: None where the allocator did not ask the model.
        matching: one entry per matched block, and one for the model if it was matched.
        uniform: what the uniform allocation of the same budget comes to, in `budget_unit`; None where nothing was
            searched.
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
