"""Collect the results of a run in one value that reports read, `summary.json` of a run folder.

Everything here was measured or decided earlier; a report computes nothing from the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from globalopt.values.budget import Target
from globalopt.values.decomposition import Trace
from globalopt.values.embeddings import Embedding
from globalopt.values.layer import NM
from globalopt.values.storage import PLAIN, Storage


@dataclass(frozen=True)
class DryRun:
    """Estimate the memory, disk space and time that a run would take.

    Args:
        model: name of the model, as the user gave it.
        parameters, block_params, covered: parameters of the model, of its decoder blocks, and of its compressible
            layers.
        skipped: parameters outside the compressible layers, by what they are.
        blocks, layers: how many there are.
        lazy: whether decoder blocks would be read one at a time.
        states_in_files: whether hidden states would be kept in files instead of memory.
        memory, disk: bytes by purpose.
        seconds: by stage.
        rate: floating-point operations per second of a timed matrix product.
        fit_seconds: seconds that the solver took for a timed layer.

    >>> plan = DryRun(
    ...     "reference", 2_500_000, 2_000_000, 1_900_000, {"norms and biases": 100_000}, blocks=8, layers=56,
    ...     lazy=False, states_in_files=False, memory={"model": 3 * 10**7, "Gram": 10**6}, disk={"model": 10**7},
    ...     seconds={"fit": 90.0, "search": 30.0}, rate=5e10, fit_seconds=0.5,
    ... )
    >>> plan.peak, plan.record()["all_seconds"], plan.record()["coverage"]
    (31000000, 120.0, 0.95)
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
        """Sum the estimated bytes of memory."""
        return sum(self.memory.values())

    def record(self) -> dict[str, object]:
        """Return all fields and their totals as JSON values."""
        totals = {
            "coverage": self.covered / self.block_params,
            "peak_bytes": self.peak,
            "disk_bytes": sum(self.disk.values()),
            "all_seconds": sum(self.seconds.values()),
        }
        return {**{name: _plain(value) for name, value in vars(self).items()}, **totals}


