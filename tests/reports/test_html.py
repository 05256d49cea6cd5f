"""The page of a run: everything of the summary is on it, escaped, in one file that nothing can be added to."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from globalopt.errors import ArtefactError
from globalopt.values.results import Details, Summary
from globalopt.values.samples import Samples
from reports import report_family
from reports.family_page import family_page
from reports.html import Card, Cell, Column, Lines, Page, Picture, Section, Table, rendered, write_page
from reports.run_page import layer_table, run_page
from reports.tables import mean_change
from tests.reports.factory import (
    make_details,
    make_family,
    make_layers,
    make_matching,
    make_samples,
    make_search,
    make_searched,
    make_summary,
)
from tests.reports.test_frontier import without_measurements

EVIL = "<script>alert('x')</script> & so"


class Parsed(HTMLParser):
    """Elements with their attributes, all text, and the text of tables by row."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.said: list[str] = []
        self._inside: list[str] = []
        self.feed(page)
        assert not self._inside, "every element is closed"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "img"):
            self._inside.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._inside.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self._inside):
            self.rows[-1][-1] += data
        if not {"script", "style"} & set(self._inside):
            self.said.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.said).split())


def parsed(summary: Summary, details: Details | None = None, pictures: tuple[Path, ...] = ()) -> Parsed:
    return Parsed(rendered(run_page(summary, details or Details(), pictures)))


@pytest.fixture(scope="module")
def full() -> Parsed:
    summary = make_searched(make_search(), matching=make_matching())
    return parsed(summary, make_details(summary, make_samples()))


def test_sections_are_those_the_run_has_something_for(full):
    anchors = [link["href"] for link in full.named("a")]
    names = ["quality", "budget", "size", "allocation", "search", "matching", "samples", "cost", "reproduce", "notes"]
    assert anchors == [f"#{name}" for name in names]
    assert [section["id"] for section in full.named("section")] == names
    layers = tuple(replace(layer, predicted=None, status="converged") for layer in make_layers(2))
    bare = make_summary(layers=layers, predicted=None, bound=None, compressed=(), dense=(), notes=())
    found = parsed(bare)
    assert [section["id"] for section in found.named("section")] == [*names[:4], "cost", "reproduce"]
    assert "Not measured; `globalopt eval` on the run does it." in found.text
    assert "the budget was not found by a search" in found.text


def test_the_figures_that_are_read_first(full):
    said = full.text
    for figure in (
        "0.00291 ±0.00007",
        "61.0 ±0.8",
        "optimal",
        str(mean_change(make_matching())),
        "2 min 39 s",
        "1.5 GiB at the peak",
    ):
        assert figure in said, figure
    assert "≤ 0.013 %" in parsed(make_summary()).text
    assert "no certificate" in parsed(make_summary(bound=None)).text


def test_every_layer_has_a_row_with_its_values(full):
    rows = {tuple(row[1:3]): row for row in full.rows if len(row) == 16}
    for layer in make_layers():
        row = rows[str(layer.block), layer.kind]
        assert row[3:7] == [f"{layer.d_out} x {layer.d_in}", str(layer.rank), f"{layer.nnz:,}", f"{layer.kept:.3f}"]
        assert row[7] == f"{layer.cost:,}"
        assert row[13] == layer.status
    keys = [cell["data-key"] for cell in full.named("td") if "data-key" in cell]
    assert str(make_layers()[0].nnz) in keys


def test_patterns_have_a_column_where_there_are_any():
    titles = [column.title for column in layer_table(make_summary(2, "2:4")).columns]
    assert "N:M" in titles
    assert all(len(row) == len(titles) for row in layer_table(make_summary(2, "2:4")).rows)


def test_nothing_can_break_out_of_its_place():
    layers = tuple(replace(layer, name=EVIL + layer.name, kind=EVIL + layer.kind) for layer in make_layers(1))
    splits = {EVIL: {"source": EVIL, "sha256": "0" * 64}}
    summary = make_summary(layers=layers, model=EVIL, command=EVIL, notes=(EVIL,), splits=splits, allocator=EVIL)
    page = rendered(run_page(summary, make_details(summary, make_samples()), ()))
    assert page.count("<script") == 1
    assert "alert('x')" not in page
    found = Parsed(page)
    assert EVIL in found.text
    assert {tag for tag, _ in found.elements}.isdisjoint({"b", "iframe", "object", "link", "base", "form"})
    assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)


