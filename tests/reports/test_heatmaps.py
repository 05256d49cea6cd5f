from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from rich.console import Console

from globalopt.errors import ArtefactError
from globalopt.values.error_unit import ErrorUnit
from reports import figures, report
from reports.formats import prefixed
from reports.groups import Grid
from reports.heatmaps import allocation_figure, error_figure
from reports.pictures import write_figures
from tests.command import contents
from tests.reports.factory import MISSING, make_layers, make_summary

VALUES = ("kept", "rank", "rank_share", "cost", "density", "relative")


def test_the_panels_hold_the_values() -> None:
    summary = make_summary()
    figure = allocation_figure(summary)
    cells = Grid.of(summary.layers).cells
    kinds = list(dict.fromkeys(layer.kind for layer in summary.layers))
    for axes, name in zip(figure.axes[:6], VALUES, strict=True):
        drawn = axes.images[0].get_array()
        assert isinstance(drawn, np.ma.MaskedArray)
        assert drawn.shape == (8, 7)
        for (block, kind), layer in cells.items():
            assert drawn[block, kinds.index(kind)] == getattr(layer, name)
        assert [tuple(place) for place in np.argwhere(drawn.mask)] == [(MISSING[0], kinds.index(MISSING[1]))]
        assert axes.patch.get_hatch()
        assert [tick.get_text() for tick in axes.get_xticklabels()] == kinds


def test_relative_error_is_on_a_log_scale_where_zero_takes_the_lowest_colour() -> None:
    image = allocation_figure(make_summary()).axes[5].images[0]
    assert isinstance(image.norm, LogNorm)
    assert float(image.norm(0.0)) == 0.0


def test_counts_are_coloured_from_zero_on_and_written_short() -> None:
    axes = allocation_figure(make_summary()).axes[3]
    largest = max(layer.cost for layer in make_layers())
    assert (axes.images[0].norm.vmin, axes.images[0].norm.vmax) == (0, largest)
    assert prefixed(largest) in {text.get_text() for text in axes.texts}


def test_few_blocks_have_their_values_written_and_many_do_not() -> None:
    few, many = allocation_figure(make_summary()), allocation_figure(make_summary(17))
    assert "1.00" in {text.get_text() for text in few.axes[0].texts}
    assert len(few.axes[0].texts) == 55
    assert not many.axes[0].texts


def test_errors_are_points_on_log_axes_beside_their_heatmap() -> None:
    summary = make_summary()
    left, right = error_figure(summary).axes[:2]
    points = [tuple(point) for paths in left.collections[:7] for point in np.asarray(paths.get_offsets())]
    assert sorted(points) == sorted((la.predicted, la.actual) for la in summary.layers if la.actual)
    assert (left.get_xscale(), left.get_yscale()) == ("log", "log")
    assert left.get_xlim() == left.get_ylim()
    assert "nats per token" in left.get_xlabel()
    assert "nats per token" in right.get_title(loc="left")
    assert [text.get_text() for text in left.texts] == ["not drawn: 1 at zero"]
    drawn = right.images[0].get_array()
    assert drawn is not None
    assert drawn[3, 6] == next(la.actual for la in summary.layers if la.status == "fallback")


def test_without_predictions_only_the_heatmap_is_drawn() -> None:
    layers = tuple(replace(layer, predicted=None) for layer in make_layers())
    figure = error_figure(make_summary(layers=layers, error_unit=ErrorUnit.OUTPUT_ERROR))
    assert [len(axes.images) for axes in figure.axes[:1]] == [1]
    assert not any(axes.collections and axes.get_xscale() == "log" for axes in figure.axes[:1])
    assert "output error" in figure.axes[0].get_title(loc="left")


def size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def test_a_deep_model_gives_a_picture_one_can_read(tmp_path: Path) -> None:
    allocation, error = write_figures(make_summary(80), tmp_path)
    for path in (allocation, error):
        width, height = size(path)
        assert 1000 < width < 4000
        # 80 rows in each panel, at least ten pixels high each.
        assert 80 * 10 < height < 4000


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_run_that_kept_everything_can_be_drawn(blocks: int, tmp_path: Path) -> None:
    layers = tuple(
        replace(layer, rank=0, nnz=layer.dense_cost, cost=layer.dense_cost, predicted=0.0, actual=0.0, relative=0.0)
        for layer in make_layers(blocks)
    )
    assert len(write_figures(make_summary(layers=layers), tmp_path)) == 2


def test_the_same_run_gives_the_same_bytes_and_leaves_nothing_else(tmp_path: Path) -> None:
    summary = make_summary(1)
    folder = tmp_path / "new" / "folder"
    write_figures(summary, folder)
    first = contents(folder)
    write_figures(summary, folder)
    assert contents(folder) == first
    names = [f"{name}.{kind}" for name in ("allocation", "error") for kind in ("png", "svg")]
    assert sorted(first) == names


def test_an_svg_is_whole_and_shows_the_title(tmp_path: Path) -> None:
    path = write_figures(make_summary(2), tmp_path)[0].with_suffix(".svg")
    root = ElementTree.parse(path).getroot()
    assert root.tag.endswith("}svg")
    assert root.get("viewBox") is not None
    assert b"reference model" in path.read_bytes()


def test_a_full_disk_keeps_the_old_picture_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "allocation.png").write_bytes(b"old")

    class Full(FigureCanvasAgg):
        def print_png(self, path: Path, **options: object) -> None:
            # Text is measured with a canvas that prints nowhere.
            if not isinstance(path, Path):
                return super().print_png(path, **options)
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(figures, "FigureCanvasAgg", Full)
    with pytest.raises(ArtefactError, match=r"allocation\.png"):
        write_figures(make_summary(2), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["allocation.png"]
    assert (tmp_path / "allocation.png").read_bytes() == b"old"


def test_a_report_prints_and_returns_what_it_wrote(tmp_path: Path) -> None:
    console = Console(file=StringIO(), width=80)
    page, pictures = report(make_summary(2), tmp_path, console)
    assert [path.name for path in pictures] == ["allocation.png", "error.png"]
    assert page == tmp_path / "report.html"
    assert all(path.exists() for path in (page, *pictures))
    assert isinstance(console.file, StringIO)
    text = console.file.getvalue()
    assert "Allocation by kind" in text
