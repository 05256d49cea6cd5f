"""Every name of a stage that a user can see is on the page of stages."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "stages.md"


def shown(source: str) -> Iterator[str]:
    """Names that a reporter or a display is given; those of doctests are no code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "stage":
            yield from (str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def in_code() -> set[str]:
    return {name for path in (ROOT / "globalopt").rglob("*.py") for name in shown(path.read_text(encoding="utf-8"))}


def rows() -> dict[str, list[str]]:
    """The cells of every stage on the page."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {re.sub("`", "", name): rest for name, *rest in cells}


def test_every_stage_is_on_the_page_with_what_it_does_what_it_costs_and_how_to_leave_it_out() -> None:
    names = in_code()
    assert {"load", "refine", "evaluate"} <= names
    assert not names - set(rows())
    for name, cells in rows().items():
        assert len(cells) == 3, name
        assert all(cells), name
