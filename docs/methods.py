"""Write the method pages, `docs/methods/*.md`, from the docstrings and fields of the solvers and allocators.

    python docs/methods.py

A method is explained once, where it is written; a test fails where a page is not what this script makes.
"""

from __future__ import annotations

import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

from allocators import ALLOCATORS
from globalopt import kernels
from globalopt.commands.explanations import meanings
from solvers import SOLVERS

FOLDER = Path(__file__).parent / "methods"

HEADS = {
    "solvers": """# Solvers

What fits `S + L` to one layer. `W` is `(d_out, d_in)`, `G` the second moment of the layer's inputs, `A` that of the
gradients at its output; `E = W - S - L`. Pick one with `--solver NAME`, set its options with `--set OPTION=VALUE`.
""",
    "allocators": """# Allocators

What divides the budget over the layers. Pick one with `--allocator NAME`, set its options with
`--allocator-set OPTION=VALUE`. A *surface* is the predicted loss of a layer at every `(rank, nonzeros)` on offer.
""",
}


def pages() -> dict[str, str]:
    """The text of every page, by its file name."""
    tables: dict[str, Mapping[str, type[Any]]] = {"solvers": SOLVERS, "allocators": ALLOCATORS}
    return {f"{name}.md": page(HEADS[name], name, table) for name, table in tables.items()}


def page(head: str, folder: str, table: Mapping[str, type[Any]]) -> str:
    """A page with a section per method, and one per kernel that these speak of."""
    contents = " · ".join(f"[{name}](#{name})" for name in table)
    sections = "\n".join("\n".join(section(folder, name, method)) for name, method in table.items())
    made = "<!-- Made by docs/methods.py from the docstrings; change those. -->"
    text = f"{made}\n\n{head}\n{contents}\n\n{sections}"
    options = {field.name for method in table.values() for field in fields(method)}
    spoken_of = {name: kernel for name, kernel in _kernels().items() if f"`{name}`" in text and name not in options}
    if spoken_of:
        text += "\n# Kernels\n\n" + "\n".join(kernel_section(name, kernel) for name, kernel in spoken_of.items())
    for name in spoken_of:
        text = text.replace(f"`{name}`", f"[`{name}`](#{name})")
    return text


def kernel_section(name: str, kernel: Callable[..., Any]) -> str:
    """What a kernel computes."""
    text = re.split(r"\n(?:Args|Returns|Raises):\n", _explanation(inspect.cleandoc(kernel.__doc__ or "")))[0]
    source = kernel.__module__.replace(".", "/") + ".py"
    return f"## {name}\n\n[`{source}`](../../{source})\n\n{_markdown(text.strip())}\n"


def _kernels() -> dict[str, Callable[..., Any]]:
    """Every public function of `globalopt.kernels`, by name."""
    modules = [import_module(f"{kernels.__name__}.{found.name}") for found in pkgutil.iter_modules(kernels.__path__)]
    return {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }


def section(folder: str, name: str, method: type[Any]) -> Iterator[str]:
    """What a method does, where it is from, and its options with their defaults."""
    text = _explanation(inspect.cleandoc(method.__doc__ or "")).partition("\nArgs:\n")[0]
    explained = meanings(method)
    source = Path(inspect.getfile(method)).name
    yield f"## {name}\n"
    yield f"{_linked(method.paper)}[`{folder}/{source}`](../../{folder}/{source})\n"
    yield _markdown(text.strip()) + "\n"
    if fields(method):
        yield "| option | default | |\n|---|---|---|"
        for field in fields(method):
            default = f"`{field.default}`" if field.default != "" else ""
            yield f"| `{field.name}` | {default} | {explained.get(field.name, '')} |"
        yield ""


def _explanation(docstring: str) -> str:
    """Leave out the examples of a docstring: paragraphs that begin with the prompt of the interpreter."""
    return "\n\n".join(part for part in docstring.split("\n\n") if not part.lstrip().startswith(">>>"))


def _linked(paper: str) -> str:
    kind, _, number = paper.partition(":")
    known = {"arXiv": "https://arxiv.org/abs/", "doi": "https://doi.org/"}
    return f"[{paper}]({known[kind]}{number}) · " if kind in known else ""


def _markdown(text: str) -> str:
    """Paragraphs as they are; indented formulas as code."""
    blocks = re.split(r"\n\s*\n", text)
    return "\n\n".join(f"```\n{inspect.cleandoc(block)}\n```" if block.startswith("  ") else block for block in blocks)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