def _plain(value: object) -> object:
    """Convert a read-only mapping to a dict, which JSON can write."""
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
    """Hold the perplexity and the KL divergence of one model on one set of windows.

    Args:
        split: which split the windows are ("validation", "test").
        perplexity: `exp(nll)`.
        nll: mean negative log likelihood in nats over the predicted tokens (`seqlen - 1` per window).
        nll_stderr: its standard error over windows.
        kl: mean KL(dense || this model) in nats per predicted position, or None for the dense model itself.
        kl_stderr: its standard error over windows, or None.
        windows, seqlen, tokens: number of windows, their length, and the number of predicted tokens.
        text_sha256: hash of the windows' token ids.
        dtype: the floating-point type that the model computed in.

    >>> import math
    >>> metrics = Metrics("test", math.exp(3.0), 3.0, 0.01, None, None, 64, 512, 64 * 511, "9f2c", "float32")
    >>> f"perplexity {metrics.perplexity:.2f} on {metrics.tokens} tokens"
    'perplexity 20.09 on 32704 tokens'
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
    """Hold the losses of every window of a split, in the order of the windows; `Metrics` has their means.

    Args:
        split: which split the windows are.
        text_sha256: hash of the windows' token ids.
        nll, dense_nll: mean negative log likelihood of the compressed and of the dense model, nats per token.
        kl: mean KL(dense || compressed) in nats per predicted position.

    >>> losses = WindowLosses("test", "9f2c", nll=(3.2, 2.9), dense_nll=(3.1, 2.9), kl=(0.08, 0.02))
    >>> [round(nll - dense, 2) for nll, dense in zip(losses.nll, losses.dense_nll)]
    [0.1, 0.0]
    """

    split: str
    text_sha256: str
    nll: tuple[float, ...]
    dense_nll: tuple[float, ...]
    kl: tuple[float, ...]


@dataclass(frozen=True)
class Curve:
    """Keep a few of many values in descending order, enough to draw their curve.

    Args:
        count: number of values in all.
        places: ranks of the kept `values`, ascending; 1 is the largest value, `count` the smallest.
        values: the kept values.

    >>> curve = Curve(count=1000, places=(1, 10, 1000), values=(8.0, 3.5, 0.1))
    >>> dict(zip(curve.places, curve.values))[10]  # the tenth largest
    3.5
    """

    count: int
    places: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class LayerCurves:
    """Keep the singular values and the saliencies of one layer, which show how much a rank or a nonzero is worth.

    Args:
        singular: singular values of `W D`, where `D = diag(d)` holds the root mean squares of the inputs.
        saliency: Wanda's scores `|W_ij| d_j` of all entries.

    >>> curves = LayerCurves(Curve(3, (1, 3), (5.0, 0.2)), Curve(6, (1, 6), (2.0, 0.0)))
    >>> curves.singular.values[0] / curves.singular.values[-1]  # condition number
    25.0
    """

    singular: Curve
    saliency: Curve


@dataclass(frozen=True)
class Sample:
    """Compare how two models continue one prompt by greedy decoding.

    Args:
        prompt: the text both start from.
        dense, compressed: the continuations of the two models.
        agreed: number of new tokens before the first that differs.

    >>> sample = Sample("The capital of France is", dense=" Paris. It", compressed=" Paris, which", agreed=1)
    >>> sample.dense == sample.compressed
    False
    """

    prompt: str
    dense: str
    compressed: str
    agreed: int


@dataclass(frozen=True)
class Samples:
    """Collect continuations by the dense and by the compressed model.

    Args:
        split: the split whose first windows start with the prompts.
        prompt_tokens, new_tokens: tokens of every prompt and of every continuation.
        samples: one per prompt.
        skipped: the reason why there are no samples, or None.

    >>> one = Sample("The capital of France is", dense=" Paris. It", compressed=" Paris, which", agreed=1)
    >>> found = Samples("test", prompt_tokens=5, new_tokens=3, samples=(one,))
    >>> sum(sample.agreed for sample in found.samples) / (len(found.samples) * found.new_tokens)
    0.3333333333333333
    """

    split: str
    prompt_tokens: int
    new_tokens: int
    samples: tuple[Sample, ...]
    skipped: str | None = None


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
class LayerPlan:
    """Describe one layer and the target that an allocation gives it.

    Args:
        name, block, kind, d_out, d_in: as in `LayerSpec`.
        rank, nnz, pattern: the target; `pattern` as text ("2:4") or None.
        cost: parameters or bytes used, in the budget's accounting. dense_cost: those of the dense layer.
        predicted: the layer's predicted loss at the target, in the unit of the layer errors; None where the allocation
            was made in another unit.
        storage: bits of the stored numbers, as text ("16", "4/8").
        signs: whether the target has a plane of signs.

    >>> size = dict(rank=8, nnz=1024, pattern=None, cost=2048, dense_cost=4096)
    >>> plan = LayerPlan("q_proj", 0, "q_proj", 64, 64, **size, predicted=0.01)
    >>> plan.kept, plan.density, plan.rank_share
    (0.5, 0.25, 0.5)
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
    storage: str = field(default=str(PLAIN), kw_only=True)
    signs: bool = field(default=False, kw_only=True)

    @property
    def target(self) -> Target:
        """The layer's target."""
        pattern = NM.parse(self.pattern) if self.pattern else None
        return Target(self.rank, self.nnz, pattern, self.signs, Storage.parse(self.storage))

    @property
    def kept(self) -> float:
        """Compute the fraction of the layer that is kept, in the budget's accounting."""
        return self.cost / self.dense_cost

    @property
    def density(self) -> float:
        """Compute the nonzeros of `S` as a fraction of all weights."""
        return self.nnz / (self.d_out * self.d_in)

    @property
    def rank_params(self) -> int:
        """Count the parameters of the low-rank factors."""
        return self.rank * (self.d_out + self.d_in)

    @property
    def rank_share(self) -> float:
        """Compute the share of the kept parameters that lies in the factors `U` and `V`; 0 where nothing is kept."""
        kept = self.rank_params + self.nnz
        return self.rank_params / kept if kept else 0.0

    @property
    def number_bits(self) -> int:
        """Count the bits of the values of `S` and of the entries of `U` and `V`, without scales and index."""
        storage = Storage.parse(self.storage)
        return storage.values * self.nnz + storage.factors * self.rank_params


@dataclass(frozen=True)
class LayerResult(LayerPlan):
    """Record one refined layer: its target, and the error that the solver reached.

    Args:
        actual: error of the refined layer in `Summary.error_unit`: `tr(A E G Eᵀ) / 2` in nats, or `tr(E G Eᵀ)`.
        relative: `tr(E G Eᵀ) / tr(W G Wᵀ)`, undamped, on the inputs of the refinement.
        status: the value of the solver's `Status`.
        damping: the damping that the solver needed, as a fraction of the mean of the Gram's diagonal.
        seconds: time of the solver.
        bytes: size in its storage with the cheapest index (`Target.bytes`); 0 where it was not counted.

    >>> target = dict(rank=8, nnz=1024, pattern=None, cost=2048, dense_cost=4096, predicted=0.010)
    >>> found = dict(actual=0.012, relative=0.05, status="converged", damping=0.01, seconds=0.4)
    >>> layer = LayerResult("q_proj", 0, "q_proj", 64, 64, **target, **found)
    >>> round(layer.actual / layer.predicted, 2), layer.kept
    (1.2, 0.5)
    """

    actual: float
    relative: float
    status: str
    damping: float
    seconds: float
    bytes: int = 0


