"""Modules import only what lies below them: a room, a folder or a single module, imports rooms of lower floors alone.

The floors are the list below, from the ground up. Rooms of one floor never import each other.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("globalopt", "allocators", "solvers", "reports")
FLOORS = (
    {"errors"},
    {"values", "registry", "reference"},
    {"protocols", "kernels", "machine", "runs"},
    {"text", "models", "budgets", "solvers", "allocators", "rounding"},
    {"embeddings"},
    {"objective", "matching", "evaluation", "export", "reports"},
    {"analysis", "refine"},
    {"pipeline"},
    {"commands", "api"},
    {"globalopt", "cli", "__main__"},
)
TORCH_ALONE = {"errors", "values", "protocols"}
"""Rooms that import torch, and numpy, and nothing else of other people's packages."""

Sources = dict[str, str]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def our_sources() -> Sources:
    return {module_name(path): path.read_text() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}


def room(module: str) -> str:
    first, *rest = module.split(".")
    return rest[0] if first == "globalopt" and rest else first


def floor(module: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room(module) in rooms)


def imported(module: str, source: str, modules: Sources, is_package: bool) -> Iterator[str]:
    """Modules that `source` imports, wherever in it; `from a import b` is `a.b` where that is a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, *([base] if base else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield name if name in modules else base


def violations(modules: Sources) -> list[str]:
    packages = {name.rpartition(".")[0] for name in modules} | set(FOLDERS)
    found = []
    for module, source in sorted(modules.items()):
        for other in imported(module, source, modules, module in packages):
            if other.split(".")[0] not in FOLDERS:
                outside = other.split(".")[0]
                if room(module) in TORCH_ALONE and outside not in ("torch", "numpy", *sys.stdlib_module_names):
                    found.append(
                        f"{module} imports {other}; of other people's packages it may import torch and numpy alone"
                    )
            elif room(module) != room(other) and floor(other) >= floor(module) and floor(module) < len(FLOORS) - 1:
                found.append(f"{module} (floor {floor(module)}) imports {other} (floor {floor(other)})")
    return found


def circles(modules: Sources) -> list[list[str]]:
    """Modules that import each other in a circle, by Tarjan's strongly connected components; wherever they import."""
    packages = {name.rpartition(".")[0] for name in modules} | set(FOLDERS)
    below = {
        module: [other for other in imported(module, source, modules, module in packages) if other in modules]
        for module, source in modules.items()
    }
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        number[module] = low[module] = len(number)
        stack.append(module)
        for other in below[module]:
            if other not in number:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], number[other])
        if low[module] == number[module]:
            at = stack.index(module)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for module in modules:
        if module not in number:
            visit(module)
    return found


def test_no_module_imports_what_lies_above_it():
    assert violations(our_sources()) == []


def test_no_modules_import_each_other_in_a_circle():
    assert circles(our_sources()) == []


def test_circles_are_seen():
    sources = {"solvers.a": "import solvers.b", "solvers.b": "def f():\n    from solvers.c import x", "solvers.d": ""}
    assert circles({**sources, "solvers.c": "import solvers.d"}) == []
    assert circles({**sources, "solvers.c": "import solvers.a"}) == [["solvers.a", "solvers.b", "solvers.c"]]


def test_every_room_has_a_floor():
    rooms = [room(module) for module in our_sources()]
    assert set(rooms) == set().union(*FLOORS)
    assert sum(len(rooms) for rooms in FLOORS) == len(set().union(*FLOORS))


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("globalopt.values.layer", "import scipy", "globalopt.values.layer imports scipy"),
        ("globalopt.values.layer", "import torch, numpy, bisect", None),
        ("globalopt.errors", "from globalopt.kernels import svd", "imports globalopt.kernels.svd (floor 2)"),
        ("globalopt.kernels.svd", "from ..models import walk", "imports globalopt.models.walk (floor 3)"),
        ("globalopt.kernels.svd", "def f():\n    import solvers.oats", "imports solvers.oats (floor 3)"),
        ("globalopt.kernels.svd", "from globalopt.values.layer import NM\nimport scipy", None),
        ("globalopt.kernels.svd", "from globalopt.runs import files", "imports globalopt.runs.files (floor 2)"),
        (
            "globalopt.models.walk",
            "from globalopt.pipeline import search",
            "imports globalopt.pipeline.search (floor 7)",
        ),
        ("globalopt.models.walk", "import globalopt", "imports globalopt (floor 9)"),
        ("globalopt.models.walk", "from globalopt.values import layer\nfrom ..kernels import svd", None),
        ("solvers.oats", "from allocators import uniform", "imports allocators.uniform (floor 3)"),
        ("solvers.oats", "from .wanda import Wanda\nfrom globalopt.kernels import svd", None),
        ("solvers", "from .oats import Oats\nfrom .wanda import Wanda", None),
        ("globalopt.cli", "import solvers, reports\nfrom globalopt.pipeline import search", None),
    ],
)
def test_the_check_sees(module, source, expected):
    names = ("globalopt", "globalopt.values.layer", "globalopt.errors", "globalopt.cli", "globalopt.runs.files")
    names += ("globalopt.models", "globalopt.models.walk", "globalopt.pipeline.search", "globalopt.values")
    names += ("globalopt.kernels", "globalopt.kernels.svd", "solvers", "solvers.oats", "solvers.wanda")
    names += ("allocators", "allocators.uniform", "reports")
    found = violations(dict.fromkeys(names, "") | {module: source})
    if expected is None:
        assert found == []
    else:
        assert len(found) == 1
        assert expected in found[0]


def test_what_only_searches_and_pictures_need_is_not_loaded_to_compress():
    """Optuna, scipy.stats and matplotlib take 50 MiB, which would count towards the peak of every compression."""
    modules = ("cli", "commands.compress", "pipeline.compress", "pipeline.search")
    code = f"import {', '.join(f'globalopt.{module}' for module in modules)}, reports, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in loaded
    assert not {"optuna", "matplotlib", "scipy.stats"} & set(loaded)
