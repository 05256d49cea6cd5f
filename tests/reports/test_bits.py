"""Bits in reports: shown where a layer has fewer than 16, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from globalopt.values.results import Details, Summary
from globalopt.values.storage import Storage
from reports import render
from reports.bits import few_bits, mean_bits, stored_facts
from reports.bytes_figure import BytesPoint, bytes_figure, draw_bytes
from reports.comparison_figure import allocations_figure
from reports.comparison_page import comparison_page
from reports.groups import Group
from reports.heatmaps import allocation_figure, bits_per_weight
from reports.html import rendered
from reports.run_page import run_page
from reports.shaded_grid import bits_grid
from reports.size import part_sizes, size_table
from tests.reports.factory import make_summary

STORAGES = ("16", "8", "4/8")


def few() -> Summary:
    return make_summary(storages=STORAGES, accounting="bytes")


def printed(summary: Summary) -> str:
    console = Console(file=StringIO(), width=80, color_system=None)
    render(summary, console, verbose=True)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_the_parts_add_up_to_the_bytes_that_the_run_counted():
    summary = few()
    *parts, whole = part_sizes(summary)
    assert whole.bytes == sum(part.bytes for part in parts) == sum(layer.bytes for layer in summary.layers)
    assert whole.bytes == summary.used
    assert whole.share == pytest.approx(summary.used / summary.total)
    assert whole.per_weight == pytest.approx(16 * whole.share)
    scales = next(part for part in parts if part.label == "scales")
    assert 0 < scales.bytes < whole.bytes / 20


def test_a_plane_of_signs_has_a_row_of_its_own():
    signed, *others = few().layers
    assert signed.storage == "16"
    summary = replace(few(), layers=(replace(signed, signs=True), *others))
    (signs,) = (size for size in part_sizes(summary) if size.label == "planes of signs")
    assert signs.bytes == signed.d_out * signed.d_in // 8


def test_mean_bits_are_weighted_by_the_numbers():
    first, *_ = few().layers
    layer = replace(first, rank=2, nnz=2 * (first.d_out + first.d_in), storage="4/8")
    assert mean_bits([layer]) == 6.0
    dropped = replace(layer, rank=0, nnz=0)
    assert mean_bits([dropped]) is None
    assert Group.pool("all", [dropped]).bits is None
    assert bits_grid([dropped]) is None
    assert mean_bits([layer, dropped]) == 6.0


def test_the_terminal_report_tells_the_bits_and_fits():
    told = printed(few())
    assert "19 layers in 16 bits, 18 in 8, 18 in 4/8 (values/factors)" in " ".join(told.split())
    for title in ("Bits of a stored number, block by kind", "Bytes of the layers, by part", "bits: mean of"):
        assert title in told
    # Names of layers break where there is no room for them.
    assert " down_proj " in told
    assert max(map(len, told.splitlines())) <= 80


def test_nothing_is_said_of_bits_where_all_have_16():
    summary = make_summary()
    told = printed(summary)
    assert not few_bits(summary.layers)
    assert stored_facts(summary.layers) == part_sizes(summary) == []
    assert size_table(summary) is None
    assert bits_grid(summary.layers) is None
    assert "bits of" not in told.lower()
    assert "bits:" not in told
    page = rendered(run_page(summary, Details(), []))
    assert ">bits<" not in page
    assert len([axes for axes in allocation_figure(summary).axes if axes.images]) == 6


def test_the_page_has_bits_and_parts():
    page = rendered(run_page(few(), Details(), []))
    for said in ("Bytes of the layers, by part", "index of S", "factors U, V", "18 in 4/8", ">4/8<", "bits per weight"):
        assert said in page
    both = rendered(comparison_page([few(), make_summary()], ["few", "plain"], [(), ()], []))
    assert "18 in 4/8" in both
    assert "all layers in 16 bits" in both
    plain = rendered(comparison_page([make_summary()] * 2, ["a", "b"], [(), ()], []))
    assert "Stored" not in plain


def test_the_heatmaps_hold_the_bits():
    summary = few()
    panels = [axes for axes in allocation_figure(summary).axes if axes.images]
    assert len(panels) == 9
    values, factors, whole = (np.ma.filled(axes.images[0].get_array(), np.nan) for axes in panels[6:])  # pyright: ignore[reportCallIssue, reportArgumentType]
    kinds = list(dict.fromkeys(layer.kind for layer in summary.layers))
    for layer in summary.layers:
        at = layer.block, kinds.index(layer.kind)
        stored = Storage.parse(layer.storage)
        assert values[at] == stored.values
        assert factors[at] == stored.factors if layer.rank else np.isnan(factors[at])
        assert whole[at] == bits_per_weight(layer) == 8 * layer.bytes / (layer.d_out * layer.d_in)
    # A run beside one in few bits has the column too; without one there is none.
    for runs, most in (([summary, make_summary()], 8), ([make_summary()] * 2, 6)):
        assert len([axes for axes in allocations_figure(runs, ["a", "b"]).axes if axes.images]) == most


def test_the_figure_draws_every_method_and_counts_what_it_cannot_draw(tmp_path):
    points = [BytesPoint("gptq 4", kept, 0.01 / kept, 0.001) for kept in (0.5, 0.25)]
    points += [BytesPoint("search", 0.25, 0.005), BytesPoint("search", 0.5, 0.0), BytesPoint("rtn", 0.2, float("nan"))]
    (axes,) = bytes_figure(points, "made up").axes
    gptq, search = axes.lines
    assert gptq.get_xydata() == pytest.approx(np.array([(0.25, 0.04), (0.5, 0.02)]))
    assert (gptq.get_linestyle(), search.get_linestyle()) == ("--", "-")
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert [text.get_text() for text in axes.texts] == ["not drawn: 1 not above zero, 1 not finite"]
    path = draw_bytes(points, tmp_path / "bytes.png")
    first = path.read_bytes(), path.with_suffix(".svg").read_bytes()
    draw_bytes(points, path)
    assert (path.read_bytes(), path.with_suffix(".svg").read_bytes()) == first
    assert bytes_figure([]).axes[0].get_legend() is None
