"""How much two runs differ, with confidence intervals: paired by windows where each run kept what every window lost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from globalopt.values.results import Metrics, Summary, WindowLosses
from reports import formats

CONFIDENCE = 0.95
DENSE_TOLERANCE = 1e-3  # in nats: the same model in another dtype or on another device stays within


@dataclass(frozen=True)
class Interval:
    """A difference and the ends of its confidence interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the difference is significant."""
        return self.low > 0 or self.high < 0

    def texts(self, scale: float = 1.0) -> tuple[str, str, str]:
        """Format value and ends, times `scale`, with the decimals that show half the width in two digits."""
        value, low, high = (scale * end for end in (self.value, self.low, self.high))
        half = (high - low) / 2
        decimals = formats.decimals(half, 2) if half > 0 and math.isfinite(half) else 4
        return f"{value:+.{decimals}f}", f"{low:+.{decimals}f}", f"{high:+.{decimals}f}"


@dataclass(frozen=True)
class Difference:
    """What a run loses more than the one it is held against, on one split; negative is better.

    Args:
        kl: of the mean KL to the dense model, in nats per token.
        perplexity: relative, `exp(difference of nll) - 1`.
        windows: of the split.
        paired: whether the intervals are those of differences window by window. Otherwise the two means are taken as
            independent, which on the same windows they are not: the intervals are then too wide.
        reasons: why the runs do not compare, one sentence each; there are no differences then.
    """

    run: str
    against: str
    split: str
    kl: Interval | None
    perplexity: Interval | None
    windows: int
    paired: bool
    reasons: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """ "better", "worse" or "undecided" by KL, by perplexity where that is unknown; "-" where both are."""
        found = self.kl or self.perplexity
        if found is None:
            return "-"
        if not found.excludes_zero:
            return "undecided"
        return "better" if found.high < 0 else "worse"


@dataclass(frozen=True)
class Measured:
    """A run as it is compared: what it is called, what it found, and what its windows lost (empty where unknown)."""

    label: str
    summary: Summary
    losses: tuple[WindowLosses, ...] = ()

    def metrics(self, split: str) -> tuple[Metrics, Metrics] | None:
        """Dense and compressed metrics on `split`."""
        for dense, compressed in zip(self.summary.dense, self.summary.compressed, strict=True):
            if compressed.split == split:
                return dense, compressed
        return None

    def windows(self, split: str) -> WindowLosses | None:
        """What the windows behind the metrics on `split` lost."""
        pair = self.metrics(split)
        for losses in self.losses:
            if pair and losses.split == split and losses.text_sha256 == pair[1].text_sha256:
                whole = len(losses.nll) == len(losses.kl) == pair[1].windows
                return losses if whole and all(map(math.isfinite, (*losses.nll, *losses.kl))) else None
        return None


def difference(run: Measured, against: Measured, split: str) -> Difference:
    """Hold `run` against another on `split`.

    The interval of a mean of n differences d is `mean(d) ± q std(d) / sqrt(n)` with Student's quantile q for n - 1;
    that of two independent means `a - b ± q sqrt(se_a² + se_b²)`.
    """
    pairs = run.metrics(split), against.metrics(split)
    reasons = incomparable((against, run), split)
    if not reasons and any(pair is not None and pair[1].windows < 2 for pair in pairs):
        reasons = ("a single window has no spread",)
    if reasons or pairs[0] is None or pairs[1] is None:
        return Difference(run.label, against.label, split, None, None, 0, False, reasons)
    mine, other = pairs[0][1], pairs[1][1]
    q = float(stdtrit(mine.windows - 1, (1 + CONFIDENCE) / 2))
    windows = run.windows(split), against.windows(split)
    if windows[0] is not None and windows[1] is not None:
        kl = _paired(windows[0].kl, windows[1].kl, q)
        nll = _paired(windows[0].nll, windows[1].nll, q)
    else:
        nll = _independent(mine.nll, mine.nll_stderr, other.nll, other.nll_stderr, q)
        kl = _independent(mine.kl, mine.kl_stderr, other.kl, other.kl_stderr, q)
    perplexity = None if nll is None else _relative(nll)
    paired = None not in windows
    return Difference(run.label, against.label, split, kl, perplexity, mine.windows, paired, ())


def incomparable(runs: Sequence[Measured], split: str) -> tuple[str, ...]:
    """List the reasons why the figures of runs on `split` do not compare, one sentence each; empty where they do.

    Compared are the names and shapes of the layers, the text (hash of the windows' token ids), the window length, the
    dense model (its negative log likelihood on that text, within `DENSE_TOLERANCE`), and the accounting.
    """
    pairs = [(run.label, run.metrics(split)) for run in runs]
    known = [(label, *pair) for label, pair in pairs if pair is not None]
    missing = [label for label, pair in pairs if pair is None]
    reasons = [f"no figures on {split}: {', '.join(missing)}"] if missing else []
    shapes: dict[frozenset[tuple[str, int, int]], list[Measured]] = {}
    for run in runs:
        shapes.setdefault(_shapes(run.summary), []).append(run)
    if len(shapes) > 1:
        sizes = [
            f"{len(of)} layers, {formats.compact(some[0].summary.covered)} parameters ({_labels(some)})"
            for of, some in shapes.items()
        ]
        reasons.append(f"model differs in names or shapes of layers: {'; '.join(sizes)}")
    on_text = [
        *_disagreement("text", [(label, compressed.text_sha256[:12]) for label, _, compressed in known]),
        *_disagreement("window length", [(label, str(compressed.seqlen)) for label, _, compressed in known]),
    ]
    reasons += on_text
    losses = [dense.nll for _, dense, _ in known]
    if losses and not on_text and max(losses) - min(losses) > DENSE_TOLERANCE:
        perplexities = [(label, formats.significant(dense.perplexity)) for label, dense, _ in known]
        reasons += _disagreement("dense perplexity", perplexities)
    reasons += _disagreement("accounting", [(run.label, run.summary.accounting) for run in runs])
    return tuple(reasons)


def _disagreement(what: str, values: Sequence[tuple[str, str]]) -> list[str]:
    """Say which runs have which value, by label and value; nothing where all have the same."""
    groups: dict[str, list[str]] = {}
    for label, value in values:
        groups.setdefault(value, []).append(label)
    parts = [f"{value} ({', '.join(labels)})" for value, labels in groups.items()]
    return [f"{what} differs: {'; '.join(parts)}"] if len(parts) > 1 else []


def _labels(runs: Sequence[Measured]) -> str:
    return ", ".join(run.label for run in runs)


def _relative(nll: Interval) -> Interval | None:
    """The relative change of the perplexity; None where it is too large for a float."""
    try:
        return Interval(*(math.expm1(end) for end in (nll.value, nll.low, nll.high)))
    except OverflowError:
        return None


def _shapes(summary: Summary) -> frozenset[tuple[str, int, int]]:
    return frozenset((layer.name, layer.d_out, layer.d_in) for layer in summary.layers)


def _paired(mine: Sequence[float], other: Sequence[float], q: float) -> Interval:
    differences = np.array(mine) - np.array(other)
    mean = float(differences.mean())
    half = q * float(differences.std(ddof=1)) / math.sqrt(len(differences))
    return Interval(mean, mean - half, mean + half)


def _independent(
    mine: float | None, stderr: float | None, other: float | None, other_stderr: float | None, q: float
) -> Interval | None:
    if mine is None or stderr is None or other is None or other_stderr is None:
        return None
    half = q * math.hypot(stderr, other_stderr)
    return Interval(mine - other, mine - other - half, mine - other + half)
