"""Draw the table of allocators on the page of results as the picture of that page.

python benchmarks/table_figure.py
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from allocators_figure import Point, allocators_figure

from reports.figures import save

DOCS = Path(__file__).parent.parent / "docs"
HEADING = "### The bundled model"
BUDGETS = (0.5, 0.3, 0.2)
"""Of the last columns."""

CELL = re.compile(r"\**([\d.]+)\** \(([\d.]+)")
"""KL, and its ratio to the best uniform contender."""

TITLE = "validation, refined by 3basil: the means of the table"
TOKENS = "after each name: forward tokens of its search"


def points(page: str) -> list[Point]:
    """Read the contenders of the first table below `HEADING`."""
    table = page[page.index(HEADING) :].split("\n|", 1)[1].split("\n\n", 1)[0]
    found = []
    family = ""
    for line in table.splitlines()[2:]:
        name, tokens, *kl = (cell.strip() for cell in line.strip("|").split("|"))
        name = re.sub(r"`| \(.*\)", "", name)
        # "knapsack, one rank share for all: 0", of which the rows below have only the last number.
        name = f"{family}{name}" if re.fullmatch(r"[\d.]+", name) else name
        family = name[: name.rindex(":") + 2] if ": " in name else ""
        read = float(tokens.removesuffix("M")) * 1e6 if tokens.endswith("M") else 0.0
        for budget, cell in zip(BUDGETS, kl, strict=True):
            if figures := CELL.match(cell):
                found.append(Point(budget, name, read, (float(figures[1]),), (), float(figures[2])))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the picture; `arguments` may name another file for it."""
    (place,) = (sys.argv[1:] if arguments is None else arguments) or [str(DOCS / "pictures" / "allocators.png")]
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    figure = allocators_figure(points(page), "reference", TITLE, TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        # The page shows the PNG alone.
        shutil.copy(save(figure, Path(folder) / "allocators.png"), place)


if __name__ == "__main__":
    main()
