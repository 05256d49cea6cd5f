"""Format numbers as text, with as many digits as a reader can use."""

from __future__ import annotations

import math
from collections.abc import Sequence

from globalopt.machine.memory import size_text

EXACT = 1e-9  # a relative gap below this is rounding in a sum of float64
DIGITS = 3
"""Significant digits of what is computed or measured: more are below the noise, and harder to read."""


def count(n: int) -> str:
    """Format a count with all digits, in groups of three.

    >>> count(12582912)
    '12,582,912'
    """
    return f"{n:,}"


def compact(n: int) -> str:
    """Format a count with three significant digits and a decimal prefix.

    >>> [compact(n) for n in (940, 147456, 12582912)]
    ['940', '147k', '12.6M']
    """
    for power, prefix in ((9, "G"), (6, "M"), (3, "k")):
        # Half a unit of the last digit below the prefix rounds up into it.
        if n >= 10**power * (1 - 5e-4):
            return f"{n / 10**power:#.3g}".rstrip(".") + prefix
    return str(n)


def prefixed(n: float) -> str:
    """Format a number with two or three significant digits and a decimal prefix, for cells and ticks.

    >>> [prefixed(n) for n in (0.5, 940, 8300, 147456)]
    ['0.5', '940', '8.3k', '147k']
    """
    for power, prefix in ((9, "G"), (6, "M"), (3, "k")):
        if n >= 10**power * (1 - 5e-4):
            part = n / 10**power
            return f"{part:.1f}{prefix}" if part < 9.95 else f"{part:.0f}{prefix}"
    return f"{n:g}"


def percent(part: int, whole: int) -> str:
    """Format a share in percent, rounded down to 0.01, so that 100.00 % means all of it.

    >>> percent(99_999, 100_000)
    '99.99 %'
    """
    return f"{part * 10_000 // whole / 100:.2f} %"


def share(fraction: float) -> str:
    """Format a fraction in percent with two significant digits.

    >>> [share(x) for x in (0.12, 0.0042, 1e-9, 0.0)]
    ['12 %', '0.42 %', 'under 0.001 %', '0 %']
    """
    if 0 < fraction < 1e-5:
        return "under 0.001 %"
    return f"{100 * fraction:.{decimals(100 * fraction, 2)}f} %" if fraction else "0 %"


def between(low: float, high: float) -> str:
    """Format a range of ratios, or one number where both ends are formatted alike.

    >>> between(1.9, 2.3), between(1.9, 1.901)
    ('1.9 to 2.3', '1.9')
    """
    ends = f"{low:.2g}", f"{high:.2g}"
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def change(before: float, after: float) -> str:
    """Format a relative change in percent, with its sign.

    >>> change(60.0, 63.0), change(60.0, 840.0)
    ('+5.0 %', '+1300 %')
    """
    percent = 100 * (after / before - 1)
    return f"{percent:+.{1 if abs(percent) < 99.95 else 0}f} %"


def duration(seconds: float) -> str:
    """Format a duration in its two largest units.

    >>> [duration(seconds) for seconds in (0.42, 12.3, 125, 3840)]
    ['0.42 s', '12.3 s', '2 min 05 s', '1 h 04 min']
    """
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
    """Format a duration as a clock does.

    >>> [clock(seconds) for seconds in (7, 750, 3849)]
    ['0:07', '12:30', '1:04:09']
    """
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def memory(size: int) -> str:
    """Format bytes in powers of 1024; "-" for 0, which stands for not measured.

    >>> memory(912 * 2**20), memory(3 * 2**30), memory(0)
    ('912 MiB', '3 GiB', '-')
    """
    return size_text(size) if size > 0 else "-"


def significant(value: float) -> str:
    """Format a number with three significant digits, with an exponent only outside 1e-4 to 1e6.

    >>> significant(0.0123456), significant(1.5e-7)
    ('0.0123', '1.50e-07')
    """
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        return scientific(value)
    return f"{value:.{decimals(value, DIGITS)}f}" if value else "0"


def scientific(value: float) -> str:
    """Format a number with three significant digits and an exponent, for columns over many orders of magnitude.

    >>> scientific(0.00123), scientific(0.0)
    ('1.23e-03', '0')
    """
    return f"{value:.2e}" if value else "0"


def aligned(values: Sequence[float]) -> list[str]:
    """Format a column with one number of decimals, which shows four significant digits of its largest value.

    The largest is a sum of the others, which then have about three.

    An exact zero is "0", so that it differs from values that round to zero. A column whose largest value is outside
    1e-4 to 1e6 is written with exponents.

    >>> aligned([1.5, 0.25, 0.0])
    ['1.500', '0.250', '0']
    """
    largest = max((abs(v) for v in values), default=0.0)
    if largest and not 1e-4 <= largest < 1e6:
        return [scientific(v) for v in values]
    digits = decimals(largest, DIGITS + 1) if largest else 0
    return [f"{v:.{digits}f}" if v else "0" for v in values]


def measured(value: float, stderr: float | None, sign: str = "±") -> str:
    """Format a value with its standard error: three significant digits of the value, or more where the error is small.

    Both have as many decimals as show the first significant digit of the error, and at most as many as show its second.

    >>> measured(67.9012, 0.8812), measured(67.9012, 0.0088)
    ('67.9 ±0.9', '67.901 ±0.009')
    """
    # An error far below what is shown is that of a loss of zero.
    if stderr is None or not math.isfinite(value) or not math.isfinite(stderr) or stderr <= 1e-30:
        return significant(value) if math.isfinite(value) else str(value)
    least = max(decimals(value, DIGITS) if value else 0, decimals(stderr, 1))
    digits = min(decimals(stderr, 2), least)
    if digits > 6:
        return f"{value:.2e} {sign}{stderr:.0e}"
    return f"{value:.{digits}f} {sign}{stderr:.{digits}f}"


def certificate(predicted: float, bound: float | None) -> str:
    """Say how far the predicted loss of an allocation can be above the least possible one.

    The optimum lies in [bound, predicted], so `predicted <= (1 + x) optimum` with `x = predicted / bound - 1`. The
    percentage is rounded up, so that the sentence stays true.

    >>> certificate(1.25, 1.0)
    'within 25 % of the optimum of the surrogate (bound 1.00)'
    """
    if bound is None:
        return "no certificate"
    if predicted - bound <= EXACT * predicted:
        return "the optimum of the surrogate, proved"
    if bound <= 0:
        return "no certificate (the proved bound is 0)"
    return f"within {at_most(predicted / bound - 1)} of the optimum of the surrogate (bound {significant(bound)})"


def at_most(fraction: float) -> str:
    """Format a fraction in percent with two significant digits, rounded up.

    >>> at_most(0.125), at_most(0.00411)
    ('13 %', '0.42 %')
    """
    percent = 100 * fraction
    if percent <= 100 * EXACT:
        return "0 %"
    digits = decimals(percent, 2)
    return f"{math.ceil(percent * 10**digits - EXACT) / 10**digits:.{digits}f} %"


def decimals(value: float, digits: int) -> int:
    """Count the decimals that show `digits` significant digits of `value` (nonzero), at least 0.

    >>> decimals(0.0123, 2), decimals(1234.5, 2)
    (3, 0)
    """
    return max(0, digits - 1 - math.floor(math.log10(abs(value))))
