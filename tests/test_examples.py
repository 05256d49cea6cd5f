"""Every example in a docstring runs, and every public function and class has one."""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.shortened import unabridged

ROOT = Path(__file__).parent.parent
FOLDERS = ("globalopt", "allocators", "solvers", "reports")

BY_HELP = ("globalopt.commands", "globalopt.cli", "globalopt.__main__")
"""Described to a user by `--help`, and run by the tests of the command line."""

WITHOUT = ()
"""Modules that have no examples: each with the reason beside it."""

UNABRIDGED = ("globalopt.evaluation.samples", "reports.figures", "reports.html", "reports.pictures")
"""Modules whose examples look at samples of text or at pictures."""


def modules() -> list[str]:
    paths = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths)
    return sorted(name for name in names if not name.startswith(BY_HELP))


def public(module: str) -> Iterator[tuple[str, str]]:
    """Names and docstrings of the public functions and classes of a module."""
    path = ROOT / Path(*module.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            inner = [part for part in ast.walk(node) if isinstance(part, ast.FunctionDef | ast.ClassDef)]
            yield node.name, "\n".join(ast.get_docstring(part) or "" for part in inner)


@pytest.mark.parametrize("name", modules())
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    found = doctest.DocTestFinder(exclude_empty=True).find(module, name)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    with unabridged() if name in UNABRIDGED else contextlib.nullcontext():
        for test in found:
            runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)


@pytest.mark.parametrize(
    "name", [name for name in modules() if name not in WITHOUT and not name.split(".")[-1].startswith("_")]
)
def test_public_names_have_examples(name):
    assert [found for found, text in public(name) if ">>>" not in text] == []
