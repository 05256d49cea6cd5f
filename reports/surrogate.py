"""Measure how well predicted losses agree with measured ones, over the evaluations of a search on the whole text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from globalopt.values.results import Summary
from globalopt.values.search_record import Evaluation, Search

FEWEST = 10
"""Least number of distinct evaluations of which a correlation or a fitted line is computed.

Of fewer, chance alone makes either: three random points have a rank correlation of 1 or -1 in a third of all cases.
"""
SAME = 1e-9  # a relative difference below this is rounding


def chosen(summary: Summary, search: Search) -> Evaluation:
    """Find the evaluation of the chosen allocation on the whole selection text.

    It is the first on the whole text with the loss and the predicted loss of the chosen allocation. Where that was
    evaluated on parts only, an evaluation is made with the tokens of the whole search, at whose end it was chosen.

    >>> from reports.example import example_search, example_searched_summary
    >>> search = example_search()
    >>> chosen(example_searched_summary(search), search).loss == search.loss
    True
    """
    # A search starts from predictions.
    assert summary.predicted is not None
    for evaluation in search.evaluations:
        if evaluation.whole and _same(evaluation.loss, search.loss) and _same(evaluation.predicted, summary.predicted):
            return evaluation
    windows = max((evaluation.windows for evaluation in search.evaluations), default=0)
    return Evaluation(search.tokens, search.loss, windows, True, summary.predicted)


def whole(summary: Summary, search: Search) -> list[Evaluation]:
    """List the evaluations on the whole selection text in their order, with that of the chosen allocation.

    >>> from reports.example import example_search, example_searched_summary
    >>> search = example_search(wholes=10, parts=20)
    >>> len(whole(example_searched_summary(search), search))
    10
    """
    found = [evaluation for evaluation in search.evaluations if evaluation.whole]
    choice = chosen(summary, search)
    return found if choice in found else [*found, choice]


@dataclass(frozen=True)
class Surrogate:
    """Measure the agreement of predicted with measured losses.

    Args:
        count: distinct pairs of them.
        correlation: Spearman's rank correlation; None below `FEWEST` pairs, or where one side is constant.
        slope, intercept: of `log measured = slope x log predicted + intercept` by least squares over the pairs above
            zero, with natural logarithms; None as above.

    >>> losses = [(0.1 * n, 0.01 * n**2) for n in range(1, 11)]
    >>> found = Surrogate.of([Evaluation(0, loss, 64, True, predicted) for predicted, loss in losses])
    >>> found.count, round(found.correlation, 6), round(found.slope, 6)
    (10, 1.0, 2.0)
    """

    count: int
    correlation: float | None
    slope: float | None
    intercept: float | None

    @classmethod
    def of(cls, evaluations: Sequence[Evaluation]) -> Surrogate:
        """Compute it from evaluations on one text."""
        pairs = np.array(sorted({(e.predicted, e.loss) for e in evaluations})).reshape(-1, 2)
        logs = np.log(pairs[(pairs > 0).all(axis=1)])
        slope, intercept = line(logs[:, 0], logs[:, 1]) or (None, None)
        return cls(len(pairs), rank_correlation(pairs[:, 0], pairs[:, 1]), slope, intercept)


def rank_correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> float | None:
    """Compute Spearman's rank correlation of `x` (n,) and `y` (n,); equal values share their mean rank.

    None where n < `FEWEST` or one of them is constant.

    >>> round(rank_correlation(np.arange(10.0), np.arange(10.0) ** 2), 6)
    1.0
    """
    if len(x) < FEWEST or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def line(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float] | None:
    """Fit `y = slope x + intercept` to `x` (n,) and `y` (n,) by least squares: slope and intercept.

    None where n < `FEWEST` or `x` is constant.

    >>> line(np.arange(10.0), 1.0 + 2.0 * np.arange(10.0))
    (2.0, 1.0)
    """
    if len(x) < FEWEST or np.ptp(x) == 0:
        return None
    centred = x - x.mean()
    slope = float(centred @ y / (centred @ centred))
    return slope, float(y.mean() - slope * x.mean())


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the ranks (n,) from 1; equal values share their mean rank."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


def _same(a: float, b: float) -> bool:
    """Tell whether two losses are equal up to rounding."""
    return math.isclose(a, b, rel_tol=SAME)
