from __future__ import annotations

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from pydantic import TypeAdapter
from scipy import stats

from globalopt.values.results import Summary
from globalopt.values.search_record import Evaluation
from reports.surrogate import Surrogate, chosen, line, rank_correlation, whole
from tests.reports.factory import make_search, make_searched, make_summary


def evaluations(*pairs: tuple[float, float]) -> list[Evaluation]:
    """Whole evaluations from (predicted, loss)."""
    return [Evaluation(512 * (n + 1), loss, 64, True, predicted) for n, (predicted, loss) in enumerate(pairs)]


def test_the_rank_correlation_by_hand() -> None:
    # Of the ranks 1 to 10, five pairs of neighbours change places: 1 - 6 x 10 / (10 (100 - 1)) = 1 - 2 / 33.
    x, y = np.arange(10.0), np.array([0.2, 0.1, 0.4, 0.3, 6.0, 5.0, 8.0, 7.0, 99.0, 9.0])
    assert rank_correlation(x, y) == pytest.approx(1 - 2 / 33)
    assert rank_correlation(x, -(x**3)) == pytest.approx(-1.0)


@pytest.mark.parametrize("digits", [0, 1, 9])
def test_the_rank_correlation_is_scipys_with_and_without_ties(digits: int) -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=50).round(digits)
    y = (x + random.normal(size=50)).round(digits)
    assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y)[0])


def test_the_line_is_scipys() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=20)
    y = 0.7 * x + random.normal(size=20)
    assert line(x, y) == pytest.approx(stats.linregress(x, y)[:2])


def test_a_power_law_has_its_exponent_as_slope_and_its_factor_in_the_intercept() -> None:
    found = Surrogate.of(evaluations(*((p, 3 * p**0.8) for p in np.geomspace(0.001, 0.1, 10))))
    assert found.count == 10
    assert found.correlation == pytest.approx(1.0)
    assert (found.slope, found.intercept) == (pytest.approx(0.8), pytest.approx(math.log(3)))


def test_too_few_or_unchanging_evaluations_are_not_judged() -> None:
    pair = (0.1, 0.2)
    assert Surrogate.of([]) == Surrogate(0, None, None, None)
    assert Surrogate.of(evaluations(pair, pair, pair, (0.2, 0.3))) == Surrogate(2, None, None, None)
    assert Surrogate.of(evaluations(*((0.1, 0.1 * n) for n in range(1, 11)))) == Surrogate(10, None, None, None)
    assert Surrogate.of(evaluations(*((n, n) for n in range(1, 10)))) == Surrogate(9, None, None, None)


def test_zeros_are_ranked_but_not_fitted() -> None:
    found = Surrogate.of(evaluations(*((0.1 * n, 0.1 * n) for n in range(10))))
    assert found.correlation == pytest.approx(1.0)
    assert found.slope is None


def test_the_chosen_allocation_is_found_among_the_whole_evaluations() -> None:
    search = make_search()
    summary = make_searched(search)
    choice = chosen(summary, search)
    assert choice.loss == min(e.loss for e in search.evaluations if e.whole)
    assert whole(summary, search) == [e for e in search.evaluations if e.whole]
    rounded = replace(search, loss=search.loss * (1 + 1e-13))
    assert chosen(summary, rounded) == choice


def test_a_choice_that_was_asked_for_in_parts_is_one_whole_evaluation_at_the_end() -> None:
    search = make_search(loss=0.001)
    summary = make_searched(search, predicted=0.0009)
    choice = chosen(summary, search)
    assert (choice.tokens, choice.loss, choice.predicted, choice.whole) == (search.tokens, 0.001, 0.0009, True)
    assert whole(summary, search)[-1] == choice
    assert len(whole(summary, search)) == 41


def test_a_summary_from_before_searches_is_read_and_one_with_a_search_comes_back_as_it_was() -> None:
    reader = TypeAdapter(Summary)
    old = asdict(make_summary())
    del old["search"]
    assert reader.validate_python(old).search is None
    summary = make_searched(make_search())
    assert reader.validate_json(reader.dump_json(summary)) == summary
