"""Numbers as text: how many digits a reader can use, and no more."""

from __future__ import annotations

import math
from collections.abc import Sequence

EXACT = 1e-9  # a relative gap below this is rounding in a sum of float64


def count(n: int) -> str:
    """Every digit, in groups of three: 12,582,912."""
    return f"{n:,}"


def compact(n: int) -> str:
    """Four significant digits with a decimal prefix: 940, 147.5k, 12.58M, 8.030G."""
    for power, prefix in ((9, "G"), (6, "M"), (3, "k")):
        # Half a unit of the last digit below the prefix rounds up into it.
        if n >= 10**power * (1 - 5e-5):
            return f"{n / 10**power:#.4g}".rstrip(".") + prefix
    return str(n)


def prefixed(n: float) -> str:
    """Two or three significant digits with a decimal prefix, for cells and ticks: 7, 0.5, 940, 8.3k, 147k, 12M."""
    for power, prefix in ((9, "G"), (6, "M"), (3, "k")):
        if n >= 10**power * (1 - 5e-4):
            part = n / 10**power
            return f"{part:.1f}{prefix}" if part < 9.95 else f"{part:.0f}{prefix}"
    return f"{n:g}"


def percent(part: int, whole: int) -> str:
    """Share in percent, rounded down to 0.01, so that 100.00 % is reached only by all of it."""
    return f"{part * 10_000 // whole / 100:.2f} %"


def share(fraction: float) -> str:
    """A fraction in percent to two significant digits: 12 %, 0.42 %, under 0.001 %, 0 %."""
    if 0 < fraction < 1e-5:
        return "under 0.001 %"
    return f"{100 * fraction:.{decimals(100 * fraction, 2)}f} %" if fraction else "0 %"


def between(low: float, high: float) -> str:
    """A range of ratios, or one figure where both ends look alike: 1.9 to 2.3."""
    ends = f"{low:.2g}", f"{high:.2g}"
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def change(before: float, after: float) -> str:
    """Relative change in percent, with its sign."""
    return f"{100 * (after / before - 1):+.1f} %"


def duration(seconds: float) -> str:
    """0.42 s, 12.3 s, 2 min 05 s, 1 h 04 min."""
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def clock(seconds: float) -> str:
    """0:07, 12:30, 1:04:09."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def memory(size: int) -> str:
    """Bytes as MiB or GiB; "-" where nothing was measured."""
    if size <= 0:
        return "-"
    return f"{size / 2**20:.0f} MiB" if size < 2**30 else f"{size / 2**30:.2f} GiB"


def significant(value: float) -> str:
    """Four significant digits; never an exponent between 1e-4 and 1e6."""
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.3e}"
    return f"{value:.{decimals(value, 4)}f}" if value else "0"


def scientific(value: float) -> str:
    """Three significant digits with an exponent, for columns over many orders of magnitude; an exact zero is "0"."""
    return f"{value:.2e}" if value else "0"


def aligned(values: Sequence[float]) -> list[str]:
    """One column with one number of decimals: four significant digits for its largest value.

    An exact zero is "0", so that it differs from what only rounds to zero. A column whose largest value is outside
    1e-4 to 1e6 is written with exponents.
    """
    largest = max((abs(v) for v in values), default=0.0)
    if largest and not 1e-4 <= largest < 1e6:
        return [scientific(v) for v in values]
    digits = decimals(largest, 4) if largest else 0
    return [f"{v:.{digits}f}" if v else "0" for v in values]


def measured(value: float, stderr: float | None, sign: str = "±") -> str:
    """A value with its standard error, both to the error's second significant digit: 67.90 ±0.88."""
    if stderr is None or not math.isfinite(value) or not math.isfinite(stderr) or stderr <= 0:
        return significant(value) if math.isfinite(value) else str(value)
    digits = decimals(stderr, 2)
    if digits > 7:
        return f"{value:.2e} {sign}{stderr:.0e}"
    return f"{value:.{digits}f} {sign}{stderr:.{digits}f}"


def certificate(predicted: float, bound: float | None) -> str:
    """How far an allocation can be from the best one on its surrogate.

    The optimum lies in [bound, predicted], so `predicted <= (1 + x) optimum` with `x = predicted / bound - 1`. The
    percentage is rounded up: the sentence must stay true.
    """
    if bound is None:
        return "no certificate"
    if predicted - bound <= EXACT * predicted:
        return "the optimum of the surrogate, proved"
    if bound <= 0:
        return "no certificate (the proved bound is 0)"
    return f"within {at_most(predicted / bound - 1)} of the optimum of the surrogate (bound {significant(bound)})"


def at_most(fraction: float) -> str:
    """A fraction in percent to two significant digits, rounded up: 12 %, 0.42 %, 0 %."""
    percent = 100 * fraction
    if percent <= 100 * EXACT:
        return "0 %"
    digits = decimals(percent, 2)
    return f"{math.ceil(percent * 10**digits - EXACT) / 10**digits:.{digits}f} %"


def decimals(value: float, digits: int) -> int:
    """Decimals that show `digits` significant digits of `value` (nonzero), at least 0."""
    return max(0, digits - 1 - math.floor(math.log10(abs(value))))
