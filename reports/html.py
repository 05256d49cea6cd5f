"""A report as one HTML file that needs nothing else: what is on a page, and how it is written."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from globalopt.runs.files import write_text

FOLDER = "page"  # of the template, its style and its script


@dataclass(frozen=True)
class Column:
    """A column of a table; those of numbers are aligned to the right and sorted from the largest on."""

    title: str
    number: bool = True


@dataclass(frozen=True)
class Cell:
    """What is read in a cell, what it is sorted by if that is not the text, and a bar of so many percent beside it.

    A missing value has the key "".
    """

    text: str
    key: float | str | None = None
    bar: float | None = None
    alert: bool = False


@dataclass(frozen=True)
class Table:
    """A sortable table; `total` stays below, and a `tall` one scrolls by itself."""

    kind: ClassVar[str] = "table"
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    total: Sequence[Cell] = ()
    notes: Sequence[str] = ()
    tall: bool = False


@dataclass(frozen=True)
class Facts:
    """Labels and what they say."""

    kind: ClassVar[str] = "facts"
    rows: Sequence[tuple[str, str]]
    title: str = ""
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Picture:
    """An embedded picture, with its size in CSS pixels; the title stands in for it."""

    kind: ClassVar[str] = "picture"
    title: str
    uri: str
    width: int
    height: int
    notes: Sequence[str] = ()

    @classmethod
    def read(cls, png: Path, title: str, notes: Sequence[str] = ()) -> Picture:
        """The SVG that lies beside `png`, or `png` itself where that is smaller."""
        data = png.read_bytes()
        # A PNG's size is in its header, at the 150 dots per inch that pictures are drawn with.
        width, height = (round(int.from_bytes(data[at : at + 4], "big") * 96 / 150) for at in (16, 20))
        kind, svg = "png", png.with_suffix(".svg").read_bytes()
        if len(svg) <= len(data):
            kind, data = "svg+xml", svg
        uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        return cls(title, uri, width, height, notes)


@dataclass(frozen=True)
class Code:
    """Text to be copied."""

    kind: ClassVar[str] = "code"
    text: str
    title: str = ""
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Lines:
    """A list of sentences."""

    kind: ClassVar[str] = "lines"
    lines: Sequence[str]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class SampleText:
    """A prompt, what two models both wrote after it, and what each wrote then; `agreed` says how much that was."""

    kind: ClassVar[str] = "sample"
    prompt: str
    shared: str
    dense: str
    compressed: str
    agreed: str
    notes: Sequence[str] = ()


Part = Table | Facts | Picture | Code | Lines | SampleText


@dataclass(frozen=True)
class Section:
    """Parts under a title; `name` is the anchor."""

    name: str
    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Card:
    """A figure that is read first, with its standard error if it has one."""

    label: str
    value: str
    detail: str
    error: str = ""


@dataclass(frozen=True)
class Page:
    """Everything on a page; sections without parts are left out."""

    title: str
    lede: str
    cards: Sequence[Card]
    sections: Sequence[Section]
    version: str


def write_page(page: Page, path: Path) -> Path:
    """Write a page as one file and return its path; the same page gives the same bytes.

    Raises:
        ArtefactError: it cannot be written.
    """
    write_text(path, rendered(page))
    return path


def rendered(page: Page) -> str:
    """The page as HTML. Every text is escaped; style and script are ours, and nothing else may run or load."""
    style, script = (resources.files("reports").joinpath(FOLDER, f"report.{kind}").read_text("utf-8") for kind in _OURS)
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    sections = [section for section in page.sections if section.parts]
    environment = Environment(
        loader=PackageLoader("reports", FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = Page(page.title, page.lede, page.cards, sections, page.version)
    texts = {"page": shown, "style": Markup(style), "script": Markup(script), "policy": policy}
    return environment.get_template("report.html.jinja").render(texts).lstrip() + "\n"


_OURS = ("css", "js")


def _hash(text: str) -> str:
    """What a policy calls an inline text by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
