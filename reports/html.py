"""Describe the contents of a report page, and write it as one HTML file that loads nothing else."""

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

FOLDER = "page"  # holds the template, its style sheet and its script


@dataclass(frozen=True)
class Column:
    """Describe a column of a table; numbers are aligned to the right and sorted from the largest on.

    >>> Column("kept").number
    True
    """

    title: str
    number: bool = True


@dataclass(frozen=True)
class Cell:
    """Describe a cell of a table.

    Args:
        text: what is shown.
        key: what the cell is sorted by; None: the text. A missing value has the key "".
        bar: percentage of a bar beside the text.
        alert: whether the text is highlighted.

    >>> Cell("147.5k", key=147456).key
    147456
    """

    text: str
    key: float | str | None = None
    bar: float | None = None
    alert: bool = False


@dataclass(frozen=True)
class Table:
    """Describe a sortable table.

    Args:
        total: a last row that stays below all others.
        notes: footnotes.
        tall: whether the table scrolls by itself.

    >>> Table("Layers", [Column("kind", number=False)], [[Cell("q_proj")]]).kind
    'table'
    """

    kind: ClassVar[str] = "table"
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    total: Sequence[Cell] = ()
    notes: Sequence[str] = ()
    tall: bool = False


@dataclass(frozen=True)
class Facts:
    """Describe a list of labels with their values.

    >>> Facts([("seed", "0")], title="Versions").rows
    [('seed', '0')]
    """

    kind: ClassVar[str] = "facts"
    rows: Sequence[tuple[str, str]]
    title: str = ""
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Picture:
    """Describe an embedded picture, with its size in CSS pixels; the title is its alternative text.

    >>> from reports.figures import save, titled_figure
    >>> Picture.read(save(titled_figure("reference", "quality", 1.0, 2.0), Path("quality.png")), "Quality").width
    192
    """

    kind: ClassVar[str] = "picture"
    title: str
    uri: str
    width: int
    height: int
    notes: Sequence[str] = ()

    @classmethod
    def read(cls, png: Path, title: str, notes: Sequence[str] = ()) -> Picture:
        """Embed the SVG beside `png`, or `png` itself where that is smaller."""
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
    """Describe a block of code that can be copied.

    >>> Code("globalopt search --budget 0.5", "Command").title
    'Command'
    """

    kind: ClassVar[str] = "code"
    text: str
    title: str = ""
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Lines:
    """Describe a list of sentences.

    >>> Lines(["Not measured."]).kind
    'lines'
    """

    kind: ClassVar[str] = "lines"
    lines: Sequence[str]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class SampleText:
    """Describe a prompt with its continuations by two models.

    Args:
        shared: the beginning that both continuations have in common.
        dense, compressed: the rest of each continuation.
        agreed: a sentence that says how many tokens agree.

    >>> SampleText("The tower was", " built in", " 1889", " 1890", "2 of 3 tokens").shared
    ' built in'
    """

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
    """Describe a section: parts under a title, with `name` as the anchor.

    >>> Section("quality", "Quality", [Lines(["Not measured."])]).name
    'quality'
    """

    name: str
    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Card:
    """Describe a card: a headline number at the top of the page, with its standard error if it has one.

    >>> Card("Kept", "0.5000", "of 4.7M parameters").value
    '0.5000'
    """

    label: str
    value: str
    detail: str
    error: str = ""


@dataclass(frozen=True)
class Page:
    """Describe a page; sections without parts are left out.

    Args:
        lede: the line below the title.
        version: of the program that made the results.

    >>> Page("A run", "two layers", [], [], version="0.1.0").title
    'A run'
    """

    title: str
    lede: str
    cards: Sequence[Card]
    sections: Sequence[Section]
    version: str


def write_page(page: Page, path: Path) -> Path:
    """Write a page as one file and return its path; the same page gives the same bytes.

    Raises:
        ArtefactError: it cannot be written.

    >>> write_page(Page("A run", "two layers", [], [], version="0.1.0"), Path("report.html")).stat().st_size > 1000
    True
    """
    write_text(path, rendered(page))
    return path


def rendered(page: Page) -> str:
    """Render a page as HTML.

    Every text is escaped. The content security policy allows the style sheet and the script of the template alone, by
    their hashes, and loads nothing.

    >>> "&lt;script&gt;" in rendered(Page("<script>", "", [], [], version="0.1.0"))
    True
    """
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
    """Compute the hash by which a content security policy names an inline text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
