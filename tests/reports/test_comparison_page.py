"""The page and pictures of several runs: every figure is there, and colours mean the same in every row."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from globalopt.errors import ArtefactError
from globalopt.values.metrics import WindowLosses
from globalopt.values.results import Summary
from reports import comparison, report_comparison
from reports.comparison_figure import DRAWN, PANELS, allocations_figure, quality_figure
from reports.comparison_page import comparison_page
from reports.groups import Grid
from reports.html import rendered
from tests.command import contents
from tests.reports.factory import make_layers, make_metrics, make_search, make_searched, make_summary
from tests.reports.test_html import EVIL, Parsed


def runs() -> list[Summary]:
    """One found, one searched that is better, one uniform that is worse."""
    dense = (make_metrics("test", 62.21, None),)
    better = make_searched(make_search(), compressed=(make_metrics("test", 62.3, 0.0011),), dense=dense)
    worse = make_summary(allocator="uniform", compressed=(make_metrics("test", 70.0, 0.0483),), dense=dense)
    found = make_summary(compressed=(make_metrics("test", 62.44, 0.00302),), dense=dense)
    return [found, better, worse]


LABELS = ["found", "searched", "even"]


def parsed(summaries: list[Summary], losses: tuple[tuple[WindowLosses, ...], ...] = ()) -> Parsed:
    return Parsed(rendered(comparison_page(summaries, LABELS[: len(summaries)], losses, [])))


def test_the_figures_of_every_run_are_on_the_page():
    page = parsed(runs())
    rows = {row[0]: row for row in page.rows if len(row) == 12}
    assert rows["found"][1:] == [
        *("test", "62.2 ±0.8", "62.4 ±0.8", "+0.4 %", "0.00302 ±0.00008"),
        *("0.5", "knapsack", "3basil", "0", "0.520", "-"),
    ]
    assert rows["searched"][-1] == "1.93M"
    assert rows["even"][5] == "0.0483 ±0.0012"
    # Read first: the lowest KL and whose it is, and how many are better than the first.
    for said in ("searched, nats per token, test", "1 of 2", "1 worse, 0 undecided", "not paired by windows"):
        assert said in page.text, said
    for summary in runs():
        assert summary.command in page.text


def test_intervals_are_those_of_the_terminal():
    console = Console(file=StringIO(), width=80, color_system=None)
    console.print(comparison(runs(), LABELS))
    assert isinstance(console.file, StringIO)
    terminal = console.file.getvalue()
    rows = {row[0]: row for row in parsed(runs()).rows if len(row) == 9}
    for label in LABELS[1:]:
        _, _, value, low, high, change, _, _, verdict = rows[label]
        assert value in terminal
        assert f"[{low}, {high}]" in terminal
        assert f"{change} %" in terminal
        assert verdict in terminal


def test_what_is_kept_of_a_kind_stands_side_by_side():
    other = make_summary(layers=tuple(la for la in make_layers() if la.kind != "k_proj"))
    rows = {row[0]: row for row in parsed([make_summary(), other]).rows if len(row) == 3}
    layers = [layer for layer in make_layers() if layer.kind == "q_proj"]
    kept = sum(layer.cost for layer in layers) / sum(layer.dense_cost for layer in layers)
    assert rows["q_proj"] == ["q_proj", f"{kept:.3f}", f"{kept:.3f}"]
    assert rows["k_proj"][2] == "-"


def test_runs_that_do_not_compare_are_named_and_have_no_differences():
    first, other, _ = runs()
    other = replace(other, compressed=tuple(replace(m, text_sha256="f" * 64) for m in other.compressed))
    page = parsed([first, other])
    assert "Not comparable: text differs" in page.text
    assert "searched: not compared, text differs" in page.text
    assert not [row for row in page.rows if len(row) == 9]


def test_a_run_that_was_not_evaluated_has_a_row():
    page = parsed([make_summary(), make_summary(dense=(), compressed=())])
    assert [row[1] for row in page.rows if row[0] == "searched" and len(row) == 11] == ["not measured"]


def test_names_are_no_markup(tmp_path):
    written = report_comparison([make_summary(command=EVIL), make_summary(model=EVIL)], [EVIL, "$x_"], (), tmp_path)
    assert EVIL not in written.page.read_text()
    assert EVIL in Parsed(written.page.read_text()).text


def test_the_same_runs_give_the_same_files(tmp_path):
    for name in ("a", "b"):
        written = report_comparison(runs()[:2], LABELS[:2], (), tmp_path / name)
    assert [path.name for path in written.pictures] == ["allocations.png", "quality.png"]
    assert written.page.name == "comparison.html"
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(Parsed(written.page.read_text()).named("img")) == 2


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match="file"):
        report_comparison(runs(), LABELS, (), tmp_path / "file")


def test_points_are_what_was_measured():
    figure = quality_figure(runs(), LABELS)
    left, right = figure.axes
    assert [tick.get_text() for tick in left.get_yticklabels()] == LABELS
    drawn = [np.asarray(axes.lines[0].get_xdata()).tolist() for axes in (left, right)]
    assert drawn == [[0.00302, 0.0011, 0.0483], [62.44, 62.3, 70.0]]
    # The run that lost nothing has no place on a log axis, and is counted.
    perfect = replace(runs()[0], compressed=(make_metrics("test", 62.21, 0.0),))
    left = quality_figure([perfect, *runs()], ["same", *LABELS]).axes[0]
    assert "not drawn: 1 at zero" in [text.get_text() for text in left.texts]


def test_a_colour_means_the_same_in_every_row():
    fuller = make_summary(layers=tuple(replace(layer, cost=layer.dense_cost) for layer in make_layers()))
    summaries = [make_summary(), fuller]
    figure = allocations_figure(summaries, LABELS)
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == 2 * len(PANELS)
    for column, (_, value, _) in enumerate(PANELS):
        norms = [panels[row * len(PANELS) + column].images[0].norm for row in range(2)]
        assert norms[0] is norms[1]
        for row, summary in enumerate(summaries):
            shown = panels[row * len(PANELS) + column].images[0].get_array()
            assert shown is not None
            assert np.ma.filled(shown, np.nan) == pytest.approx(Grid.of(summary.layers).values(value), nan_ok=True)


def test_of_many_runs_the_first_are_drawn_and_it_is_said():
    many = [make_summary(1)] * (DRAWN + 2)
    figure = allocations_figure(many, [str(i) for i in range(len(many))])
    assert [axes.get_title("left").split("\n")[0] for axes in figure.axes[:: len(PANELS)]][:DRAWN] == [*"01234567"]
    assert len([axes for axes in figure.axes if axes.images]) == DRAWN * len(PANELS)
    assert f"{DRAWN} of {DRAWN + 2} runs" in figure.get_suptitle()