@dataclass(frozen=True)
class MatchResult:
    """Record the loss before and after matching one block, or the whole model, to the dense one.

    Args:
        block: index of the block; None for the whole model.
        loss: the loss that was minimised: "sum", "token", "nats" (`globalopt.matching.block.Loss`), or "kl".
        before, after: the loss on held-out calibration windows, or on all of them where none were held out.
        epochs: epochs trained. kept_epoch: the epoch whose parameters were kept; 0 is the start.
        seconds: time of the training.

    >>> match = MatchResult(3, "token", before=0.20, after=0.15, epochs=4, kept_epoch=4, seconds=2.0)
    >>> f"{1 - match.after / match.before:.0%} less"
    '25% less'
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
    """Record the seconds and the peak memory of one stage.

    Args:
        name: of the stage.
        seconds: wall-clock time.
        peak_bytes: peak resident memory, or peak memory of the accelerator where one is used.

    >>> max((StageCost("capture", 12.0, 900), StageCost("fit", 80.0, 700)), key=lambda cost: cost.seconds).name
    'fit'
    """

    name: str
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Evaluation:
    """Record one candidate of a search and its loss.

    Args:
        tokens: forward tokens that the search had spent by then.
        loss: mean KL(dense || candidate) over `windows` windows of the selection text, nats per token.
        windows: number of windows the loss was taken on.
        whole: whether these were all windows of the text, so that losses can be compared.
        predicted: sum of the layers' predicted losses, in the budget's unit.

    >>> tried = (Evaluation(4096, 0.031, 8, True, 0.029), Evaluation(8192, 0.027, 8, True, 0.030))
    >>> min(tried, key=lambda evaluation: evaluation.loss).tokens
    8192
    """

    tokens: int
    loss: float
    windows: int
    whole: bool
    predicted: float


@dataclass(frozen=True)
class Search:
    """Record a search that evaluated candidates on the model's true loss.

    Args:
        tokens, limit: forward tokens spent, and allowed.
        candidates: how the layers of candidates were made: "anchors" (from anchor solutions) or "span" (from spans).
        top, tail: number of log probabilities of the dense model kept per position, and the mean probability of all
            other tokens.
        loss: loss of the chosen allocation on the whole selection text.
        evaluations: in the order they were made.

    >>> tried = (Evaluation(4096, 0.031, 8, True, 0.029), Evaluation(8192, 0.027, 8, True, 0.030))
    >>> search = Search(8192, 500_000, "anchors", top=1024, tail=0.01, loss=0.027, evaluations=tried)
    >>> search.loss == min(evaluation.loss for evaluation in search.evaluations if evaluation.whole)
    True
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
    """Compare the predicted loss of an allocation with the measured loss of a candidate made for it.

    Args:
        used: cost of the allocation, in the budget's unit.
        predicted: sum of the layers' predicted losses.
        measured: mean KL(dense || candidate) on the selection text in nats per token, or None.
        stderr: its standard error over windows, or None.

    >>> outcome = Outcome(used=2048, predicted=0.030, measured=0.033, stderr=0.001)
    >>> round(outcome.measured / outcome.predicted, 2)
    1.1
    """

    used: int
    predicted: float
    measured: float | None
    stderr: float | None


@dataclass(frozen=True)
class FamilyPoint(Outcome):
    """Record the allocation of one budget of a family.

    Args:
        asked: fraction to be kept. limit: the same in the budget's unit.
        file: path of the budget file, relative to the run folder.
        bound: a proved lower bound on the prediction of every allocation within this budget, nested or not.
        gap: `(predicted - bound) / predicted`.
        uniform: outcome of the uniform allocation of the same budget.

    >>> uniform = Outcome(2048, predicted=0.050, measured=None, stderr=None)
    >>> point = FamilyPoint(
    ...     2048, 0.040, None, None, asked=0.5, limit=2048, file="0.5.json", bound=0.039, gap=0.025, uniform=uniform
    ... )
    >>> f"{1 - point.predicted / point.uniform.predicted:.0%} below uniform"
    '20% below uniform'
    """

    asked: float
    limit: int
    file: str
    bound: float
    gap: float
    uniform: Outcome


@dataclass(frozen=True)
class Family:
    """Collect nested budgets of one analysis: no layer keeps more at a smaller budget than at a larger one.

    Args:
        command, model, seed, accounting, versions: as in `Summary`.
        solver, solver_options: the solver that the losses were predicted for.
        pattern: as text, "unstructured" or "2:4".
        total: cost of the dense layers, in the budget's unit.
        error_unit: unit of the predictions.
        candidates: how the layers of measured candidates were made, "anchors" or "span"; None where nothing was
            measured.
        windows, seqlen: of the selection text.
        left_out: fractions that were asked for but cannot be reached with the pattern.
        stages: cost of every stage.
        points: one per budget, ascending in the fraction kept.

    >>> uniform = Outcome(2048, predicted=0.050, measured=None, stderr=None)
    >>> point = FamilyPoint(2048, 0.04, None, None, 0.5, 2048, "0.5.json", 0.039, 0.025, uniform)
    >>> family = Family(
    ...     "globalopt family", "reference", "3basil", {}, seed=0, accounting="params", pattern="unstructured",
    ...     total=4096, error_unit=ErrorUnit.NATS, candidates=None, windows=64, seqlen=128, left_out=(), stages=(),
    ...     versions={},
    ...     points=(point,),
    ... )
    >>> [point.limit / family.total for point in family.points]
    [0.5]
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
