"""How well the surrogate foretold a search: predicted against measured losses of whole-text evaluations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from globalopt.values.results import Evaluation, Search, Summary

FEWEST = 3  # distinct evaluations: two lie on a line whatever the surrogate is worth
SAME = 1e-9  # a relative difference below this is rounding


def chosen(summary: Summary, search: Search) -> Evaluation:
    """The chosen allocation on the whole selection text.

    It is the first whole evaluation with its loss and prediction. Where it was asked for only in parts there is none,
    and it is given the tokens of the whole search, at whose end the verdict fell.
    """
    # A search starts from predictions.
    assert summary.predicted is not None
    for evaluation in search.evaluations:
        if evaluation.whole and _same(evaluation.loss, search.loss) and _same(evaluation.predicted, summary.predicted):
            return evaluation
    windows = max((evaluation.windows for evaluation in search.evaluations), default=0)
    return Evaluation(search.tokens, search.loss, windows, True, summary.predicted)


def whole(summary: Summary, search: Search) -> list[Evaluation]:
    """All evaluations on the whole selection text in the order of their tokens, the chosen allocation's among them."""
    found = [evaluation for evaluation in search.evaluations if evaluation.whole]
    choice = chosen(summary, search)
    return found if choice in found else [*found, choice]


@dataclass(frozen=True)
class Surrogate:
    """Agreement of predicted with measured losses.

    Args:
        count: distinct pairs of them.
        correlation: Spearman's, of their ranks; None below `FEWEST` pairs and where one side never changes.
        slope, intercept: of `log measured = slope x log predicted + intercept` by least squares over the pairs above
            zero, natural logarithms; None as above.
    """

    count: int
    correlation: float | None
    slope: float | None
    intercept: float | None

    @classmethod
    def of(cls, evaluations: Sequence[Evaluation]) -> Surrogate:
        """From evaluations on one text."""
        pairs = np.array(sorted({(e.predicted, e.loss) for e in evaluations})).reshape(-1, 2)
        logs = np.log(pairs[(pairs > 0).all(axis=1)])
        slope, intercept = line(logs[:, 0], logs[:, 1]) or (None, None)
        return cls(len(pairs), rank_correlation(pairs[:, 0], pairs[:, 1]), slope, intercept)


def rank_correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> float | None:
    """Spearman's: Pearson's correlation of the ranks of `x` (n,) and `y` (n,), equal values sharing their mean rank.

    None where n < `FEWEST` or one of them is constant.
    """
    if len(x) < FEWEST or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def line(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float] | None:
    """Slope and intercept of the least-squares line `y = slope x + intercept` through `x` (n,) and `y` (n,).

    None where n < `FEWEST` or `x` is constant.
    """
    if len(x) < FEWEST or np.ptp(x) == 0:
        return None
    centred = x - x.mean()
    slope = float(centred @ y / (centred @ centred))
    return slope, float(y.mean() - slope * x.mean())


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) ranks from 1."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=SAME)
