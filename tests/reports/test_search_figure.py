from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.lines import Line2D

from globalopt.values.error_unit import ErrorUnit
from globalopt.values.results import Summary
from globalopt.values.search_record import Search
from reports.pictures import write_figures
from reports.search_figure import search_figure
from tests.reports.factory import make_search, make_searched, make_summary


def drawn(summary: Summary) -> tuple[Axes, Axes]:
    assert summary.search is not None
    figure = search_figure(summary, summary.search)
    left, right = figure.axes
    return left, right


def dots(axes: Axes, label: str) -> list[tuple[float, float]]:
    found = next(c for c in axes.collections if isinstance(c, PathCollection) and c.get_label() == label)
    return [(float(x), float(y)) for x, y in np.asarray(found.get_offsets())]


def lines(axes: Axes) -> dict[str, Line2D]:
    return {str(line.get_label()): line for line in axes.lines}


def corner(axes: Axes) -> str:
    return " ".join(text.get_text() for text in axes.texts)


def test_whole_evaluations_are_points_on_log_axes_with_the_chosen_one_marked() -> None:
    search = make_search()
    left, _ = drawn(make_searched(search))
    wholes = [e for e in search.evaluations if e.whole]
    assert dots(left, "on the whole text") == [(e.predicted, e.loss) for e in wholes]
    assert dots(left, "chosen") == [(e.predicted, e.loss) for e in wholes if e.loss == search.loss]
    assert (left.get_xscale(), left.get_yscale()) == ("log", "log")
    assert left.get_xlim() == left.get_ylim()
    assert {"equal", "fit, slope 0.99"} == set(lines(left))
    assert "rank correlation 0.91" in left.get_title(loc="left")
    assert "nats per token" in left.get_xlabel()
    assert "nats per token" in left.get_ylabel()


def test_every_evaluation_is_a_dot_over_its_tokens_and_the_best_a_step() -> None:
    search = make_search()
    _, right = drawn(make_searched(search))
    for label, kind in (("on the whole text", True), ("on part of the text", False)):
        assert dots(right, label) == [(e.tokens, e.loss) for e in search.evaluations if e.whole is kind]
    step = lines(right)["least on the whole text"]
    tokens, least = np.asarray(step.get_xdata()), np.asarray(step.get_ydata())
    assert list(least[:-1]) == list(np.minimum.accumulate([e.loss for e in search.evaluations if e.whole]))
    assert (tokens[-1], least[-1]) == (search.tokens, search.loss)
    assert step.get_drawstyle() == "steps-post"
    assert "not drawn" not in corner(right)


def test_another_unit_has_no_diagonal() -> None:
    left, _ = drawn(make_searched(make_search(), budget_unit=ErrorUnit.OUTPUT_ERROR))
    assert "equal" not in lines(left)
    assert "output error" in left.get_xlabel()
    assert "nats per token" in left.get_ylabel()
    assert "measured / predicted" not in corner(left)


def scaled(search: Search, factor: float) -> Search:
    return replace(search, evaluations=tuple(replace(e, predicted=e.predicted * factor) for e in search.evaluations))


def test_a_diagonal_far_from_the_points_gives_way_to_their_ratio() -> None:
    left, _ = drawn(make_searched(scaled(make_search(), 1e-3)))
    assert "equal" not in lines(left)
    assert "measured / predicted: 1.6e+03 to" in corner(left)
    assert left.get_xlim()[1] < left.get_ylim()[0]


def test_one_disaster_among_many_does_not_stretch_the_scale() -> None:
    search = make_search(20, 2000)
    last = search.evaluations[-1]
    assert not last.whole
    evaluations = (*search.evaluations[:-1], replace(last, loss=100.0))
    _, right = drawn(make_searched(replace(search, evaluations=evaluations)))
    assert right.get_ylim()[1] < 0.1
    assert "off the scale" in corner(right)


@pytest.mark.parametrize("wholes", [0, 1, 2, 9])
def test_few_evaluations_are_drawn_without_a_fit(wholes: int) -> None:
    left, right = drawn(make_searched(make_search(wholes, 3)))
    assert not [label for label in lines(left) if label.startswith("fit")]
    assert "correlation" not in left.get_title(loc="left")
    assert f"too few for a correlation or a line: {max(1, wholes)}" in corner(left)
    assert len(dots(left, "chosen")) == len(dots(right, "chosen")) == 1


def test_losses_of_zero_are_counted_instead_of_drawn() -> None:
    left, right = drawn(make_searched(make_search(0, 0, loss=0.0), predicted=0.0))
    assert corner(left).endswith("not drawn: 1 at zero")
    assert corner(right) == "not drawn: 1 at zero"


def test_the_picture_is_written_only_of_a_search(tmp_path: Path) -> None:
    assert [path.name for path in write_figures(make_summary(1), tmp_path)] == ["allocation.png", "error.png"]
    many = make_searched(make_search(400, 6000), blocks=1)
    assert [path.name for path in write_figures(many, tmp_path)][-1] == "search.png"
