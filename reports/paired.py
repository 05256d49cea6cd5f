"""Compute differences between runs with confidence intervals, paired by windows where both runs kept their losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from globalopt.values.metrics import Metrics, WindowLosses
from globalopt.values.results import Summary
from reports import formats

CONFIDENCE = 0.95
DENSE_TOLERANCE = 1e-3  # in nats; the losses of one model in two dtypes or on two devices differ by less


@dataclass(frozen=True)
class Interval:
    """Hold a difference and the ends of its confidence interval.

    >>> Interval(0.0123, 0.0101, 0.0145).excludes_zero
    True
    >>> Interval(0.0123, 0.0101, 0.0145).texts()
    ('+0.0123', '+0.0101', '+0.0145')
    """

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
    """Hold the differences of a run to another on one split; below zero the run is better.

    Args:
        run, against: labels of the two.
        kl: of the mean KL to the dense model, in nats per token.
        perplexity: relative, `exp(difference of nll) - 1`.
        windows: of the split.
        paired: whether the intervals are of differences window by window. Otherwise the two means are taken as
            independent. On the same windows they are correlated, so that the intervals are then too wide.
        reasons: why the runs do not compare, one sentence each; there are no differences then.

    >>> Difference("b", "a", "test", Interval(-0.1, -0.2, -0.05), None, 64, True, ()).verdict
    'better'
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
    """Hold a run to compare: its label, its summary, and the losses of its windows, empty where they are not known.

    >>> from reports.example import example_losses, example_summary
    >>> run = Measured("a", example_summary(), example_losses(example_summary()))
    >>> dense, compressed = run.metrics("test")
    >>> compressed.perplexity, len(run.windows("test").kl)
    (62.44, 64)
    """

    label: str
    summary: Summary
    losses: tuple[WindowLosses, ...] = ()

    def metrics(self, split: str) -> tuple[Metrics, Metrics] | None:
        """Return the metrics of the dense and of the compressed model on `split`; None where there are none."""
        for dense, compressed in zip(self.summary.dense, self.summary.compressed, strict=True):
            if compressed.split == split:
                return dense, compressed
        return None

    def windows(self, split: str) -> WindowLosses | None:
        """Return the losses of the windows of `split`; None where they are not known, or not those of the metrics."""
        pair = self.metrics(split)
        for losses in self.losses:
            if pair and losses.split == split and losses.text_sha256 == pair[1].text_sha256:
                whole = len(losses.nll) == len(losses.kl) == pair[1].windows
                return losses if whole and all(map(math.isfinite, (*losses.nll, *losses.kl))) else None
        return None


def difference(run: Measured, against: Measured, split: str) -> Difference:
    """Compute the differences of `run` to `against` on `split`, with confidence intervals.

    Paired, the interval of the mean of n differences d is `mean(d) ± q std(d) / sqrt(n)`, with Student's quantile q for
    n - 1 degrees of freedom; that of two independent means is `a - b ± q sqrt(se_a² + se_b²)`.

    >>> from reports.example import example_losses, example_summary
    >>> a = Measured("a", example_summary(), example_losses(example_summary()))
    >>> b = Measured("b", example_summary(), example_losses(example_summary(), worse=0.01))
    >>> found = difference(b, a, "test")
    >>> found.verdict, found.paired, found.kl.texts()
    ('worse', True, ('+0.00997', '+0.00980', '+0.01014'))
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

    Checked are the names and shapes of the layers, the text (hash of the windows' token ids), the window length, the
    dense model (its negative log likelihood on that text, within `DENSE_TOLERANCE`), and the accounting.

    >>> from reports.example import example_summary
    >>> runs = [Measured("a", example_summary()), Measured("b", example_summary(accounting="bytes"))]
    >>> incomparable(runs, "test")
    ('accounting differs: params (a); bytes (b)',)
    """
    pairs = [(run.label, run.metrics(split)) for run in runs]
    known = [(label, *pair) for label, pair in pairs if pair is not None]
    missing = [label for label, pair in pairs if pair is None]
    reasons = [f"not measured on {split}: {', '.join(missing)}"] if missing else []
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
        # With the digits that show a difference just above the tolerance.
        perplexities = [(label, f"{dense.perplexity:.5g}") for label, dense, _ in known]
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
    """List the labels of runs."""
    return ", ".join(run.label for run in runs)


def _relative(nll: Interval) -> Interval | None:
    """Convert a difference of nll into the relative change of the perplexity; None where it overflows a float."""
    try:
        return Interval(*(math.expm1(end) for end in (nll.value, nll.low, nll.high)))
    except OverflowError:
        return None


def _shapes(summary: Summary) -> frozenset[tuple[str, int, int]]:
    """Return names and shapes of the layers of a run."""
    return frozenset((layer.name, layer.d_out, layer.d_in) for layer in summary.layers)


def _paired(mine: Sequence[float], other: Sequence[float], q: float) -> Interval:
    """Compute the interval of the mean of differences, with the quantile `q`."""
    differences = np.array(mine) - np.array(other)
    mean = float(differences.mean())
    half = q * float(differences.std(ddof=1)) / math.sqrt(len(differences))
    return Interval(mean, mean - half, mean + half)


def _independent(
    mine: float | None, stderr: float | None, other: float | None, other_stderr: float | None, q: float
) -> Interval | None:
    """Compute the interval of the difference of independent means; None where one of them is not known."""
    if mine is None or stderr is None or other is None or other_stderr is None:
        return None
    half = q * math.hypot(stderr, other_stderr)
    return Interval(mine - other, mine - other - half, mine - other + half)