def test_only_our_own_style_and_script_may_run_and_nothing_may_load(full):
    (policy,) = [m["content"] for m in full.named("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    page = rendered(run_page(make_summary(1), Details(), ()))
    hashes = set()
    for tag in ("style", "script"):
        (inline,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        found = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{found}'" in str(policy)
        hashes.add(found)
    assert len(hashes) == 2
    assert str(policy).startswith("default-src 'none'; img-src data:;")
    assert not re.search(r"(?:src|href|action|url)\s*[=(]\s*[\"']?(?:https?:)?//", page)
    assert not any("style" in attributes for _, attributes in full.elements)


def test_pictures_are_inside_the_page(tmp_path):
    png, svg = tmp_path / "allocation.png", tmp_path / "allocation.svg"
    png.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + (300).to_bytes(4, "big") + (150).to_bytes(4, "big"))
    svg.write_bytes(b"<svg/>")
    small = Picture.read(png, "title")
    assert (small.width, small.height) == (192, 96)
    assert small.uri == f"data:image/svg+xml;base64,{base64.b64encode(b'<svg/>').decode()}"
    svg.write_bytes(b"<svg>" + b" " * 1000 + b"</svg>")
    assert Picture.read(png, "title").uri.startswith("data:image/png;base64,")
    (image,) = parsed(make_summary(1), pictures=(png,)).named("img")
    assert image["src"] == Picture.read(png, "").uri
    assert image["alt"]


def test_samples_show_what_both_wrote_and_where_they_part(full):
    texts = " ".join(full.said)
    assert "6 of 48 tokens before the first that differs" in texts
    assert "the same 48 tokens" in texts
    assert EVIL in texts
    page = rendered(run_page(make_summary(1), Details(samples=make_samples()), ()))
    assert re.findall(r"<mark>(.*?)</mark>", page) == ["is one of the most visited", "was"]
    skipped = Samples("validation", 0, 0, (), "the model does not fit in memory")
    assert "None: the model does not fit in memory." in parsed(make_summary(1), Details(samples=skipped)).text


def test_how_to_make_it_again(full):
    said = full.text
    assert "globalopt search --budget 0.5 --solver 3basil" in said
    assert f"sha256 {'3' * 64}" in said
    assert "2.13.0" in said
    assert "fallback: model.layers.3.mlp.down_proj. The Gram needed more damping" in said


def test_the_mean_of_matching_is_geometric():
    assert mean_change(make_matching(0)) is None
    halved = replace(make_matching(1)[0], before=2.0, after=1.0)
    eighth = replace(halved, after=0.25)
    assert mean_change((halved, eighth)) == "-75.0 %"


def test_a_deep_model_fits_one_page():
    summary = make_summary(80)
    found = parsed(summary, make_details(summary))
    assert sum(len(row) == 16 for row in found.rows) == len(summary.layers) + 1


def test_the_same_page_gives_the_same_bytes_and_a_full_disk_is_ours(tmp_path):
    page = Page("t", "l", [Card("a", "1", "b")], [Section("x", "X", [Lines(["y"])])], "0")
    first = write_page(page, tmp_path / "report.html").read_bytes()
    assert write_page(page, tmp_path / "report.html").read_bytes() == first
    (tmp_path / "file").touch()
    with pytest.raises(ArtefactError, match="Choose a writable"):
        write_page(page, tmp_path / "file" / "report.html")


def test_a_table_sorts_by_keys_and_keeps_its_total_apart():
    table = Table("T", [Column("a", False), Column("b")], [[Cell("x"), Cell("1 k", 1000.0)]], [Cell("all"), Cell("1")])
    found = Parsed(rendered(Page("t", "l", [], [Section("x", "X", [table])], "0")))
    assert [cell.get("data-key") for cell in found.named("td")] == [None, "1000.0", None, None]
    assert [tag for tag, _ in found.elements if tag in ("thead", "tbody", "tfoot")] == ["thead", "tbody", "tfoot"]
    assert len(found.named("button")) == 3


def test_a_family_has_a_page_too(tmp_path):
    family = make_family()
    page, (curve,) = report_family(family, tmp_path, Console(file=StringIO(), width=80))
    assert (page.name, curve.name) == ("report.html", "frontier.png")
    found = Parsed(page.read_text("utf-8"))
    assert [section["id"] for section in found.named("section")] == ["frontier", "cost", "reproduce"]
    rows = [row for row in found.rows if len(row) == 9]
    assert [row[0] for row in rows[1:]] == [f"{point.asked:g}" for point in family.points]
    assert [row[8] for row in rows[1:]] == [point.file for point in family.points]
    assert "measured: nats per token" in found.text
    assert "globalopt search --frontier" in found.text
    priced = Parsed(rendered(family_page(without_measurements(left_out=(0.05, 0.1), pattern="2:4"), curve)))
    assert "measured:" not in priced.text
    assert "left out, as pattern 2:4 does not reach them: 0.05, 0.1" in priced.text
