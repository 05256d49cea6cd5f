"""Curves, convergence and matching: what is drawn is what was measured, and what is missing leaves no picture."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from globalopt.values.layer_results import MatchResult
from globalopt.values.results import Details
from reports.convergence_figure import convergence_figure
from reports.curves_figure import curves_figure
from reports.groups import typical
from reports.matching_figure import AFTER, BEFORE, matching_figure
from reports.pictures import write_figures
from tests.command import contents
from tests.reports.factory import (
    make_curve,
    make_curves,
    make_details,
    make_layers,
    make_matching,
    make_search,
    make_searched,
    make_summary,
)

ALWAYS = ["allocation.png", "error.png"]


def drawn(line) -> list[tuple[float, float]]:
    return [tuple(point) for point in np.asarray(line.get_xydata())]


# ------------------------------------------------------------------------------------------------- which layers


def test_typical_layers_are_the_ends_the_middle_and_the_highest_rank() -> None:
    layers = make_layers()
    chosen = typical(layers)
    kept = sorted(layer.kept for layer in layers)
    assert [layer.kept for layer in chosen[:3]] == [kept[-1], kept[(len(kept) - 1) // 2], kept[0]]
    assert chosen[3].rank == max(layer.rank for layer in layers)
    assert len(set(chosen)) == len(chosen) == 4
    assert len(typical([replace(layer, rank=0) for layer in layers])) == 3
    assert len(typical(layers[:2])) == 2


# ------------------------------------------------------------------------------------------------- curves


def test_curves_are_bold_as_far_as_the_layer_keeps() -> None:
    summary = make_summary()
    curves = {layer.name: make_curves(layer) for layer in summary.layers}
    figure = curves_figure(summary, curves)
    for axes, part, count in zip(figure.axes, ("singular", "saliency"), ("rank", "nnz"), strict=True):
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        lines = iter(axes.lines)
        for layer in typical(summary.layers):
            curve = getattr(curves[layer.name], part)
            positive = [point for point in zip(curve.places, curve.values, strict=True) if point[1] > 0]
            assert drawn(next(lines)) == pytest.approx(np.array(positive))
            bold, kept = drawn(next(lines)), getattr(layer, count)
            assert len(bold) == 0 if kept == 0 else bold[-1][0] == min(kept, positive[-1][0])
            if kept:
                slope = 0.8 if part == "singular" else 0.45
                expected = positive[0][1] / bold[-1][0] ** slope
                assert bold[-1][1] == pytest.approx(expected, rel=0.02)
                assert axes.get_ylim()[0] < bold[-1][1]
    labels = [text.get_text() for text in figure.legends[0].texts]
    assert [label.split(":")[0] for label in labels] == [
        f"block {la.block} {la.kind}, {la.d_out} x {la.d_in}" for la in typical(summary.layers)
    ]


def test_curves_of_zeros_leave_empty_axes() -> None:
    summary = make_summary(1)
    curves = {layer.name: make_curves(layer) for layer in summary.layers}
    nothing = {
        name: replace(found, singular=replace(found.singular, values=(0.0,) * len(found.singular.values)))
        for name, found in curves.items()
    }
    left, right = curves_figure(summary, nothing).axes
    assert not any(drawn(line) for line in left.lines)
    assert any(drawn(line) for line in right.lines)


# ------------------------------------------------------------------------------------------------- convergence


def test_every_trace_is_a_line_relative_to_nothing_kept() -> None:
    summary = make_summary()
    traces = dict(make_details(summary).traces)
    figure = convergence_figure(summary, traces)
    axes = figure.axes[0]
    assert axes.get_yscale() == "log"
    lines = axes.lines
    named = len(typical([layer for layer in summary.layers if layer.name in traces]))
    assert len(lines) == len(traces) + named
    for line, layer in zip(lines, [la for la in summary.layers if la.name in traces], strict=False):
        trace = traces[layer.name]
        assert drawn(line) == pytest.approx(np.array([(step, value / trace[0][1]) for step, value in trace]))
        assert drawn(line)[0] == (0, 1)
    assert [text.get_text() for text in axes.texts] == ["not drawn: 1 without iterations"]


# ------------------------------------------------------------------------------------------------- matching


def test_matching_is_two_dots_per_block() -> None:
    matching = make_matching()
    axes = matching_figure(make_summary(matching=matching)).axes[0]
    blocks = [match for match in matching if match.block is not None]
    ends, before, after = axes.collections
    assert [tuple(p) for p in np.asarray(before.get_offsets())] == [(m.block, m.before) for m in blocks]
    assert [tuple(p) for p in np.asarray(after.get_offsets())] == [(m.block, m.after) for m in blocks]
    assert BEFORE != AFTER
    assert "nats per token" in axes.get_ylabel()
    mean = math.exp(sum(math.log(m.after / m.before) for m in blocks) / len(blocks)) - 1
    assert f"{100 * mean:+.1f} % on average" in axes.get_title(loc="left")
    assert [text.get_text() for text in axes.texts] == ["whole model, kl: 0.00310 to 0.00240"]
    assert len(ends.get_paths()) == len(blocks)  # pyright: ignore[reportArgumentType]


def test_blocks_that_lost_nothing_are_counted() -> None:
    nothing = MatchResult(0, "nats", 0.0, 0.0, 2, 0, 1.0)
    axes = matching_figure(make_summary(matching=(nothing,))).axes[0]
    assert [text.get_text() for text in axes.texts] == ["not drawn: 1 at zero"]


# ------------------------------------------------------------------------------------------------- which pictures


def test_a_run_has_the_pictures_it_has_something_for(tmp_path: Path) -> None:
    model_alone = make_summary(1, matching=make_matching(0))
    assert [path.name for path in write_figures(model_alone, tmp_path / "model")] == ALWAYS
    full = make_searched(make_search(), blocks=1, matching=make_matching(2))
    paths = write_figures(full, tmp_path / "full", make_details(full))
    names = ["allocation", "error", "curves", "search", "convergence", "matching"]
    assert [path.name for path in paths] == [f"{name}.png" for name in names]
    assert sorted(contents(tmp_path / "full")) == sorted(f"{name}.{kind}" for name in names for kind in ("png", "svg"))


def test_details_of_other_layers_draw_nothing(tmp_path: Path) -> None:
    other = Details({"another": make_curves(make_layers(1)[0])}, {"another": ((0, 1.0), (1, 0.5))})
    assert [path.name for path in write_figures(make_summary(1), tmp_path, other)] == ALWAYS


@pytest.mark.parametrize("count", [1, 2, 100])
def test_short_curves_can_be_drawn(count: int) -> None:
    layer = make_layers(1)[0]
    curves = {layer.name: replace(make_curves(layer), singular=make_curve(count, 1.0, 1.0))}
    curves_figure(make_summary(layers=(layer,)), curves).canvas.draw()
